"""docs/trl.md names every setting of the TRL that is installed, and of ours only what exists, with its default."""

import dataclasses
import functools
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import rlhf_lightning as rl
from rlhf_lightning.algorithm.critics import Critic
from rlhf_lightning.cli import check_command
from rlhf_lightning.data.base import RowsDataModule
from rlhf_lightning.data.responses import ResponsesDataModule
from rlhf_lightning.schedules import LinearDecay

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: The section on each of TRL's configs, with what stands for its keys here.
SECTIONS: dict[str, tuple[str, Any, Any]] = {
    "PPOConfig": ("PPO", rl.PPOModule, rl.PromptDataModule),
    "RewardConfig": ("Reward model", rl.RewardModule, rl.PreferenceDataModule),
    "DPOConfig": ("DPO", rl.DPOModule, rl.PreferenceDataModule),
    "TrainingArguments": ("What all trainers share", rl.DPOModule, rl.PreferenceDataModule),
}
#: The classes behind the parts of a module whose options the page names.
PARTS: dict[str, Any] = {
    "reward": rl.RewardModel,
    "critic": rl.SeparateCritic,
    "kl": rl.FixedKL,
    "advantages": rl.GAE,
    "sampling": rl.SamplingConfig,
    "policy_objective": rl.ClippedObjective,
    "value_objective": rl.ClippedValueObjective,
    "loss": rl.SigmoidLoss,
    "lr_scheduler": LinearDecay,
}


KEY = r"(?:model|data|trainer)\.[\w.]+|run_dir|ckpt_path|seed_everything"


class Row(NamedTuple):
    """A row of a table: what TRL has, its default, and ours."""

    names: list[str]
    default: str
    ours: str
    remark: str = ""


def rows_of(section: str) -> list[Row]:
    body = PAGE.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body.splitlines() if "|" in line]
    return [Row(re.findall(r"`([\w/]+)`", cell[0]), *cell[1:4]) for cell in cells if "`" in cell[0]]


def default_of(name: str, *owners: Any) -> Any:
    """Return the default of an argument of the first class that names it."""
    for owner in owners:
        arguments = inspect.signature(owner).parameters
        if name in arguments:
            found = arguments[name].default
            return "required" if found is inspect.Parameter.empty else found
    raise KeyError(name)


@functools.cache
def settings() -> dict[str, Any]:
    """Return the defaults of the command line beside those of module and data."""
    named = "fit --model SFTModule --model.model builtin:demo --data DemonstrationDataModule --data.source x"
    return {"run_dir": None, "ckpt_path": None, "seed_everything": 42} | dict(check_command(named.split()))


def ours(key: str, module: Any, data: Any) -> Any:
    """Return the default of a key of a config."""
    if "." not in key or key.startswith("trainer."):
        return settings()[key]
    owner, name, *rest = key.split(".")
    if owner == "data":
        return default_of(name, data, ResponsesDataModule, RowsDataModule)
    if not rest:
        return default_of(name, module)
    if name == "optimizer":
        return default_of(name, module)([torch.zeros(1, requires_grad=True)]).defaults[rest[0]]
    return default_of(rest[0], PARTS[name], Critic)


def written(value: Any) -> str:
    """Write a default as YAML does."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("config", SECTIONS)
def test_our_keys_exist_and_have_the_defaults_that_the_page_gives(config: str) -> None:
    section, module, data = SECTIONS[config]
    text = " ".join(row.ours + row.remark for row in rows_of(section))
    stated = re.findall(rf"`({KEY})` \((\(.*?\)|.*?)\)", text)
    assert len(stated) > 5
    assert [(key, written(ours(key, module, data))) for key, _ in stated] == stated
    for key in re.findall(rf"`({KEY})`", text):
        of_ppo = key in ("model.max_grad_norm", "data.rollout_batch_size")
        ours(key, *((rl.PPOModule, rl.PromptDataModule) if of_ppo else (module, data)))


def test_the_classes_that_the_page_names_exist() -> None:
    from rlhf_lightning import callbacks, checkpointing, schedules

    theirs = re.compile(r"Trainer$|Config$|Arguments$|Strategy$|^AutoModel")
    named = {name for name in re.findall(r"`([A-Z][a-z]*[A-Z]\w+|GAE)", PAGE) if not theirs.search(name)}
    homes = (rl, callbacks, checkpointing, schedules)
    assert {name for name in named if not any(hasattr(home, name) for home in homes)} == set()


def test_the_logged_keys_are_those_of_the_readme() -> None:
    keys = [
        key
        for row in rows_of("What is logged")
        for key in re.findall(r"`((?:train|rollout|val|time|progress)/\w+)`", row.default)
    ]
    assert len(keys) > 20
    assert [key for key in keys if key not in README and f"`{key.split('/')[1]}`" not in README] == []


def installed(config: str) -> Any:
    """Return a config of TRL, if the release is the one that the page is about."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    wanted = "1.12" if config == "PPOConfig" else "1.16"
    if not trl.__version__.startswith(wanted):
        pytest.skip(f"{config} is that of TRL {wanted}; installed is {trl.__version__}")
    return getattr(pytest.importorskip("trl.experimental.ppo") if config == "PPOConfig" else trl, config)


@pytest.mark.parametrize("config", ["PPOConfig", "RewardConfig", "DPOConfig"])
def test_every_setting_of_the_installed_trl_is_on_the_page_with_its_default(config: str) -> None:
    found = {field.name: field for field in dataclasses.fields(installed(config))}
    shared, own = (
        {name: row for row in rows_of(SECTIONS[part][0]) for name in row.names}
        for part in ("TrainingArguments", config)
    )
    assert set(found) - set(own) - set(shared) == set()
    assert set(own) - set(found) == set()  # nothing that it no longer has
    for name, row in (shared | own).items():
        field: Any = found[name]
        value = repr(field.default_factory() if field.default is dataclasses.MISSING else field.default)
        assert value in row.default.split(", ") or value == row.default, name


@pytest.mark.parametrize(
    ("config", "sources"),
    [
        ("PPOConfig", ["experimental/ppo/ppo_trainer.py"]),
        ("DPOConfig", ["trainer/reward_trainer.py", "trainer/dpo_trainer.py"]),
    ],
)
def test_every_metric_of_the_installed_trl_is_on_the_page(config: str, sources: list[str]) -> None:
    """The names are read off the trainers' sources."""
    installed(config)
    folder = Path(pytest.importorskip("trl").__file__).parent
    text = "".join((folder / source).read_text(encoding="utf-8") for source in sources)
    found = set(re.findall(r"etrics(?:\[mode\])?\[\"([\w/]+)\"\]", text))
    assert len(found) > 10
    assert found - {name for row in rows_of("What is logged") for name in row.names} == set()

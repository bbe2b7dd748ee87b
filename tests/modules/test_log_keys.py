"""The README's tables of log keys are those of real runs: nothing is missing and nothing is made up."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from rlhf_lightning.algorithm.kl import FixedKL
from rlhf_lightning.callbacks import EvaluateLikelihood
from rlhf_lightning.data.collate import LabelledExample, PairExample, collate_labelled, collate_pairs, collate_sequences
from rlhf_lightning.evaluation.answer_sets import LikelihoodSet
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.kto import KTOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.rating import RatingModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.rollout.reward_sources import FunctionReward, WeightedSum

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
PAIRS = [PairExample([5, 6, 7], [20, 21, 4], [22, 4]), PairExample([8], [23, 4], [24, 25, 26, 4])]
LABELLED = [LabelledExample([5, 6, 7], [20, 21, 4], 1.0), LabelledExample([8], [23, 4], 0.0)]


def documented(section: str, *, but: str = "no kind") -> list[str]:
    """Return the keys of a section's table; a name without a folder stands in that of the name before it.

    Args:
        section: How its heading begins.
        but: Rows whose formula begins with this kind of module are left out.
    """
    table = re.search(rf"^### {section}.*?\n(.*?)(?=^##)", README, flags=re.DOTALL | re.MULTILINE)
    assert table is not None
    keys: list[str] = []
    for row, formula in re.findall(r"^\| (`.*?) \| (.*?) \|", table[1], flags=re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", row):
            if not formula.startswith((f"{but}: ", f"{but}, ")):
                keys.append(name if "/" in name else f"{keys[-1].split('/')[0]}/{name}")
    assert len(keys) == len(set(keys))
    return keys


def logged(module: LightningModule, trainer: Callable[..., Trainer], recorder: Any, data: dict[str, Any]) -> set[str]:
    trainer(max_steps=1, logger=recorder, log_every_n_steps=1, val_check_interval=1).fit(module, **data)
    return set(recorder.values) - {"epoch"}


def rows(batch: Any) -> dict[str, Any]:
    loader: DataLoader[Any] = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    return {"train_dataloaders": loader, "val_dataloaders": loader}


def test_ppo(
    ppo: Callable[..., PPOModule], prompts: Callable[..., Any], trainer: Callable[..., Trainer], recorder: Any
) -> None:
    parts = [FunctionReward("rlhf_lightning.demo.voice:human_voice", name=name) for name in ("one", "two")]
    reward = WeightedSum([*parts], weights=[1.0, 0.5])
    found = logged(
        ppo(reward=reward, kl=FixedKL(estimator="k3", place="loss")), trainer, recorder, {"datamodule": prompts(8, 4)}
    )
    names = {re.sub(r"score_(?!std).*", "score_<name>", key) for key in found if key.startswith("rollout/")}
    names |= {key for key in found if not key.startswith("rollout/")}
    assert names == set(documented("PPO"))


def test_reward_model(language_model: str, trainer: Callable[..., Trainer], recorder: Any) -> None:
    module = RewardModule(language_model, center_coef=0.01)
    found = logged(module, trainer, recorder, rows(collate_pairs(PAIRS, pad_id=4)))
    assert found == set(documented("Reward model", but="Ratings"))


def test_ratings(language_model: str, trainer: Callable[..., Trainer], recorder: Any) -> None:
    found = logged(RatingModule(language_model), trainer, recorder, rows(collate_labelled(LABELLED, pad_id=4)))
    assert found == set(documented("Reward model", but="Pairs"))


def test_sft(language_model: str, trainer: Callable[..., Trainer], recorder: Any) -> None:
    batch = collate_sequences([(prompt, chosen) for prompt, chosen, _ in PAIRS], pad_id=4)
    assert logged(SFTModule(language_model), trainer, recorder, rows(batch)) == set(documented("SFT"))


def test_likelihood(language_model: str, trainer: Callable[..., Trainer], recorder: Any) -> None:
    wanted = LikelihoodSet("builtin:demo/eval", limit=2, max_length=120, max_prompt_length=60)
    batch = collate_sequences([(prompt, chosen) for prompt, chosen, _ in PAIRS], pad_id=4)
    running = trainer(max_steps=1, logger=recorder, val_check_interval=1, callbacks=[EvaluateLikelihood({"x": wanted})])
    running.fit(SFTModule(language_model), **rows(batch))
    own = {re.sub("_x$", "_<name>", key) for key in recorder.values if key.endswith("_x")}
    assert own == set(documented("The callback `EvaluateLikelihood`"))


def test_dpo(language_model: str, trainer: Callable[..., Trainer], recorder: Any) -> None:
    found = logged(DPOModule(language_model), trainer, recorder, rows(collate_pairs(PAIRS, pad_id=4)))
    assert found == set(documented("DPO", but="KTO"))


def test_kto(language_model: str, trainer: Callable[..., Trainer], recorder: Any) -> None:
    found = logged(KTOModule(language_model), trainer, recorder, rows(collate_labelled(LABELLED, pad_id=4)))
    assert found == set(documented("DPO", but="DPO"))

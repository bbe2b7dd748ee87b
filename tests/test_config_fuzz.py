"""Any value for any knob: taken, or refused in one line before anything is loaded; no traceback, no hang."""

import inspect
import json
import sys
import time
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer

import rlhf_lightning
from rlhf_lightning.cli import check_command, import_named_classes
from rlhf_lightning.config_types import _signatures
from rlhf_lightning.errors import UserError

#: Arguments that each module and data module needs, as a user would give them.
MODULES = {
    "SFTModule": ["--model.model=policy"],
    "RewardModule": ["--model.model=policy"],
    "RatingModule": ["--model.model=policy"],
    "DPOModule": ["--model.policy=policy"],
    "KTOModule": ["--model.policy=policy"],
    "PPOModule": ["--model.policy=policy", "--model.reward=FunctionReward", "--model.reward.function=rewards.py:f"],
}
#: Parts by the key that takes them: the module that has it, and what may stand there.
PARTS = {
    "model.kl": ("PPOModule", ["FixedKL", "AdaptiveKL"]),
    "model.critic": ("PPOModule", ["SeparateCritic", "TrunkCritic"]),
    "model.advantages": ("PPOModule", ["GAE", "GlobalBaseline", "GroupRelative", "LeaveOneOut"]),
    "model.policy_objective": ("PPOModule", ["ClippedObjective"]),
    "model.policy_objective.normalization": ("PPOModule", ["TokenMean", "SequenceMean", "FixedLength"]),
    "model.value_objective": ("PPOModule", ["ClippedValueObjective"]),
    "model.score_transforms": ("PPOModule", ["RunningNormalization", "ScoreClip", "MissingEOSPenalty"]),
    "model.sampling": ("PPOModule", ["SamplingConfig"]),
    "model.reward": ("PPOModule", ["FunctionReward", "TokenFunctionReward", "RewardModel", "WeightedSum"]),
    "model.lora": ("SFTModule", ["LoRA"]),
    "model.loss": ("DPOModule", ["SigmoidLoss", "IPOLoss", "HingeLoss", "RobustLoss"]),
    "model.optimizer": ("SFTModule", ["torch.optim.AdamW", "torch.optim.SGD"]),
    "model.lr_scheduler": ("SFTModule", ["LinearDecay", "CosineDecay", "torch.optim.lr_scheduler.StepLR"]),
    "trainer.callbacks": ("SFTModule", ["RunCheckpoint", "KLBudget", "RepetitionGuard", "LengthDrift", "ExportModel"]),
    "trainer.logger": (
        "SFTModule",
        ["lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.TensorBoardLogger"],
    ),
}
DATA = ("DemonstrationDataModule", "PreferenceDataModule", "PromptDataModule", "UnpairedDataModule")
#: Seconds of the processor that one command line may take to be refused.
LIMIT = 30.0

import_named_classes()
Capture = pytest.CaptureFixture[str]


def knobs() -> list[tuple[str, list[str]]]:
    """Return each argument of each module and data module as an option, with the rest of a command line."""
    found = []
    for name in (*MODULES, *DATA):
        signatures = _signatures(getattr(rlhf_lightning, name))
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        group = "model" if name in MODULES else "data"
        keys = [key for key, _, parameter in signatures if parameter.kind in kinds and key != "self"]
        found += [(f"--{group}.{key}=", command_line(name)) for key in keys]
    return found


def command_line(name: str) -> list[str]:
    """Return a command line that is right, of a module or with a data module."""
    module, data = (name, DATA[0]) if name in MODULES else ("SFTModule", name)
    return ["fit", f"--model={module}", *MODULES[module], f"--data={data}", "--data.source=pairs.jsonl"]


def nested_knobs() -> list[tuple[str, list[str]]]:
    """Return each argument of each part as the start of an option, with the rest of a command line."""
    found = []
    for place, (module, parts) in PARTS.items():
        for part in parts:
            rest = command_line(module) + ([] if part == "SamplingConfig" else [f"--{place}={part}"])
            found += [(f"--{place}.{key}=", rest) for key in (*arguments_of(part), "nothing")]
    return found


def arguments_of(part: str) -> list[str]:
    """Return the names of what a class of this package, by its name, or of another, by its path, is made from."""
    path, _, name = part.rpartition(".")
    homes = [path] if path else [module for module in sys.modules if module.startswith("rlhf_lightning")]
    found = next(vars(sys.modules[home])[name] for home in homes if name in vars(sys.modules[home]))
    return list(inspect.signature(found).parameters)


def trainer_knobs() -> list[tuple[str, list[str]]]:
    """Return each argument of the Trainer likewise."""
    rest = command_line("SFTModule")
    return [(f"--trainer.{name}=", rest) for name in inspect.signature(Trainer).parameters]


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 10**30, 1e-320, float("nan"), float("inf")])
scalars = st.none() | st.booleans() | numbers | words
classes = st.sampled_from(
    ["AdamW", "FixedKL", "os.system", "RewardModel", "SFTModule", "Nothing", "a.b", "LoRA", "GAE"]
)
named = st.fixed_dictionaries(
    {"class_path": classes | words}, optional={"init_args": st.dictionaries(words, scalars, max_size=2), "x": scalars}
)
values = st.one_of(
    scalars,
    classes,
    named,
    st.lists(scalars | named, max_size=3),
    st.dictionaries(words, scalars | named, max_size=2),
)
raw = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=15) | st.sampled_from(
    [
        "",
        " ",
        "null",
        "None",
        "{",
        "[",
        "- ",
        "&a *a",
        "!!python/object/apply:os.system [x]",
        "1e999",
        "0x",
        "~",
        "@",
        "%",
    ]
)
as_given = raw | values.map(json.dumps) | scalars.map(str)


def answer(argv: list[str], capfd: Capture) -> str:
    """Return what a command line leads to: taken or refused; everything else is a bug."""
    start, status = time.process_time(), 0
    try:
        check_command(argv)
    except UserError as mistake:
        status, line = 2, str(mistake)
    except SystemExit as ending:
        status, line = int(ending.code or 0), capfd.readouterr().err
    assert time.process_time() - start < LIMIT
    if status == 0:
        return "taken"
    lines = [part for part in line.removeprefix("error: ").split("\n") if part]
    assert status == 2
    assert lines[1:] == [] or lines[1].startswith("See all keys"), line
    assert len(lines) in (1, 2), line
    return "refused"


def trial(count: int, knobs: list[tuple[str, list[str]]], tried: Counter[str], capfd: Capture) -> None:
    """Try so many command lines: a knob's option with any value, and the rest."""

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(knob=st.sampled_from(knobs), value=as_given)
    def run(knob: tuple[str, list[str]], value: str) -> None:
        tried[answer([*knob[1], knob[0] + value], capfd)] += 1

    run()


KNOBS = {"modules": knobs, "parts": nested_knobs, "trainer": trainer_knobs}


@pytest.mark.parametrize("which", KNOBS)
def test_some_values_of_knobs(which: str, capfd: Capture) -> None:
    tried: Counter[str] = Counter()
    trial(12, KNOBS[which](), tried, capfd)
    assert tried["refused"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("which", KNOBS)
def test_many_values_of_knobs(which: str, capfd: Capture) -> None:
    tried: Counter[str] = Counter()
    trial(1000, KNOBS[which](), tried, capfd)
    with capfd.disabled():
        print(f"\ntried: {dict(tried)} over {len(KNOBS[which]())} knobs")
    assert min(tried["taken"], tried["refused"]) > 50

"""Any value for any knob: taken, or refused in one line before anything is loaded; no traceback, no hang."""

import inspect
import json
import time
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
DATA = ("DemonstrationDataModule", "PreferenceDataModule", "PromptDataModule", "UnpairedDataModule")
#: Seconds that one command line may take to be refused.
LIMIT = 30.0

import_named_classes()


def knobs() -> list[tuple[str, str]]:
    """Return each argument of each module and data module, with the module that it is tried on."""
    found = []
    for name in (*MODULES, *DATA):
        signatures = _signatures(getattr(rlhf_lightning, name))
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        found += [(name, key) for key, _, parameter in signatures if parameter.kind in kinds and key != "self"]
    return found


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


def argument_line(name: str, key: str, value: str) -> list[str]:
    """Return a command line that is right but for one value."""
    module, data = (name, DATA[0]) if name in MODULES else ("SFTModule", name)
    group = "model" if name in MODULES else "data"
    return [
        "fit",
        f"--model={module}",
        *MODULES[module],
        f"--data={data}",
        "--data.source=pairs.jsonl",
        f"--{group}.{key}={value}",
    ]


def answer(argv: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """Return what a command line leads to: taken or refused; everything else is a bug."""
    start, status = time.monotonic(), 0
    try:
        check_command(argv)
    except UserError as mistake:
        status, line = 2, str(mistake)
    except SystemExit as ending:
        status, line = int(ending.code or 0), capfd.readouterr().err
    assert time.monotonic() - start < LIMIT
    if status == 0:
        return "taken"
    lines = [part for part in line.removeprefix("error: ").split("\n") if part]
    assert status == 2
    assert lines[1:] == [] or lines[1].startswith("See all keys"), line
    assert len(lines) in (1, 2), line
    return "refused"


def trial(count: int, tried: Counter[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Try so many command lines."""

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(knob=st.sampled_from(knobs()), value=as_given)
    def run(knob: tuple[str, str], value: str) -> None:
        tried[answer(argument_line(*knob, value), capfd)] += 1

    run()


def test_some_values_of_knobs(capfd: pytest.CaptureFixture[str]) -> None:
    tried: Counter[str] = Counter()
    trial(25, tried, capfd)
    assert tried["refused"] > 0


@pytest.mark.slow
def test_many_values_of_knobs(capfd: pytest.CaptureFixture[str]) -> None:
    tried: Counter[str] = Counter()
    trial(1000, tried, capfd)
    with capfd.disabled():
        print(f"\ntried: {dict(tried)} over {len(knobs())} knobs")
    assert min(tried["taken"], tried["refused"]) > 100

"""report.json is what the schema says, and the page says what the schema says."""

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from rlhf_lightning.evaluation.answer_sets import LikelihoodSet, PairSet
from rlhf_lightning.evaluation.compare import compare
from rlhf_lightning.evaluation.summary import JSON_FORMAT, Comparison, ModelSummary
from rlhf_lightning.rollout.reward_sources import FunctionReward
from rlhf_lightning.rollout.sampler import SamplingConfig

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "rlhf_lightning/evaluation/report.schema.json").read_text(encoding="utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA)


def letters(prompts: list[Any], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


@pytest.fixture(scope="module")
def full(tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A report with every part."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "metrics.jsonl").write_text('{"step": 0, "train/loss": 1.0, "time": 2.0}\n')
    reward = FunctionReward(f"{__file__}:letters")
    result = compare(
        models=tiny_models,
        prompts="builtin:demo/eval_prompts",
        output=str(folder / "report"),
        reward=reward,
        text_metrics={"human": "rlhf_lightning.demo.voice:human_voice"},
        sampling=SamplingConfig(max_new_tokens=4),
        limit=4,
        curves={"other": str(folder / "metrics.jsonl")},
        likelihood={"train": LikelihoodSet(source="builtin:demo/eval", limit=4)},
        pairs={"held out": PairSet(source="builtin:demo/eval", limit=4, group_by="prompt")},
        judges={"second": reward},
        best_of=[2],
        best_of_samples=2,
        questions=["Do you like tea?"],
    )
    return dict(json.loads(Path(result["json"]).read_text(encoding="utf-8")))


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["format"]["const"] == JSON_FORMAT


def test_a_full_report_fits(full: dict[str, Any]) -> None:
    VALIDATOR.validate(full)
    assert set(full) == set(SCHEMA["properties"])
    assert full["sections"].keys() == SCHEMA["properties"]["sections"]["properties"].keys()


def test_a_bare_report_fits(tiny_models: dict[str, str], tmp_path: Path) -> None:
    result = compare(
        models={"base": tiny_models["base"]},
        prompts="builtin:demo/eval_prompts",
        output=str(tmp_path),
        sampling=SamplingConfig(max_new_tokens=2),
        limit=2,
    )
    VALIDATOR.validate(json.loads(Path(result["json"]).read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), "rlhf_lightning.comparison/1"),
        (("created",), "yesterday"),
        (("new",), 1),
        (("models", 0, "kl"), 0.5),
        (("models", 0, "finished"), {"mean": 1.5, "low": 0.5, "high": 1.0}),
        (("models", 0, "score", "mean"), "nan"),
        (("sections", "judges", "data", "second", "base", "score"), None),
        (("sections", "diversity", "rows", 0, "cells", 0), "much"),
        (("questions", 0, "prompt"), None),
    ],
)
def test_what_does_not_fit_is_refused(full: dict[str, Any], path: tuple[str | int, ...], value: Any) -> None:
    changed = json.loads(json.dumps(full))
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValidationError):
        VALIDATOR.validate(changed)


def test_numbers_that_are_not_finite_fit(full: dict[str, Any]) -> None:
    full["models"][0]["kl"]["high"] = "Infinity"
    VALIDATOR.validate(full)


def test_every_field_is_described(make_comparison: Callable[..., Comparison]) -> None:
    described = SCHEMA["$defs"]["model"]["properties"]
    assert list(described) == [field.name for field in fields(ModelSummary)]
    assert set(SCHEMA["properties"]["sampling"]["properties"]) == set(asdict(SamplingConfig()))
    assert set(SCHEMA["properties"]) == {*make_comparison().as_dict(), "curves"}


def test_the_page_says_what_the_schema_says(load_tool: Callable[[str], ModuleType]) -> None:
    page = (ROOT / "docs/report_schema.md").read_text(encoding="utf-8")
    assert page == load_tool("report_schema").render(SCHEMA)  # else: python tools/report_schema.py --write

"""The card's metadata block, as the Hub reads it."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_lightning.data.readers import is_hub_name
from rlhf_lightning.evaluation.formatting import ends, plain
from rlhf_lightning.evaluation.statistics import Interval
from rlhf_lightning.model_card.comparison import MeasuredModel
from rlhf_lightning.model_card.records import RunRecords

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

_GENERATION = ("text-generation", "Text generation")
_CLASSIFICATION = ("text-classification", "Reward model")
_CRITIC_FREE = {"GroupRelative": "grpo", "LeaveOneOut": "rloo", "GlobalBaseline": "reinforce++"}


def algorithm_of(records: RunRecords) -> str:
    """Return the short name of what trained a model.

    Example:
        >>> algorithm_of(RunRecords("PPOModule", "LlamaForCausalLM", step=1))
        'ppo'
    """
    short = records.module.removesuffix("Module").lower()
    estimator = records.model_settings.get("advantages")
    path = estimator.get("class_path", "") if isinstance(estimator, dict) else ""
    return _CRITIC_FREE.get(str(path).rpartition(".")[2], short) if short == "ppo" else short


def metadata(records: RunRecords, measured: MeasuredModel | None, name: str) -> "ModelCardData":
    """Return the metadata of a card; what is not known is not in it.

    Args:
        records: Of the run.
        measured: A comparison of the model; ``None`` where there is none.
        name: What the model is called.
    """
    from huggingface_hub import ModelCardData

    task, _ = _CLASSIFICATION if records.scores else _GENERATION
    tags = ["rlhf_lightning", algorithm_of(records), "reward-model" if records.scores else "rlhf"]
    results = [*_measured_results(measured), *_logged_results(records)]
    return ModelCardData(
        base_model=(records.record.get("start") or {}).get("hub"),
        datasets=_hub_data(records) or None,
        eval_results=results or None,
        library_name="transformers",
        model_name=one_line(name),
        pipeline_tag=task,
        tags=[tag for tag in tags if tag],
    )


def one_line(text: str) -> str:
    r"""Return a text without line breaks, control characters and runs of spaces, which a YAML block might stumble over.

    Example:
        >>> one_line("a\n---\nb\x00")
        'a --- b'
    """
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _hub_data(records: RunRecords) -> list[str]:
    """Return the data sets of the hub that the run read, without their configs."""
    source = str(records.data.get("source") or "")
    name = source.partition(":")[0]
    return [name] if is_hub_name(source) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else []


def _measured_results(measured: MeasuredModel | None) -> "Iterator[EvalResult]":
    if measured is None:
        return
    for row, cell in measured.cells():
        if row.note == "seconds":  # of training, which is no result
            continue
        mean, interval = cell, ""
        if isinstance(cell, Interval):
            low, high = ends(cell, row.kind)
            unit = " %" if row.kind == "share" else ""
            mean, interval = cell.mean, f", 95 % interval {low} to {high}{unit}"
        yield _result(_GENERATION, measured.report["prompts"]["source"], row.label, f"{row.note}{interval}", mean)


def _logged_results(records: RunRecords) -> "Iterator[EvalResult]":
    """Yield the last validation of the training."""
    source = str(records.data.get("val_source") or records.data.get("source") or "validation rows")
    task = _CLASSIFICATION if records.scores else _GENERATION
    step, values = last_validation(records)
    for key, value in values.items():
        yield _result(task, source, key, f"validation at step {step}", value)


def last_validation(records: RunRecords) -> tuple[int, dict[str, float]]:
    """Return the step of the last validation and what it logged, by name; nothing where there was none."""
    for row in reversed(records.metrics):
        found = {key: float(value) for key, value in row.items() if key.startswith("val/") and _is_number(value)}
        if found:
            return int(row["step"]), found
    return 0, {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and plain(value)[-1].isdigit()


def _result(task: tuple[str, str], source: str, label: str, note: str, value: Any) -> "EvalResult":
    from huggingface_hub import EvalResult

    source = one_line(str(source))
    kind = source.partition(":")[0] if is_hub_name(source) else _slug(source)
    name = one_line(f"{label} ({note})")
    return EvalResult(task[0], kind, source, _slug(label), float(f"{value:.6g}"), task_name=task[1], metric_name=name)


def _slug(text: str) -> str:
    """Return a name of letters, digits and underscores.

    Example:
        >>> _slug("Win rate"), _slug("builtin:demo/eval"), _slug("日本")
        ('win_rate', 'builtin_demo_eval', 'unnamed')
    """
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "unnamed"

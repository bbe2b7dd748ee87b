"""README.md of an exported model: what it is, how to load it, what was measured, how it was trained, and its limits."""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_lightning.evaluation.curves import training_seconds_of
from rlhf_lightning.evaluation.formatting import TableRow, plain, written
from rlhf_lightning.markdown import escape_cell, escape_line, markdown_table
from rlhf_lightning.model_card.comparison import MeasuredModel, MeasuredTable
from rlhf_lightning.model_card.figures import CurveFile, write_curves
from rlhf_lightning.model_card.files import write_text
from rlhf_lightning.model_card.limits import limits
from rlhf_lightning.model_card.metadata import algorithm_of, last_validation, metadata, one_line
from rlhf_lightning.model_card.methods import references
from rlhf_lightning.model_card.records import RunRecords
from rlhf_lightning.model_card.samples import compared_samples, logged_samples
from rlhf_lightning.model_card.settings import classes_of, setting_rows
from rlhf_lightning.model_card.usage import loading_code

#: What Markdown reads as it stands between backticks, in a table too.
_PLAIN = re.compile(r"[\w.,:;=+/\[\] -]+")
_BY = {
    "sft": "supervised fine-tuning",
    "reward": "comparing the two sides of preference pairs",
    "rating": "regression on ratings",
    "dpo": "DPO",
    "kto": "KTO",
    "ppo": "PPO",
    "grpo": "GRPO",
    "rloo": "RLOO",
    "reinforce++": "REINFORCE++",
}
_COUNTS = {
    "progress/iterations": "Iterations",
    "progress/episodes": "Responses sampled",
    "progress/tokens": "Tokens sampled",
    "progress/updates": "Optimizer steps",
}


def write_card(
    directory: str | Path,
    records: RunRecords,
    measured: MeasuredModel | None = None,
    *,
    name: str | None = None,
    repository: str | None = None,
) -> None:
    """Write ``README.md``, and ``curves/`` beside it, into the folder of an exported model.

    All numbers are those of the records; what they do not tell is left out.

    Args:
        directory: The model's folder.
        records: Of the run.
        measured: A comparison that the model was part of; ``None`` where there is none.
        name: What the model is called; ``None`` takes the name of the run's folder.
        repository: Its name on the Hub, for the code that loads it.
    """
    directory = Path(directory)
    title = name or records.name or directory.resolve().name
    parts = [
        f"# {escape_line(title)}",
        _introduction(records),
        "## Use",
        f"```python\n{loading_code(records, repository)}```",
        *_results(records, measured),
        *_training(records, write_curves(directory, records.metrics)),
        "## Limits",
        "\n".join(f"- {limit}" for limit in limits(records, measured)),
        *_methods(records),
        _origin(records, measured),
    ]
    block = metadata(records, measured, title).to_yaml(line_break="\n")
    text = f"---\n{block}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"
    write_text(directory / "README.md", text)


def _introduction(records: RunRecords) -> str:
    kind = "A reward model, which scores an answer to a prompt," if records.scores else "A language model"
    how = _BY.get(algorithm_of(records), f"<code>{escape_cell(records.module)}</code>" if records.module else "")
    start = records.record.get("start") or {}
    given = start.get("name") or records.setting("policy") or records.setting("model")
    scratch = records.setting("pretrained") is False
    origin = f" {'with the architecture and tokenizer of' if scratch else 'from'} {_code(given)}" if given else ""
    hub = start.get("hub")
    origin += f", which goes back to {_code(hub)}" if hub and hub != given else ""
    data = f" on {_code(records.data['source'])}" if records.data.get("source") else ""
    if scratch:
        return f"{kind}{origin}, trained from scratch by {how}{data}."
    return f"{kind} trained{f' by {how}' if how else ''}{origin}{data}."


def _results(records: RunRecords, measured: MeasuredModel | None) -> list[str]:
    parts: list[str] = []
    if measured is not None:
        parts = [_how_measured(measured), *(part for table in measured.tables for part in _measured_table(table))]
    step, validation = last_validation(records)
    if validation:
        rows = [[_code(key), plain(value)] for key, value in validation.items()]
        parts += [
            f"The last validation of the training, at step {step:,}:",
            markdown_table(["logged as", "value"], rows, align="lr"),
        ]
    samples = logged_samples(records) if measured is None else compared_samples(measured)
    return [*(["## Results", *parts] if parts else []), *(["## Samples", *samples] if samples else [])]


def _how_measured(measured: MeasuredModel) -> str:
    report, prompts = measured.report, measured.report["prompts"]
    score = f" Scores are from {escape_line(str(report['reward']))}." if report.get("reward") else ""
    return (
        f"This model is <b>{escape_cell(measured.own)}</b>. {int(prompts['count']):,} of {int(prompts['available']):,} "
        f"prompts of {_code(prompts['source'])} were answered once by each model, at most "
        f"{int(report['sampling']['max_new_tokens'])} tokens.{score} In brackets: 95 % intervals."
    )


def _measured_table(table: MeasuredTable) -> list[str]:
    rows = [[_label(row), *(written(cell, row.kind) for cell in row.cells)] for row in table.rows]
    heads = ["", *map(escape_cell, table.columns)]
    shown = markdown_table(heads, rows, align="l" + "r" * len(table.columns)) if rows else ""
    return [f"### {escape_line(table.title)}" if table.title else "", escape_line(table.note), shown]


def _label(row: TableRow) -> str:
    return f"<b>{escape_cell(row.label)}</b> {escape_cell(row.note)}".strip()


def _training(records: RunRecords, curves: Sequence[CurveFile]) -> list[str]:
    facts = markdown_table(["", ""], _facts(records), align="ll")
    settings = [[_code(key), _code(value)] for key, value in _settings(records)]
    table = markdown_table(["setting", "value"], settings, align="ll")
    note = "What differs from the defaults, and what matters even where it does not:"
    drawn = "\n".join(map(_image, curves))
    return [
        *("## Training", facts),
        *(["### Settings", note, table] if settings else []),
        *(["### Curves", drawn] if drawn else []),
    ]


def _image(curve: CurveFile) -> str:
    described = html.escape(one_line(f"{curve.title}: {', '.join(curve.labels)}"))
    return f'<img src="{curve.path}" alt="{described}" width="376">'


def _settings(records: RunRecords) -> list[tuple[str, str]]:
    return [(key, value if len(value) <= 300 else f"{value[:300]} …") for key, value in setting_rows(records)]


def _facts(records: RunRecords) -> list[list[str]]:
    """Return name and value of what the run says of itself."""
    record, data = records.record, records.data
    seconds = training_seconds_of(records.metrics)
    counted = {title: records.last(key) for key, title in _COUNTS.items()}
    found: dict[str, Any] = {
        "Module": _code(records.module) if records.module else None,
        **_parameters(record.get("parameters") or {}, has_critic="critic" in (record.get("parts") or {})),
        "Training data": _rows_of(data, "source", "train"),
        "Validation data": _rows_of(data, "val_source", "val"),
        "Digest of the training rows, SHA-256": _code(str(data["digest"])[:16]) if data.get("digest") else None,
        "Steps": f"{records.step:,}" if records.step else None,
        **{title: f"{value:,.0f}" for title, value in counted.items() if value is not None},
        "Time": None if seconds is None else f"{plain(seconds)} s, validation included",
        "Hardware": escape_cell(str(record["hardware"])) if record.get("hardware") else None,
        "Precision": escape_cell(str(record["precision"])) if record.get("precision") else None,
        "Versions": escape_cell(
            ", ".join(f"{name} {number}" for name, number in (record.get("versions") or {}).items())
        ),
    }
    return [[name, str(value)] for name, value in found.items() if value]


def _parameters(parameters: dict[str, Any], *, has_critic: bool) -> dict[str, str]:
    trained = {"Trained parameters, critic included" if has_critic else "Trained parameters": parameters.get("trained")}
    counts = {"Parameters": parameters.get("exported"), **trained}
    return {name: f"{number:,}" for name, number in counts.items() if number}


def _rows_of(data: dict[str, Any], key: str, part: str) -> str:
    counts = data.get("counts") or {}
    own = {name.removeprefix(f"{part}_"): n for name, n in counts.items() if name.startswith(f"{part}_")}
    own.pop("prompts_in_training", None)
    source = _code(data[key]) if data.get(key) else ""
    told = ", ".join(f"{escape_cell(name.replace('_', ' '))} {number:,}" for name, number in own.items())
    return ": ".join(part for part in (source, told) if part)


def _methods(records: RunRecords) -> list[str]:
    model = records.settings.get("model")
    path = model.get("class_path") if isinstance(model, dict) else None
    module = path or (f"rlhf_lightning.{records.module}" if records.module else "")
    found = references([module, *classes_of(records.model_settings)])
    note = "The papers that the classes in use refer to:"
    return ["## Methods", note, "\n".join(f"- {escape_line(entry)}" for entry in found)] if found else []


def _origin(records: RunRecords, measured: MeasuredModel | None) -> str:
    version = (records.record.get("versions") or {}).get("rlhf_lightning")
    by = f"rlhf_lightning {escape_cell(str(version))}" if version else "rlhf_lightning"
    when = f" The comparison is of {escape_line(str(measured.report['created']))}." if measured else ""
    return f"Trained with {by}; this card was made from the run's own records.{when}"


def _code(value: Any) -> str:
    text = one_line(str(value))
    return f"`{text}`" if _PLAIN.fullmatch(text) else f"<code>{escape_cell(text)}</code>"

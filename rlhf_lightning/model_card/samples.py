"""Answers of the model: drawn by the seed or the last that the run logged, never chosen."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_lightning.evaluation.formatting import plain
from rlhf_lightning.evaluation.report_words import draw_samples
from rlhf_lightning.markdown import escape_cell, escape_line, markdown_table
from rlhf_lightning.model_card.comparison import MeasuredModel
from rlhf_lightning.model_card.records import RunRecords

SHOWN = 4
MAX_LETTERS = 700


def compared_samples(measured: MeasuredModel) -> list[str]:
    """Return answers of the base and of the model to the same prompts, as paragraphs of Markdown."""
    by_row: dict[int, dict[str, dict[str, Any]]] = {}
    for sample in measured.samples:
        by_row.setdefault(sample["row"], {})[sample["model"]] = sample
    names = list(dict.fromkeys([measured.base, measured.own]))
    numbers = draw_samples(len(by_row), SHOWN, int(measured.report["seed"]))
    rows = [by_row[sorted(by_row)[number]] for number in numbers]
    parts = _asked(measured, names)
    if rows:
        temperature = float(measured.report["sampling"]["temperature"])
        how = "Greedy" if temperature == 0 else f"Sampled (temperature {temperature:g})"
        parts.append(f"{how} answers to {len(rows)} of {len(by_row)} prompts, drawn by the seed and not chosen.")
    for row in rows:
        answers = [row[name] for name in names if name in row]
        parts += [_quoted(answers[0].get("prompt")), _table(answers)] if answers else []
    return parts


def logged_samples(records: RunRecords) -> list[str]:
    """Return the last answers that the run logged, as paragraphs of Markdown; validation prompts before rollouts."""
    for split, what in (("val", "validation prompts"), ("train", "training prompts")):
        rows = [row for row in records.samples if row.get("split") == split]
        if rows:
            step = rows[-1]["step"]
            shown = [row for row in rows if row["step"] == step][:SHOWN]
            note = (
                f"Answers to the first {len(shown)} {what} at step {step}, as they were sampled; they are not chosen."
            )
            return [note, _table([{**row, "model": None} for row in shown], with_prompt=True)]
    return []


def _asked(measured: MeasuredModel, names: Sequence[str]) -> list[str]:
    """Return what was asked by name, greedily and sampled."""
    parts = []
    questions = measured.report.get("questions")
    for question in questions if isinstance(questions, list) else []:
        greedy, sampled = question.get("greedy") or {}, question.get("sampled") or {}
        rows = [
            [escape_cell(name), _shown(greedy.get(name)), _shown(sampled.get(name))]
            for name in names
            if name in greedy or name in sampled
        ]
        if rows:
            parts += [_quoted(question.get("prompt")), markdown_table(["model", "greedy", "sampled"], rows)]
    return ["Questions that were asked by name:", *parts] if parts else []


def _table(samples: Sequence[Mapping[str, Any]], *, with_prompt: bool = False) -> str:
    columns = {
        "prompt": [_shown(prompt_text(sample.get("prompt"))) for sample in samples] if with_prompt else [],
        "model": [escape_cell(str(sample["model"])) for sample in samples if sample["model"] is not None],
        "answer": [_answer(sample) for sample in samples],
        "score": [_number(sample.get("score")) for sample in samples],
    }
    if not any(columns["score"]):
        del columns["score"]
    columns = {name: cells for name, cells in columns.items() if cells}
    align = "".join("r" if name == "score" else " " for name in columns)
    return markdown_table(list(columns), list(zip(*columns.values(), strict=True)), align=align)


def _answer(sample: Mapping[str, Any]) -> str:
    return _shown(sample.get("response")) + ("" if sample.get("finished", True) else " … (cut off)")


def _number(value: Any) -> str:
    return plain(float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else ""


def _shown(text: Any) -> str:
    """Return a text for a cell, cut where it is long."""
    if not isinstance(text, str) or not text.strip():
        return "(empty)"
    return escape_cell(text.strip() if len(text) <= MAX_LETTERS else f"{text[:MAX_LETTERS].strip()} … (shortened)")


def _quoted(prompt: Any) -> str:
    text = prompt_text(prompt)
    return f"> {escape_line(text if len(text) <= MAX_LETTERS else f'{text[:MAX_LETTERS]} …', breaks=True)}"


def prompt_text(prompt: Any) -> str:
    """Return a prompt, text or chat messages, as text; of a single message its content alone.

    Example:
        >>> prompt_text([{"role": "user", "content": "Hi"}]), prompt_text("Hi")
        ('Hi', 'Hi')
    """
    if not isinstance(prompt, list):
        return str(prompt)
    messages = [message for message in prompt if isinstance(message, Mapping)]
    if len(messages) == 1:
        return str(messages[0].get("content", ""))
    return "\n".join(f"{message.get('role', '?')}: {message.get('content', '')}" for message in messages)

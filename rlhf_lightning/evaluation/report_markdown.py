"""The comparison as GitHub-flavoured Markdown: the tables and samples of the HTML report; the figures stay there."""

from collections.abc import Sequence

from rlhf_lightning.evaluation.formatting import TableRow, plain, written
from rlhf_lightning.evaluation.generations import Generations
from rlhf_lightning.evaluation.questions import Question
from rlhf_lightning.evaluation.report_words import (
    MEASURED_NOTE,
    QUESTIONS_NOTE,
    SHOWN_SAMPLES,
    draw_samples,
    lede,
    method,
    real_minus,
    samples_note,
    title,
)
from rlhf_lightning.evaluation.sections import Section
from rlhf_lightning.evaluation.summary import Comparison, headline
from rlhf_lightning.markdown import escape_cell, escape_line, markdown_table
from rlhf_lightning.rollout.reward_sources import Prompt


def render_markdown(comparison: Comparison, *, shown: int = SHOWN_SAMPLES) -> str:
    """Return the report as Markdown; whatever data or models say is shown as it is.

    Args:
        comparison: What was measured.
        shown: How many prompts to show with every model's answer; the same as in the HTML report.
    """
    parts = [
        f"# {escape_line(title(comparison))}",
        escape_line(lede(comparison)),
        _verdicts(comparison),
        *_titled("Measured", MEASURED_NOTE, rows_table(comparison.table, comparison.names)),
        *(part for section in comparison.sections for part in _section(section)),
        *_questions(comparison.questions),
        *_titled("Answers side by side", *_samples(comparison, shown)),
        *_titled("How it was measured", _method(comparison)),
        f"Written by rlhf_lightning, {escape_line(comparison.created)}. Figures are in `report.html`, the numbers in "
        "`report.json`, every answer in `samples.jsonl`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def rows_table(rows: Sequence[TableRow], columns: Sequence[str]) -> str:
    """Return a table of measures, intervals in brackets.

    Example:
        >>> from rlhf_lightning.evaluation.statistics import Interval
        >>> print(rows_table([TableRow("Score", "mean", "number", [Interval(1.0, 0.5, 1.5), None])], ["ppo", "a|b"]))
        | | ppo | a&#124;b |
        |:---|---:|---:|
        | **Score** mean | 1.00 [0.50, 1.50] | – |
    """
    lines = [
        [
            f"**{escape_cell(row.label)}** {escape_cell(row.note)}".strip(),
            *(real_minus(written(cell, row.kind)) for cell in row.cells),
        ]
        for row in rows
    ]
    return markdown_table(["", *map(escape_cell, columns)], lines, align="l" + "r" * len(columns))


def _titled(heading: str, *parts: str) -> list[str]:
    return [f"## {escape_line(heading)}", *parts]


def _verdicts(comparison: Comparison) -> str:
    others = [model for model in comparison.models if model.name != comparison.base]
    return "\n".join(f"- {escape_line(headline(model, comparison.base_summary))}" for model in others)


def _section(section: Section) -> list[str]:
    table = rows_table(section.rows, section.columns) if section.rows else ""
    count = len(section.figures)
    drawn = f"{count} figure{'s' if count > 1 else ''} in `report.html`." if count else ""
    return _titled(section.title, escape_line(section.note), table, drawn)


def _questions(questions: Sequence[Question]) -> list[str]:
    parts = []
    for question in questions:
        names = list(question.greedy | question.sampled)
        rows = [[name, question.greedy.get(name, ""), question.sampled.get(name, "")] for name in names]
        parts += [_quoted(question.prompt), _answers(["model", "greedy", "sampled"], rows)]
    return _titled("Questions", QUESTIONS_NOTE, *parts) if parts else []


def _samples(comparison: Comparison, shown: int) -> list[str]:
    numbers = draw_samples(len(comparison.prompts.prompts), shown, comparison.seed)
    parts = [samples_note(len(numbers))]
    for number in numbers:
        rows = [_sample(answer, number) for answer in comparison.answers]
        parts += [_quoted(comparison.prompts.prompts[number]), _answers(["model", "score", "tokens", "answer"], rows)]
    return parts


def _sample(answer: Generations, number: int) -> list[str]:
    score = "–" if answer.scores is None else real_minus(plain(float(answer.scores[number])))
    ending = "" if bool(answer.finished[number]) else " … (cut off)"
    return [answer.name, score, str(int(answer.lengths[number])), answer.responses[number] + ending]


def _answers(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table(heads, [[escape_cell(cell) or "(empty)" for cell in row] for row in rows])


def _quoted(prompt: Prompt) -> str:
    """Return a prompt as a quotation of one line."""
    if isinstance(prompt, str) or len(prompt) == 1:
        return f"> {escape_line(prompt if isinstance(prompt, str) else prompt[0]['content'], breaks=True)}"
    turns = [f"**{escape_cell(turn['role'])}:** {escape_cell(turn['content'])}" for turn in prompt]
    return "> " + "<br>".join(turns)


def _method(comparison: Comparison) -> str:
    entries = [f"- **{name}:** {escape_cell(text)}" for name, text in method(comparison).items()]
    models = [f"- **Model {escape_cell(model.name)}:** {escape_cell(model.path)}" for model in comparison.models]
    return "\n".join([*entries, *models])

"""The comparison as one HTML file that needs no network and runs no script; all that models or data say is escaped."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import NamedTuple

from rlhf_lightning.evaluation.curves import Plot
from rlhf_lightning.evaluation.report_samples import questions, samples
from rlhf_lightning.evaluation.report_tables import escape, measured, scores, section_body, training, verdicts
from rlhf_lightning.evaluation.report_words import SHOWN_SAMPLES, lede, method, title
from rlhf_lightning.evaluation.summary import Comparison

#: Parts of a report from which on a table of contents stands above them.
LISTED_PARTS = 5


class Part(NamedTuple):
    """A heading and the HTML below it."""

    title: str
    body: str


def render(comparison: Comparison, curves: Mapping[str, Sequence[Plot]], *, shown: int = SHOWN_SAMPLES) -> str:
    """Return the report.

    Args:
        comparison: What was measured.
        curves: Plots of training runs by the name of the run.
        shown: How many prompts to show with every model's answer; drawn by the seed, not chosen.
    """
    parts = _parts(comparison, curves, shown)
    style = files("rlhf_lightning.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    name = escape(title(comparison))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{name}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{name}</h1>
<p class="lede">{escape(lede(comparison))}</p>
{_contents(parts)}
{verdicts(comparison)}
{"".join(_placed(number, part) for number, part in enumerate(parts, 1))}
<footer>Written by rlhf_lightning, {escape(comparison.created)}. The numbers are in report.json, every answer in
samples.jsonl, the same in Markdown in report.md, beside this file.</footer>
</main>
</body>
</html>
"""


def _parts(comparison: Comparison, curves: Mapping[str, Sequence[Plot]], shown: int) -> list[Part]:
    """Return the parts of the report that have something to say, in their order."""
    parts = [
        Part("Measured", measured(comparison)),
        Part("Scores", scores(comparison)),
        *(Part(section.title, section_body(section, comparison)) for section in comparison.sections),
        Part("Training", training(curves)),
        Part("Questions", questions(comparison)),
        Part("Answers side by side", samples(comparison, shown)),
        Part("How it was measured", _method(comparison)),
    ]
    return [part for part in parts if part.body]


def _contents(parts: Sequence[Part]) -> str:
    if len(parts) < LISTED_PARTS:
        return ""
    items = "".join(
        f'<li><a href="#part-{number}">{escape(part.title)}</a></li>' for number, part in enumerate(parts, 1)
    )
    return f'<nav aria-label="Contents"><ol>{items}</ol></nav>'


def _placed(number: int, part: Part) -> str:
    heading = f'<h2 id="part-{number}">{escape(part.title)}</h2>'
    return f'<section aria-labelledby="part-{number}">{heading}{part.body}</section>'


def _method(comparison: Comparison) -> str:
    models = [(f"Model {model.name}", f"<code>{escape(model.path)}</code>") for model in comparison.models]
    entries = [*((name, escape(text)) for name, text in method(comparison).items()), *models]
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{text}</dd>" for name, text in entries)
    return f'<div class="card method"><dl>{listed}</dl></div>'

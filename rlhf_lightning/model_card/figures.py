"""The training curves as files beside the card: each an SVG that needs nothing else."""

import html
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.curves import Plot, plots_of
from rlhf_lightning.evaluation.plots import line_chart
from rlhf_lightning.model_card.files import write_text

FOLDER = "curves"
MAX_FIGURES = 6
_WIDTH, _HEIGHT, _HEAD, _SIDE = 344, 214, 30, 16
_RULE = re.compile(r"(@media [^{]*\(prefers[^{]*\{.*?\n\}|[^{}]+\{[^{}]*\})", re.DOTALL)


class CurveFile(NamedTuple):
    """One plot that was written.

    Attributes:
        title: What it shows.
        path: Its file, relative to the card.
        labels: The logged names that are drawn.
    """

    title: str
    path: str
    labels: list[str]


def write_curves(directory: Path, metrics: Sequence[Mapping[str, Any]]) -> list[CurveFile]:
    """Draw what a run has logged into ``curves/``.

    Args:
        directory: Folder of the card.
        metrics: As :func:`rlhf_lightning.loggers.read_metrics` returns them.

    Returns:
        What was written, in the order of the report, :data:`MAX_FIGURES` at most; a run that logged a single step has
        no curves.
    """
    if len(metrics) < 2:
        return []
    written: list[CurveFile] = []
    for plot in _plots(metrics)[:MAX_FIGURES]:
        name = re.sub(r"[^a-z0-9]+", "-", plot.title.lower()).strip("-")
        path = f"{FOLDER}/{len(written) + 1}-{name}.svg"
        (directory / FOLDER).mkdir(exist_ok=True)
        write_text(directory / path, standalone(plot))
        written.append(CurveFile(plot.title, path, [line.label for line in plot.series]))
    return written


def standalone(plot: Plot) -> str:
    """Return a plot as an SVG file of its own, with its title, for light and dark pages."""
    # The title says what is drawn; the legend, which has little room, says of which rows: rollout, train or val.
    series = [line._replace(label=line.label.partition("/")[0]) for line in plot.series]
    chart = line_chart(series, title=plot.title, width=_WIDTH, height=_HEIGHT)
    place = f'x="{_SIDE}" y="{_HEAD}" width="{_WIDTH}" height="{_HEIGHT}" overflow="visible"'
    inner = chart.replace("<svg ", f"<svg {place} ", 1)
    width, height = _WIDTH + 2 * _SIDE, _HEIGHT + _HEAD + 4
    title = html.escape(plot.title)
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{title}" '
        f'xmlns="http://www.w3.org/2000/svg"><style>{_style()}</style>'
        f'<rect width="{width}" height="{height}" rx="8" fill="var(--card)"/>'
        f'<text class="title" x="16" y="22">{title}</text>{inner}</svg>\n'
    )


def _plots(metrics: Sequence[Mapping[str, Any]]) -> list[Plot]:
    try:
        return [plot for plot in plots_of(metrics) if max(len(line.xs) for line in plot.series) > 1]
    except UserError:  # nothing that is drawn was logged
        return []


@cache
def _style() -> str:
    """Return of the report's style sheet what its plots need: the colours, light and dark, and the rules for SVG."""
    sheet = files("rlhf_lightning.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    wanted = re.compile(r"\s*(:root|@media [^{]*\(prefers|\.s\d|svg [.a-z])")
    rules = [rule.strip() for rule in _RULE.findall(sheet) if wanted.match(rule)]
    own = 'svg { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }'
    return "\n".join([*rules, own, "svg .title { font-size: 14px; font-weight: 620; fill: var(--ink); }"])

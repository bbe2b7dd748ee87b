"""The measured parts of the HTML report: what became of each model, tables with their intervals, figures."""

import html
from collections.abc import Mapping, Sequence

from rlhf_lightning.evaluation.curves import MAX_POINTS, Plot
from rlhf_lightning.evaluation.formatting import Kind, TableRow, ends, written
from rlhf_lightning.evaluation.plots import Distribution, interval_strip, line_chart
from rlhf_lightning.evaluation.report_words import MEASURED_NOTE, real_minus
from rlhf_lightning.evaluation.sections import Figure, Section, colors_of, distribution_figure
from rlhf_lightning.evaluation.statistics import Interval
from rlhf_lightning.evaluation.summary import Comparison, ModelSummary, headline

#: Others than the base that get their figures at the top of the report; of more, one sentence each.
SHOWN_VERDICTS = 3
#: Columns whose intervals are drawn beside the numbers; with more the drawing would be out of sight, and on paper the
#: letters get smaller.
DRAWN_COLUMNS = 4
#: Columns of numbers that fit on a phone; with more the rows of a table stand below one another as cards.
PHONE_COLUMNS = 2


def escape(text: str) -> str:
    """Write a text so that a page, or an attribute in it, shows it as it is."""
    return html.escape(text, quote=True)


def model_label(name: str) -> str:
    """Return a model's name behind its dot."""
    return f'<b class="model"><span class="dot"></span><span>{escape(name)}</span></b>'


def verdicts(comparison: Comparison) -> str:
    """Return what became of each model: a card with its figures, or of many models one card with a sentence each."""
    base, colors = comparison.base_summary, colors_of(comparison.names, comparison.base)
    others = [model for model in comparison.models if model.name != comparison.base]
    said = {model.name: escape(headline(model, base)).replace(" %", "&nbsp;%") for model in others}
    if len(others) > SHOWN_VERDICTS:
        lines = "".join(
            f'<li class="s{colors[name]}"><span class="dot"></span><span>{said[name]}</span></li>' for name in said
        )
        return f'<ul class="card verdicts">{lines}</ul>'
    cards = [
        f'<div class="card verdict s{colors[model.name]}"><p>{said[model.name]}</p>'
        f'<dl class="tiles">{"".join(_tiles(model, base, comparison.table, comparison.names))}</dl></div>'
        for model in others
    ]
    return "".join(cards)


def _tiles(model: ModelSummary, base: ModelSummary, table: Sequence[TableRow], names: Sequence[str]) -> list[str]:
    """Return the figures of a model that one looks at first: score, win rate, text metrics, KL."""
    own, bases = names.index(model.name), names.index(base.name)
    wanted = {"Score", "Win rate", "KL divergence", *model.metrics}
    return [
        _tile(row.label, row.cells[own], row.cells[bases], row.kind)
        for row in table
        if row.label in wanted and row.cells[own]
    ]


def _tile(label: str, value: Interval | float | None, before: Interval | float | None, kind: Kind) -> str:
    assert isinstance(value, Interval)
    was = ""
    if isinstance(before, Interval):
        was = f'<span class="from">{_number(written(before.mean, kind).removesuffix(" %"))} → </span>'
    low, high = ends(value, kind)
    return (
        f'<div><dt>{escape(label)}</dt><dd class="figure">{was}{_number(written(value.mean, kind))}</dd>'
        f'<dd class="range">{_number(low)} to {_number(high)}</dd></div>'
    )


def measured(comparison: Comparison) -> str:
    """Return the headline table."""
    colors = colors_of(comparison.names, comparison.base)
    return note(MEASURED_NOTE) + table(comparison.table, comparison.names, colors, label="Measured")


def section_body(section: Section, comparison: Comparison) -> str:
    """Return a section without its heading: note, table, figures."""
    colors = colors_of(comparison.names, comparison.base)
    rows = table(section.rows, section.columns, colors, label=section.title) if section.rows else ""
    return note(section.note) + rows + "".join(map(_figure, section.figures))


def note(text: str) -> str:
    """Return the small print below a heading; nothing for an empty text."""
    return f'<p class="note">{escape(text)}</p>' if text else ""


def table(rows: Sequence[TableRow], columns: Sequence[str], colors: Mapping[str, int], *, label: str) -> str:
    """Return a table that scrolls within its card.

    Args:
        rows: A cell for each column.
        columns: Their heads; names of models get their dots.
        colors: Number of the colour of each model.
        label: Read out by screen readers.
    """
    heads = "".join(_head(name, colors) for name in columns)
    drawn = [colors[name] for name in columns if name in colors]
    if not 2 <= len(drawn) == len(columns) <= DRAWN_COLUMNS or not any(map(_comparable, rows)):
        drawn = []
    many = len(columns) > PHONE_COLUMNS
    form = "many wide-table" if len(columns) > DRAWN_COLUMNS else "many" if many else "few"
    body = "".join(_row(row, columns if many else [], colors, drawn) for row in rows)
    strip = '<td class="strip"></td>' if drawn else ""
    return (
        f'<div class="card scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f'<table class="{form}"><thead><tr><td></td>{heads}{strip}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _head(name: str, colors: Mapping[str, int]) -> str:
    if name not in colors:
        return f'<th scope="col">{escape(name)}</th>'
    return f'<th scope="col" class="s{colors[name]}">{model_label(name)}</th>'


def _row(row: TableRow, named: Sequence[str], colors: Mapping[str, int], drawn: Sequence[int]) -> str:
    """Return a row; ``named`` are the columns of a table that becomes cards, ``drawn`` the colours of its intervals."""
    tags = [_named_cell(name, colors) for name in named] or ["<td"] * len(row.cells)
    cells = "".join(tag + _cell(cell, row.kind) for tag, cell in zip(tags, row.cells, strict=True))
    below = f"<small>{escape(row.note)}</small>" if row.note else ""
    strip = _strip(row, drawn) if drawn else ""
    return f'<tr><th scope="row">{escape(row.label)}{below}</th>{cells}{strip}</tr>'


def _named_cell(name: str, colors: Mapping[str, int]) -> str:
    color = f' class="s{colors[name]}"' if name in colors else ""
    return f'<td{color} data-of="{escape(name)}"'


def _cell(value: Interval | float | None, kind: Kind) -> str:
    """Return a cell without the beginning of its tag."""
    if value is None:
        return '><span class="none">–</span></td>'
    if not isinstance(value, Interval):
        return f"><b>{_number(written(value, kind))}</b></td>"
    low, high = ends(value, kind)
    return f"><b>{_number(written(value.mean, kind))}</b><small>{_number(low)} to {_number(high)}</small></td>"


def _number(text: str) -> str:
    return escape(real_minus(text))


def _comparable(row: TableRow) -> bool:
    return sum(isinstance(cell, Interval) for cell in row.cells) >= 2


def _strip(row: TableRow, colors: Sequence[int]) -> str:
    if not _comparable(row):
        return '<td class="strip"></td>'
    pairs = zip(row.cells, colors, strict=True)
    intervals = [(cell, color) for cell, color in pairs if isinstance(cell, Interval)]
    return f'<td class="strip">{interval_strip(intervals, title=f"Intervals of {row.label}")}</td>'


def scores(comparison: Comparison) -> str:
    """Return how the scores of each model are distributed, the base first; nothing where there are none."""
    colors, summaries = colors_of(comparison.names, comparison.base), {m.name: m for m in comparison.models}
    rows = []
    for answer in sorted(comparison.answers, key=lambda answer: answer.name != comparison.base):
        mean = summaries[answer.name].score
        if answer.scores is not None and mean is not None:
            rows.append(Distribution(answer.name, answer.scores.tolist(), mean, colors[answer.name]))
    if not rows:
        return ""
    others = f" The dashed outline repeats {comparison.base}." if len(rows) > 1 else ""
    names = ", ".join(row.label for row in rows)
    figure = distribution_figure(rows, title=f"Distribution of the score of {names}", x_label="score")
    said = f"Share of answers by score; the line is the mean, the shade its 95 % interval.{others}"
    return note(said) + _figure(figure._replace(title=""))


def _figure(figure: Figure) -> str:
    caption = f"<figcaption>{escape(figure.title)}</figcaption>" if figure.title else ""
    return (
        f'<figure class="card panel">{caption}<div class="wide">{figure.wide}</div>'
        f'<div class="narrow">{figure.narrow}</div></figure>'
    )


def training(curves: Mapping[str, Sequence[Plot]]) -> str:
    """Return the curves of each run, which can be folded; nothing where there are none."""
    if not curves:
        return ""
    runs = []
    for name, plots in curves.items():
        figures = [
            f'<figure class="card"><figcaption>{escape(plot.title)}</figcaption>'
            f"{line_chart(plot.series, title=f'{name}: {plot.title}')}</figure>"
            for plot in plots
        ]
        runs.append(
            f'<details open><summary><h3>{escape(name)}</h3></summary><div class="grid">{"".join(figures)}</div>'
            "</details>"
        )
    said = (
        f"As logged. A curve of more than {MAX_POINTS} points is averaged over neighbours; the shade is one standard "
        "deviation among them to either side."
    )
    return note(said) + "".join(runs)

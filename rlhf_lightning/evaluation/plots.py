"""Plots as SVG text, drawn by hand: no library, no script, colours from the page's style sheet.

Every colour is a class ``s0``, ``s1``, ... that the page defines for light and for dark. Numbers are rounded to a tenth
of a pixel; whatever text comes in is escaped.
"""

import html
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from rlhf_lightning.evaluation.formatting import fitting, plain
from rlhf_lightning.evaluation.statistics import Interval

COLORS = 10
_MARGIN_LEFT, _MARGIN_RIGHT, _AXIS_HEIGHT = 46, 14, 40
_NEGLIGIBLE = 1e-12


class Series(NamedTuple):
    """One line of a plot.

    Attributes:
        label: Its name in the legend.
        xs: Places on the x axis, ascending.
        ys: Values; one that is not finite leaves a gap.
        spread: How far the shade reaches above and below each value; empty for none.
        color: Number of its colour.
        bounds: Lower and upper end of the shade of each value, in place of a spread to both sides; empty for none.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    spread: Sequence[float] = ()
    color: int = 1
    bounds: Sequence[tuple[float, float]] = ()


class Distribution(NamedTuple):
    """One row of a stack of histograms.

    Attributes:
        label: Whose values.
        values: The values, finite, at least one.
        mean: Their mean with its interval.
        color: Number of its colour.
    """

    label: str
    values: Sequence[float]
    mean: Interval
    color: int


class Scale(NamedTuple):
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def nice_step(span: float, count: int) -> float:
    """Return the smallest of 1, 2, 2.5 and 5 times a power of ten of which about ``count`` cover ``span``.

    Example:
        >>> nice_step(10, 5), nice_step(0.9, 4), nice_step(7, 3)
        (2.0, 0.25, 2.5)
    """
    power = 10.0 ** math.floor(math.log10(span / count))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= span / count * (1 - 1e-9))


def nice_ticks(low: float, high: float, count: int = 5, *, slack: float = 0.0) -> list[float]:
    """Return round numbers from the last one not above ``low`` to the first one not below ``high``.

    Args:
        low: Smallest value.
        high: Largest value; where both are equal, a range around them is taken.
        count: About how many steps.
        slack: Share of a step by which a value may lie beyond the last tick.

    Example:
        >>> nice_ticks(0.3, 9.2)
        [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    if _as_good_as_equal(low, high):
        reach = abs(low) * 0.1 if abs(low) > _NEGLIGIBLE else 0.5
        low, high = low - reach, high + reach
    step = nice_step(high - low, count)
    first, last = math.floor(low / step + slack + 1e-9), math.ceil(high / step - slack - 1e-9)
    return _multiples(step, first, last)


def _as_good_as_equal(low: float, high: float) -> bool:
    return high - low <= max(_NEGLIGIBLE, 1e-9 * max(abs(low), abs(high)))


def _multiples(step: float, first: int, last: int) -> list[float]:
    """Return multiples of a step, without what floating point adds to them."""
    places = 6 - math.floor(math.log10(step))
    return [round(number * step, places) for number in range(first, last + 1)]


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """Return a tick's number with as many places as the steps need.

    Example:
        >>> tick_text(0.5, [0.0, 0.25, 0.5]), tick_text(20000.0, [0.0, 10000.0, 20000.0])
        ('0.50', '20k')
        >>> tick_text(0.0, [0.0, 0.00025]), tick_text(0.00025, [0.0, 0.00025])
        ('0', '0.00025')
    """
    step = min((b - a for a, b in pairwise(ticks)), default=1.0)
    if step < 1e-3:
        return f"{value:.3g}".replace("-0.", "−0.")
    if step >= 1000:
        return f"{value / 1000:g}k".replace("-", "−")
    places = next(places for places in range(5) if abs(step * 10**places - round(step * 10**places)) < 1e-6)
    return f"{value:.{places}f}".replace("-", "−")


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str = "step", width: int = 360, height: int = 214
) -> str:
    """Return a plot of lines with their shades, a legend where there are several, and axes with round ticks.

    Args:
        series: The lines; a line with a single value is a dot.
        title: Read out by screen readers.
        x_label: What the x axis counts.
        width: Pixels of the drawing, which the page may scale.
        height: Pixels of the drawing.

    Raises:
        ValueError: If there is no finite value.
    """
    points = [point for line in series for point in _points(line)]
    if not points:
        raise ValueError(f"line_chart: {title!r} has no finite value to draw; leave it out.")
    top = 26 if len(series) > 1 else 8
    y_ticks = nice_ticks(min(point.low for point in points), max(point.high for point in points), 4, slack=0.15)
    low_x, high_x = min(point.x for point in points), max(point.x for point in points)
    x = Scale(low_x, high_x if high_x > low_x else low_x + 1, _MARGIN_LEFT, width - _MARGIN_RIGHT)
    y = Scale(y_ticks[0], y_ticks[-1], height - _AXIS_HEIGHT, top)
    x_ticks = [tick for tick in nice_ticks(x.low, x.high, max(2, width // 80)) if x.low <= tick <= x.high]
    parts = [y_axis(y, y_ticks, x), x_axis(x, x_ticks, height - _AXIS_HEIGHT, x_label)]
    parts += [_line(line, x, y) for line in series]
    if len(series) > 1:
        parts.append(_legend(series, width))
    return svg(width, height, title, parts)


def interval_strip(intervals: Sequence[tuple[Interval, int]], *, title: str, width: int = 260) -> str:
    """Return intervals below one another on one scale, without an axis: to see which overlap.

    Args:
        intervals: Each with the number of its colour; at least one.
        title: Read out by screen readers.
        width: Pixels of the drawing, which the page may scale.
    """
    low, high = min(interval.low for interval, _ in intervals), max(interval.high for interval, _ in intervals)
    x = Scale(low, high, 6, width - 6) if high > low else Scale(low - 1, high + 1, 6, width - 6)
    parts = []
    for number, (interval, color) in enumerate(intervals):
        middle = 8 + 14 * number
        parts.append(
            f'<g class="s{color % COLORS}"><path class="grid" d="M0 {middle}H{width}"/>'
            f'<path class="whisker" d="M{x(interval.low):.1f} {middle}H{x(interval.high):.1f}"/>'
            f'<circle class="dot" cx="{x(interval.mean):.1f}" cy="{middle}" r="4"/></g>'
        )
    return svg(width, 2 + 14 * len(intervals), title, parts)


def histograms(
    rows: Sequence[Distribution], *, title: str, x_label: str, width: int = 1000, row_height: int = 120
) -> str:
    """Return histograms below one another on one x axis, each with its mean, the first one's outline behind the others.

    Args:
        rows: The distributions; the first is what the others are compared with.
        title: Read out by screen readers.
        x_label: What is distributed.
        width: Pixels of the drawing, which the page may scale.
        row_height: Pixels of one histogram.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("histograms: no rows came; give one distribution at least.")
    edges = _edges([value for row in rows for value in row.values])
    shares = [_shares(row.values, edges) for row in rows]
    x = Scale(edges[0], edges[-1], _MARGIN_LEFT, width - _MARGIN_RIGHT)
    y_ticks = nice_ticks(0.0, max(map(max, shares)), 2)
    parts = []
    for number, (row, share) in enumerate(zip(rows, shares, strict=True)):
        top = number * row_height
        y = Scale(y_ticks[0], y_ticks[-1], top + row_height - 6, top + 30)
        ghost = shares[0] if number else None
        parts.append(_histogram_row(row, share, ghost, edges, x, y, y_ticks))
    bottom = len(rows) * row_height
    ticks = [tick for tick in nice_ticks(edges[0], edges[-1], max(3, width // 110)) if edges[0] <= tick <= edges[-1]]
    parts.append(x_axis(x, ticks, bottom - 6, x_label))
    return svg(width, bottom + _AXIS_HEIGHT - 6, title, parts)


def _histogram_row(
    row: Distribution,
    shares: list[float],
    ghost: list[float] | None,
    edges: list[float],
    x: Scale,
    y: Scale,
    y_ticks: list[float],
) -> str:
    path = _steps(shares, edges, x, y)
    parts = [y_axis(y, y_ticks, x, percent=True)]
    parts.append(f'<path class="area" d="{path}Z"/><path class="line" d="{path}"/>')
    if ghost is not None:
        parts.append(f'<path class="ghost" d="{_steps(ghost, edges, x, y)}"/>')
    low, high = x(row.mean.low), x(row.mean.high)
    parts.append(
        f'<rect class="band" x="{low:.1f}" y="{y.end - 4:.1f}" width="{max(high - low, 0.5):.1f}" '
        f'height="{y.start - y.end + 4:.1f}"/>'
    )
    mean = x(row.mean.mean)
    parts.append(f'<line class="mean" x1="{mean:.1f}" x2="{mean:.1f}" y1="{y.end - 4:.1f}" y2="{y.start:.1f}"/>')
    figure = f"mean {plain(row.mean.mean)}".replace("-", "−")
    label = html.escape(fitting(row.label, x.end - x.start - 7 * len(figure), letter=8.4))
    parts.append(
        f'<text class="name" x="{x.start:.1f}" y="{y.end - 14:.1f}">{label}'
        f'<tspan class="tick" dx="8">{figure}</tspan></text>'
    )
    bars = zip(pairwise(edges), shares, strict=True)
    parts += [_hover(x(a), x(b), y, f"{row.label}: {100 * share:.1f} % in {a:g} to {b:g}") for (a, b), share in bars]
    return f'<g class="s{row.color % COLORS}">{"".join(parts)}</g>'


def _hover(left: float, right: float, y: Scale, text: str) -> str:
    return (
        f'<rect class="hover" x="{left:.1f}" y="{y.end:.1f}" width="{right - left:.1f}" height="{y.start - y.end:.1f}">'
        f"<title>{html.escape(text)}</title></rect>"
    )


def _edges(values: Sequence[float]) -> list[float]:
    """Return edges of bins of one round width that hold all values, the largest one too."""
    low, high = min(values), max(values)
    if _as_good_as_equal(low, high):
        return nice_ticks(low, high, 8)
    step = nice_step(high - low, 32)
    return _multiples(step, math.floor(low / step), math.floor(high / step) + 1)


def _shares(values: Sequence[float], edges: Sequence[float]) -> list[float]:
    counts = [0] * (len(edges) - 1)
    width = (edges[-1] - edges[0]) / len(counts)
    for value in values:
        place = int((value - edges[0]) / width + 1e-9)
        counts[min(max(place, 0), len(counts) - 1)] += 1
    return [count / len(values) for count in counts]


def _steps(shares: Sequence[float], edges: Sequence[float], x: Scale, y: Scale) -> str:
    parts = [f"M{x(edges[0]):.1f} {y.start:.1f}"]
    for share, edge in zip(shares, edges[1:], strict=True):
        parts.append(f"V{y(share):.1f}H{x(edge):.1f}")
    return "".join(parts) + f"V{y.start:.1f}"


class _Point(NamedTuple):
    """A value and the ends of its shade."""

    x: float
    y: float
    low: float
    high: float


def _points(line: Series) -> list[_Point]:
    """Return the finite values."""
    return [point for run in _unbroken(line) for point in run]


def _line(line: Series, x: Scale, y: Scale) -> str:
    parts = []
    for run in _unbroken(line):
        if line.spread or line.bounds:
            upper = [f"{x(point.x):.1f} {y(point.high):.1f}" for point in run]
            lower = [f"{x(point.x):.1f} {y(point.low):.1f}" for point in reversed(run)]
            parts.append(f'<path class="band" d="M{"L".join(upper + lower)}Z"/>')
        path = "L".join(f"{x(point.x):.1f} {y(point.y):.1f}" for point in run)
        parts.append(f'<path class="line" d="M{path}"/>')
        if len(line.ys) <= 16 or len(run) == 1:
            parts += [f'<circle class="dot" cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="2.6"/>' for p in run]
    parts += [
        f'<circle class="hover" cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="6"><title>'
        f"{html.escape(line.label)}: {p.y:.4g} at {p.x:g}</title></circle>"
        for p in _points(line)
    ]
    return f'<g class="s{line.color % COLORS}">{"".join(parts)}</g>'


def _unbroken(line: Series) -> list[list[_Point]]:
    """Return the stretches of a line between values that are not finite."""
    runs: list[list[_Point]] = [[]]
    for x, y, (low, high) in zip(line.xs, line.ys, _shade(line), strict=True):
        if math.isfinite(y):
            runs[-1].append(_Point(x, y, low, high))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _shade(line: Series) -> list[tuple[float, float]]:
    """Return the ends of the shade of each value; a spread that is not finite is none."""
    if line.bounds:
        return list(line.bounds)
    spread = [s if math.isfinite(s) else 0.0 for s in line.spread or [0.0] * len(line.ys)]
    return [(value - s, value + s) for value, s in zip(line.ys, spread, strict=True)]


def x_axis(x: Scale, ticks: Sequence[float], base: float, label: str, *, texts: Sequence[str] | None = None) -> str:
    """Return an x axis at the height ``base``; ``texts`` are the words of its ticks, ``None`` writes their numbers."""
    texts = [tick_text(tick, ticks) for tick in ticks] if texts is None else texts
    parts = [f'<line class="axis" x1="{x.start}" x2="{x.end}" y1="{base:.1f}" y2="{base:.1f}"/>']
    for tick, text in zip(ticks, texts, strict=True):
        place = f"{x(tick):.1f}"
        parts.append(f'<line class="axis" x1="{place}" x2="{place}" y1="{base:.1f}" y2="{base + 4:.1f}"/>')
        parts.append(f'<text class="tick" x="{place}" y="{base + 16:.1f}" text-anchor="middle">{text}</text>')
    middle, shown = (x.start + x.end) / 2, html.escape(fitting(label, x.end - x.start))
    parts.append(f'<text class="label" x="{middle:.1f}" y="{base + 32:.1f}" text-anchor="middle">{shown}</text>')
    return "".join(parts)


def y_axis(y: Scale, ticks: Sequence[float], x: Scale, *, percent: bool = False) -> str:
    """Return the rules across a plot at the heights of the ticks, with their numbers on the left."""
    parts = []
    for tick in ticks:
        place = f"{y(tick):.1f}"
        text = f"{100 * tick:g} %" if percent else tick_text(tick, ticks)
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{place}" y2="{place}"/>')
        parts.append(f'<text class="tick" x="{x.start - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{text}</text>')
    return "".join(parts)


def _legend(series: Sequence[Series], width: int) -> str:
    parts, left = [], float(_MARGIN_LEFT)
    room = (width - _MARGIN_LEFT) / len(series) - 21
    for line in series:
        label = fitting(line.label, room)
        parts.append(
            f'<g class="s{line.color % COLORS}"><path class="line" d="M{left:.1f} 10h16"/></g>'
            f'<text class="label" x="{left + 21:.1f}" y="14">{html.escape(label)}</text>'
        )
        left += 21 + 6.6 * len(label) + 18
    return "".join(parts)


def svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """Return a drawing of some parts; ``title`` is read out by screen readers."""
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )

"""A plot of points with an interval in each direction, on a root scale: a score against what it costs in KL."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

from rlhf_lightning.evaluation.formatting import plain
from rlhf_lightning.evaluation.plots import COLORS, Scale, nice_ticks, svg, x_axis, y_axis
from rlhf_lightning.evaluation.statistics import Interval

_LEFT, _RIGHT, _AXIS_HEIGHT, _LEGEND_ROW = 46, 26, 40, 19


class Point(NamedTuple):
    """One point.

    Attributes:
        label: What it is, told when it is pointed at.
        x: Place and its interval; parts below 0 are drawn at 0.
        y: Height and its interval.
        mark: Few letters written beside it; empty for none.
    """

    label: str
    x: Interval
    y: Interval
    mark: str = ""


class Group(NamedTuple):
    """Points of one colour.

    Attributes:
        label: Its name in the legend.
        points: At least one, in the order in which a line joins them.
        color: Number of its colour.
        joined: Whether a line goes through them.
        dashed: Whether that line is dashed.
    """

    label: str
    points: Sequence[Point]
    color: int
    joined: bool = False
    dashed: bool = False


class RootScale(Scale):
    """A map from values of at least 0 to pixels, by their square root."""

    def __call__(self, value: float) -> float:
        """Return the pixel of a value; of one below 0 that of 0."""
        return self.start + math.sqrt(max(value, 0.0) / self.high) * (self.end - self.start)


def root_ticks(scale: RootScale, apart: float) -> list[float]:
    """Return 0 and those of 1, 2, 5, 10, ... that stand at least ``apart`` pixels from one another, the largest first.

    Example:
        >>> root_ticks(RootScale(0.0, 20.0, 0.0, 400.0), 60)
        [0.0, 0.5, 2.0, 5.0, 10.0, 20.0]
    """
    power = 10.0 ** math.floor(math.log10(scale.high))
    kept: list[float] = []
    while True:
        for factor in (5, 2, 1):
            tick = factor * power
            if scale(tick) - scale.start < apart:
                return [0.0, *reversed(kept)]
            if tick <= scale.high * (1 + 1e-9) and (not kept or scale(kept[-1]) - scale(tick) >= apart):
                kept.append(tick)
        power /= 10


def scatter(groups: Sequence[Group], *, title: str, x_label: str, width: int = 1000, height: int = 420) -> str:
    """Return a plot of points with bars for their intervals, on an x axis by the root of the value.

    Args:
        groups: What is drawn, at least one point in all.
        title: Read out by screen readers.
        x_label: What the x axis measures; at least 0.
        width: Pixels of the drawing, which the page may scale.
        height: Pixels of the drawing, without the legend.

    Raises:
        ValueError: If there is no point.
    """
    points = [point for group in groups for point in group.points]
    if not points:
        raise ValueError(f"scatter: {title!r} has no point to draw; leave it out.")
    legend, top = _legend(groups, width)
    bottom = top + height - _AXIS_HEIGHT
    ends = [end for point in points for end in (point.y.low, point.y.high)]
    ticks = nice_ticks(min(ends), max(ends), 5, slack=0.05)
    farthest = max(max(point.x.high for point in points), 1e-3)
    x, y = RootScale(0.0, farthest, _LEFT, width - _RIGHT), Scale(ticks[0], ticks[-1], bottom, top)
    places = root_ticks(x, 44)
    parts = [y_axis(y, ticks, x), x_axis(x, places, bottom, x_label, texts=[f"{tick:g}" for tick in places])]
    parts += [_drawn(group, x, y) for group in groups]
    return svg(width, bottom + _AXIS_HEIGHT, title, [*parts, legend])


def _drawn(group: Group, x: Scale, y: Scale) -> str:
    parts = []
    if group.joined and len(group.points) > 1:
        path = "L".join(f"{x(point.x.mean):.1f} {y(point.y.mean):.1f}" for point in group.points)
        parts.append(f'<path class="line" d="M{path}"{_dashes(group)}/>')
    for point in group.points:
        across, up = x(point.x.mean), y(point.y.mean)
        parts.append(
            f'<path class="whisker" d="M{x(point.x.low):.1f} {up:.1f}H{x(point.x.high):.1f}'
            f'M{across:.1f} {y(point.y.low):.1f}V{y(point.y.high):.1f}"/>'
            f'<circle class="dot" cx="{across:.1f}" cy="{up:.1f}" r="4"/>'
        )
        if point.mark:
            side, anchor = (-7, "end") if across > x.end - 40 else (7, "start")
            place = f'x="{across + side:.1f}" y="{up + 15:.1f}" text-anchor="{anchor}"'
            parts.append(f'<text class="tick" {place}>{html.escape(point.mark)}</text>')
        told = f"{point.label}: {plain(point.y.mean)} at {plain(max(point.x.mean, 0.0))}"
        parts.append(
            f'<circle class="hover" cx="{across:.1f}" cy="{up:.1f}" r="10"><title>{html.escape(told)}</title></circle>'
        )
    return f'<g class="s{group.color % COLORS}">{"".join(parts)}</g>'


def _dashes(group: Group) -> str:
    return ' stroke-dasharray="4 4"' if group.dashed else ""


def _legend(groups: Sequence[Group], width: int) -> tuple[str, int]:
    """Return the legend in as many rows as it needs, and the height below which the plot may begin."""
    parts, left, row = [], float(_LEFT), 0
    for group in groups:
        reach = 25 + 6.6 * len(group.label) + 18
        if left + reach > width and left > _LEFT:
            left, row = float(_LEFT), row + 1
        middle = 10 + _LEGEND_ROW * row
        line = f'<path class="line" d="M{left:.1f} {middle}h20"{_dashes(group)}/>' if group.joined else ""
        parts.append(
            f'<g class="s{group.color % COLORS}">{line}<circle class="dot" cx="{left + 10:.1f}" cy="{middle}" r="4"/>'
            f'</g><text class="label" x="{left + 25:.1f}" y="{middle + 4}">{html.escape(group.label)}</text>'
        )
        left += reach
    return "".join(parts), 12 + _LEGEND_ROW * (row + 1)

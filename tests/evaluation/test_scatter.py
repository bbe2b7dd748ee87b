import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from rlhf_lightning.evaluation.scatter import Group, Point, RootScale, root_ticks, scatter
from rlhf_lightning.evaluation.statistics import Interval


def at(value: float, reach: float = 0.0) -> Interval:
    return Interval(value, value - reach, value + reach)


def drawn(*groups: Group, width: int = 1000) -> ElementTree.Element:
    return ElementTree.fromstring(scatter(groups, title="Score against KL", x_label="nats", width=width))


def places(picture: ElementTree.Element, kind: str) -> list[tuple[float, float]]:
    found = picture.iter("{http://www.w3.org/2000/svg}circle")
    return [(float(one.get("cx", "")), float(one.get("cy", ""))) for one in found if one.get("class") == kind]


def test_points_stand_by_the_root_of_their_place() -> None:
    points = [Point(f"step {kl}", at(kl), at(score)) for kl, score in ((0.0, 0.0), (4.0, 1.0), (16.0, 3.0))]
    (x0, y0), (x1, y1), (x2, y2) = places(drawn(Group("ppo", points, 1)), "hover")
    assert (x2 - x0) / (x1 - x0) == pytest.approx(2.0, abs=0.01)  # roots 0, 2 and 4
    assert (y0 - y2) / (y0 - y1) == pytest.approx(3.0, abs=0.01)


def test_bars_reach_over_the_intervals_and_never_below_nothing() -> None:
    picture = scatter(
        [Group("a", [Point("a", Interval(1.0, -1.0, 4.0), Interval(2.0, 1.0, 5.0))], 1)], title="", x_label=""
    )
    across = re.search(r'class="whisker" d="M([\d.]+) ([\d.]+)H([\d.]+)M([\d.]+) ([\d.]+)V([\d.]+)"', picture)
    assert across is not None
    left, height, right, middle, low, high = map(float, across.groups())
    assert (left, right) == (46.0, 1000 - 26.0)  # 0, as there is no divergence below it, and the largest
    assert middle == pytest.approx(left + (right - left) / 2)  # root 1 of root 4
    assert (low - height) / (height - high) == pytest.approx(1 / 3, abs=0.01)


def test_a_line_goes_through_points_that_are_joined() -> None:
    points = [Point(name, at(kl), at(kl)) for name, kl in (("a", 1.0), ("b", 2.0))]
    joined, dashed, apart = (
        scatter([Group("ppo", points, 1, joined=line, dashed=dash)], title="", x_label="")
        for line, dash in ((True, False), (True, True), (False, False))
    )
    assert joined.count('class="line"') == 2  # and in the legend
    assert (joined.count("stroke-dasharray"), dashed.count("stroke-dasharray")) == (0, 2)
    assert 'class="line"' not in apart


def test_a_legend_that_is_too_long_goes_on_below() -> None:
    groups = [Group(f"model number {number}", [Point("a", at(1.0), at(1.0))], number) for number in range(6)]
    (wide,), (narrow,) = ({round(y) for _, y in places(drawn(*groups, width=width), "hover")} for width in (1000, 340))
    assert narrow == wide + 2 * 19  # two labels to a row


def test_whatever_text_comes_in_is_escaped() -> None:
    evil = "<script>&\"'"
    text = scatter([Group(evil, [Point(evil, at(1.0), at(1.0), evil)], 1)], title=evil, x_label=evil)
    assert "<script" not in text
    ElementTree.fromstring(text)


def test_points_that_are_all_one_are_drawn_and_none_are_refused() -> None:
    assert places(drawn(Group("base", [Point("base", at(0.0), at(1.0))], 0)), "hover")
    with pytest.raises(ValueError, match="has no point to draw"):
        scatter([], title="t", x_label="x")


@pytest.mark.parametrize("high", [0.001, 0.3, 1.0, 7.0, 19.9, 4321.0])
def test_ticks_stand_apart_and_within(high: float) -> None:
    scale = RootScale(0.0, high, 0.0, 300.0)
    ticks = root_ticks(scale, 44)
    assert ticks[0] == 0
    assert len(ticks) >= 3
    assert ticks[-1] <= high * 1.001
    assert all(scale(after) - scale(before) >= 44 for before, after in pairwise(ticks))

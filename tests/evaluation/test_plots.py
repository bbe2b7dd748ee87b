import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.evaluation.plots import (
    Distribution,
    Scale,
    Series,
    histograms,
    interval_strip,
    line_chart,
    nice_ticks,
    tick_text,
)
from rlhf_lightning.evaluation.statistics import Interval

NAME = "{http://www.w3.org/2000/svg}"


def of_class(svg: str, name: str) -> list[ET.Element]:
    return [element for element in ET.fromstring(svg).iter() if element.get("class") == name]


def points(path: str) -> list[tuple[float, float]]:
    found = re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)
    return [(float(x), float(y)) for x, y in found]


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_surround_the_range_in_equal_round_steps(low: float, span: float, count: int) -> None:
    ticks = nice_ticks(low, low + span, count)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step
    assert ticks[-1] >= low + span - 1e-6 * step - 1e-9 * abs(low)
    assert 2 <= len(ticks) <= 2 * count + 3


@pytest.mark.parametrize("value", [0.0, 3.0, -2e-7])
def test_a_single_value_gets_a_range_around_it(value: float) -> None:
    ticks = nice_ticks(value, value)
    assert ticks[0] <= value <= ticks[-1]
    assert ticks[0] < ticks[-1]


def test_slack_lets_a_value_reach_a_little_beyond_the_ticks() -> None:
    assert nice_ticks(-0.2, 12.1, 4, slack=0.15) == [0.0, 5.0, 10.0, 15.0]
    assert nice_ticks(-0.2, 10.4, 4, slack=0.15) == [0.0, 5.0, 10.0]


def test_ticks_are_written_with_the_places_they_need() -> None:
    assert [tick_text(tick, [-0.5, 0.0, 0.5]) for tick in (-0.5, 0.0, 0.5)] == ["−0.5", "0.0", "0.5"]
    assert tick_text(2e-5, [0.0, 1e-5, 2e-5]) == "2e-05"
    assert tick_text(1500.0, [0.0, 500.0, 1000.0, 1500.0]) == "1500"


def test_a_line_goes_through_its_values() -> None:
    svg = line_chart([Series("loss", [0, 10], [1.0, 3.0])], title="loss", width=360, height=214)
    (line,) = of_class(svg, "line")
    # x runs from 46 to 346; y ticks are 1, 1.5 ... 3, from the axis at 174 up to 8.
    assert points(line.get("d", "")) == [(46.0, 174.0), (346.0, 8.0)]
    assert [text.text for text in of_class(svg, "tick")][:5] == ["1.0", "1.5", "2.0", "2.5", "3.0"]


def test_the_shade_reaches_as_far_as_the_spread() -> None:
    svg = line_chart([Series("loss", [0, 1], [0.0, 0.0], [1.0, 1.0])], title="loss")
    (band,) = of_class(svg, "band")
    heights = sorted({y for _, y in points(band.get("d", ""))})
    assert heights == [8.0, 174.0]  # the ticks reach from -1 to 1, as the shade does


def test_a_value_that_is_not_finite_leaves_a_gap() -> None:
    svg = line_chart([Series("loss", [0, 1, 2, 3, 4], [1.0, 2.0, math.nan, 2.0, 1.0])], title="loss")
    assert [len(points(line.get("d", ""))) for line in of_class(svg, "line")] == [2, 2]
    assert "nan" not in svg.lower()


def test_several_lines_get_a_legend_and_their_own_colours() -> None:
    svg = line_chart([Series("a", [0, 1], [0, 1], color=1), Series("b", [0, 1], [1, 0], color=2)], title="both")
    assert [text.text for text in of_class(svg, "label")] == ["step", "a", "b"]
    assert {group.get("class") for group in ET.fromstring(svg).iter(f"{NAME}g")} == {"s1", "s2"}


def test_a_single_step_is_a_dot() -> None:
    svg = line_chart([Series("score", [7], [0.5])], title="score")
    assert len(of_class(svg, "dot")) == 1


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="no finite value"):
        line_chart([Series("loss", [0], [math.nan])], title="loss")
    with pytest.raises(ValueError, match="no rows"):
        histograms([], title="none", x_label="score")


def test_histogram_bars_are_the_shares() -> None:
    rows = [Distribution("base", [0.0, 0.0, 0.0, 1.0], Interval(0.25, 0.0, 0.75), 0)]
    svg = histograms(rows, title="scores", x_label="score")
    said = [title.text or "" for title in ET.fromstring(svg).iter(f"{NAME}title")]
    full = [text for text in said if " 0.0 %" not in text]
    assert full == ["base: 75.0 % in 0 to 0.05", "base: 25.0 % in 1 to 1.05"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=40))
def test_every_value_falls_into_one_bar(values: list[float]) -> None:
    mean = sum(values) / len(values)
    svg = histograms([Distribution("x", values, Interval(mean, mean, mean), 1)], title="t", x_label="score")
    shares = [float(match) for match in re.findall(r"<title>x: ([\d.]+) %", svg)]
    assert sum(shares) == pytest.approx(100, abs=0.06 * len(shares))


def test_the_first_histogram_stands_behind_the_others() -> None:
    interval = Interval(0.5, 0.4, 0.6)
    rows = [Distribution("base", [0.0, 1.0], interval, 0), Distribution("ppo", [1.0, 1.0], interval, 1)]
    assert len(of_class(histograms(rows, title="scores", x_label="score"), "ghost")) == 1


def test_intervals_share_one_scale() -> None:
    svg = interval_strip([(Interval(0.0, -1.0, 1.0), 0), (Interval(3.0, 1.0, 3.0), 1)], title="score", width=212)
    dots = [float(dot.get("cx", "nan")) for dot in of_class(svg, "dot")]
    assert dots == [56.0, 206.0]  # -1 to 3 on 6 to 206


def test_equal_values_are_drawn_in_the_middle() -> None:
    svg = interval_strip([(Interval(1.0, 1.0, 1.0), 0), (Interval(1.0, 1.0, 1.0), 1)], title="same", width=260)
    assert [dot.get("cx") for dot in of_class(svg, "dot")] == ["130.0", "130.0"]


def test_text_is_escaped() -> None:
    evil = '<script>alert("x")</script>&'
    interval = Interval(0.5, 0.4, 0.6)
    drawings = [
        line_chart([Series(evil, [0], [1]), Series("b", [0], [2])], title=evil, x_label=evil),
        histograms([Distribution(evil, [0.0, 1.0], interval, 0)], title=evil, x_label=evil),
        interval_strip([(interval, 0)], title=evil),
    ]
    for svg in drawings:
        assert "<script" not in svg
        assert ET.fromstring(svg).get("aria-label") == evil


def test_scale_is_linear() -> None:
    assert [Scale(0, 4, 100, 0)(value) for value in (0, 1, 4)] == [100, 75, 0]


def test_bounds_shade_further_to_one_side() -> None:
    line = Series("share", [0.0, 1.0], [0.5, 0.75], bounds=[(0.0, 0.5), (0.5, 1.0)])
    svg = line_chart([line], title="t", height=214)
    (band,) = of_class(svg, "band")
    heights = [y for _, y in points(band.get("d") or "")]
    y = Scale(0.0, 1.0, 174, 8)  # all that lies in the shade is within the ticks
    assert heights == [pytest.approx(y(value), abs=0.06) for value in (0.5, 1.0, 0.5, 0.0)]

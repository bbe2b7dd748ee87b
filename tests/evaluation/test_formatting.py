import math

import pytest

from rlhf_lightning.evaluation.formatting import Kind, TableRow, ends, plain, text_table, written
from rlhf_lightning.evaluation.statistics import Interval


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (-0.0, "0.00"),
        (-0.004, "-0.004"),
        (0.5, "0.50"),
        (-12.345, "-12.3"),
        (99999.0, "99999"),
        (0.0007, "0.00070"),
        (1e-7, "0.000"),
    ],
)
def test_numbers_keep_about_three_figures(value: float, text: str) -> None:
    assert plain(value) == text


def test_what_is_not_finite_is_still_text() -> None:
    assert [plain(value) for value in (math.nan, math.inf, -math.inf)] == ["–", "∞", "-∞"]


@pytest.mark.parametrize(
    ("kind", "text"),
    [("number", "0.25 [-0.01, 0.51]"), ("difference", "+0.25 [-0.01, +0.51]"), ("share", "25.0 % [-1.0, 51.0]")],
)
def test_intervals_are_written_by_kind(kind: Kind, text: str) -> None:
    assert written(Interval(0.25, -0.01, 0.51), kind) == text


def test_ends_have_the_places_of_the_mean() -> None:
    assert ends(Interval(10.0, 9.96, 100.04), "number") == ("10.0", "100.0")


def test_columns_of_the_text_table_line_up() -> None:
    rows = [
        TableRow("Score", "mean", "number", [Interval(1.0, 0.5, 1.5), Interval(-10.0, -20.0, 0.0)]),
        TableRow("Win rate", "ties half", "share", [None, 0.5]),
    ]
    lines = text_table(rows, ["base", "ppo"]).splitlines()
    assert [len(line) for line in lines] == [len(lines[0])] * 3
    assert lines[1].startswith("Score (mean)")
    assert lines[2].endswith("50.0 %")

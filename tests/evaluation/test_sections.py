import pytest

from rlhf_lightning.evaluation.formatting import TableRow
from rlhf_lightning.evaluation.plots import Distribution
from rlhf_lightning.evaluation.sections import Section, distribution_figure
from rlhf_lightning.evaluation.statistics import Interval


def test_what_report_json_holds_of_a_section() -> None:
    row = TableRow("Accuracy", "share", "share", [Interval(0.5, 0.25, 0.75), None])
    section = Section("pairs", "Pairs", "As measured.", ["base", "dpo"], [row], data={"margins": [Interval(1, 0, 2)]})
    assert section.as_dict() == {
        "title": "Pairs",
        "note": "As measured.",
        "columns": ["base", "dpo"],
        "rows": [
            {
                "label": "Accuracy",
                "note": "share",
                "kind": "share",
                "cells": [{"mean": 0.5, "low": 0.25, "high": 0.75}, None],
            }
        ],
        "data": {"margins": [{"mean": 1, "low": 0, "high": 2}]},
    }


def test_every_row_has_a_cell_for_each_column() -> None:
    with pytest.raises(ValueError, match="row 'Accuracy' has 1 cells for 2 columns"):
        Section("pairs", "Pairs", "", ["base", "dpo"], [TableRow("Accuracy", "share", "share", [0.5])])


def test_a_figure_is_drawn_in_two_widths() -> None:
    figure = distribution_figure([Distribution("base", [0.0, 1.0], Interval(0.5, 0, 1), 0)], title="M", x_label="nats")
    assert 'viewBox="0 0 1000 ' in figure.wide
    assert 'viewBox="0 0 340 ' in figure.narrow
    assert figure.title == "M"

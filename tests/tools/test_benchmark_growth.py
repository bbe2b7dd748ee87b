"""The benchmark of growth: its places take turns, cost is by token, and memory is each place's own."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree as ET

import pytest

from rlhf_lightning.models.loading import resolve_model
from rlhf_lightning.rollout import decoding


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(decoding, "DecodeLoop", decoding.DecodeLoop)  # which a side replaces by its own
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    return importlib.import_module("benchmark_growth")


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, arguments: str) -> list[dict[str, float]]:
    shape = ["--shape", str(resolve_model("builtin:demo")), "--change", "num_hidden_layers=1"]
    files = ["--output", str(folder / "rows.json"), "--plot", str(folder / "plot.svg")]
    monkeypatch.setattr(sys, "argv", ["benchmark_growth.py", *arguments.split(), *shape, *files])
    tool.main()
    return list(json.loads((folder / "rows.json").read_text())["rows"])


def test_iterations_are_those_of_one_run(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(tool, monkeypatch, tmp_path, "--axis iterations --values 1 3 --batch 2 --prompt 4 --response 4")
    assert [row["value"] for row in rows] == [1, 3]
    assert rows[0]["least"] == rows[0]["most"]
    assert rows[1]["least"] < rows[1]["seconds"] < rows[1]["most"]  # of three
    assert rows[1]["least"] <= rows[0]["seconds"] <= rows[1]["most"]  # which the first is one of
    assert len(list(ET.parse(tmp_path / "plot.svg").iter())) > 10
    assert "iterations  seconds a thousand tokens" in capsys.readouterr().out


@pytest.mark.slow
def test_a_wider_model_costs_more_memory_and_less_by_the_parameter(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At these sizes an iteration takes about the same time: calls, not products."""
    arguments = "--axis model --values 32 256 --batch 2 --prompt 4 --response 4 --rounds 2"
    small, large = run(tool, monkeypatch, tmp_path, arguments)
    assert small["seconds"] > 3 * large["seconds"]
    assert large["mib"] > small["mib"]

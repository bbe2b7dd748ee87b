"""What the ends of runs are compared by tells them apart."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch


def test_one_bit_of_one_tensor_is_a_difference(load_tool: Callable[[str], ModuleType]) -> None:
    tool = load_tool("run_ends")
    ends = [
        {"checkpoint": tool.flat({"state_dict": {"a": torch.tensor(weight)}, "steps": [1, 2]}), "metrics": []}
        for weight in (0.1, 0.1, 0.1000001)
    ]
    assert tool.differences(ends[0], ends[1]) == []
    assert tool.differences(ends[2], ends[0]) == ["/state_dict/a"]
    assert tool.differences({**ends[0], "metrics": ["{}"]}, ends[0]) == ["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["sft", "ppo"])
def test_a_run_that_was_killed_about_its_saves_and_logs_comes_to_the_same_files(module: str) -> None:
    tool = Path(__file__).parents[2] / "tools" / "kill_runs.py"
    stops = ["--kills=8", "--terms=3", "--places", "save", "step", "log"]
    run = subprocess.run([sys.executable, str(tool), "--modules", module, *stops], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("runs equal") == 2

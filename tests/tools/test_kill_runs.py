"""Runs that are stopped at random moments end as if they had not been; what is compared tells runs apart."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOOL = Path(__file__).parents[2] / "tools" / "kill_runs.py"


@pytest.mark.slow
def test_stopped_runs_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--modules", "ppo", "--kills", "4", "--terms", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SIGKILL ppo     4 stops" in done.stdout
    assert "SIGTERM ppo     2 stops" in done.stdout


def test_one_bit_of_one_tensor_is_a_difference(load_tool: Callable[[str], ModuleType]) -> None:
    tool = load_tool("kill_runs")
    ends = [
        {"checkpoint": tool.flat({"state_dict": {"a": torch.tensor(weight)}, "steps": [1, 2]}), "metrics": []}
        for weight in (0.1, 0.1, 0.1000001)
    ]
    assert tool.differences(ends[0], ends[1]) == []
    assert tool.differences(ends[2], ends[0]) == ["/state_dict/a"]
    assert tool.differences({**ends[0], "metrics": ["{}"]}, ends[0]) == ["metrics"]

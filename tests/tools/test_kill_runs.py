"""What the ends of runs are compared by tells them apart."""

from collections.abc import Callable
from types import ModuleType

import torch


def test_one_bit_of_one_tensor_is_a_difference(load_tool: Callable[[str], ModuleType]) -> None:
    tool = load_tool("kill_runs")
    ends = [
        {"checkpoint": tool.flat({"state_dict": {"a": torch.tensor(weight)}, "steps": [1, 2]}), "metrics": []}
        for weight in (0.1, 0.1, 0.1000001)
    ]
    assert tool.differences(ends[0], ends[1]) == []
    assert tool.differences(ends[2], ends[0]) == ["/state_dict/a"]
    assert tool.differences({**ends[0], "metrics": ["{}"]}, ends[0]) == ["metrics"]

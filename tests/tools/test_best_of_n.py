"""What J is made of, and what is said of texts."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("best_of_n")


def test_j_is_the_score_less_the_price_of_the_kl(tool: ModuleType) -> None:
    means = {"score": torch.tensor([1.0, 3.0]), "kl": torch.tensor([10.0, 20.0])}
    row = tool.summary(means, ["a b a b", "c d"], 0.05)  # J: 1 - 0.5 and 3 - 1; pairs ab ba ab cd
    assert row["J"][0] == pytest.approx(1.25)
    assert row["J"][1] == pytest.approx(0.5)  # all resamples lie between the smallest and the largest
    assert row["J"][2] == pytest.approx(2.0)
    assert row["distinct_2"] == pytest.approx(3 / 4)


def test_a_text_that_says_things_again_has_fewer_different_word_pairs(tool: ModuleType) -> None:
    assert tool.own_distinct_2("the cat the cat") == pytest.approx(2 / 3)
    assert tool.own_distinct_2("the cat sat") == 1
    assert tool.own_distinct_2("cat") == tool.own_distinct_2("") == 1

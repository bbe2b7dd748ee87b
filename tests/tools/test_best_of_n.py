"""Best-of-n from more than n responses, and what J is made of."""

import itertools
import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from rlhf_lightning.errors import UserError


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("best_of_n")


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_weights_give_the_mean_over_all_subsets_of_the_best(tool: ModuleType, n: int) -> None:
    scores = torch.tensor([[0.3, -1.0, 2.5, 0.7, 0.1], [4.0, 3.0, 2.0, 1.0, 0.0]])
    other = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 1.0, 4.0, 2.0, 3.0]])  # a number that goes with a response
    weights = tool.best_of_n_weights(scores, n)
    for row in range(2):
        best = [max(rows, key=lambda at: float(scores[row, at])) for rows in itertools.combinations(range(5), n)]
        for values in (scores, other):
            expected = sum(float(values[row, at]) for at in best) / len(best)
            assert float((weights * values)[row].sum()) == pytest.approx(expected, abs=1e-6)


def test_weights_of_equal_scores_still_sum_to_one(tool: ModuleType) -> None:
    assert tool.best_of_n_weights(torch.zeros(3, 6), 4).sum(dim=1).tolist() == pytest.approx([1.0] * 3)


def test_more_than_there_are_is_refused(tool: ModuleType) -> None:
    with pytest.raises(UserError, match=r"best-of-4 needs at least 4 responses .* there are 3"):
        tool.best_of_n_weights(torch.zeros(1, 3), 4)


def test_groups_give_their_best_and_no_fewer_texts_than_a_model(tool: ModuleType) -> None:
    scores = torch.tensor([[3.0, 1.0, 0.0, 2.0, 9.0], [0.0, 1.0, 3.0, 2.0, 9.0]])  # the fifth is in no pair
    assert tool.best_of_groups(scores, 2, most=2) == [0, 3, 6, 7]
    assert tool.best_of_groups(scores, 2, most=1) == [0, 6]
    assert tool.best_of_groups(scores, 2, most=3) == []


def test_best_of_one_costs_nothing_and_more_costs_less_than_log_n(tool: ModuleType) -> None:
    assert tool.best_of_n_kl(1) == 0
    assert tool.best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)
    assert all(tool.best_of_n_kl(n) < tool.best_of_n_kl(n + 1) < math.log(n + 1) for n in range(1, 20))


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

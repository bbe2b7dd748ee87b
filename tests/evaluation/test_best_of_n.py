import itertools
import math

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.best_of_n import best_of_groups, best_of_n_kl, best_of_n_weights


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_weights_give_the_mean_over_all_subsets_of_the_best(n: int) -> None:
    scores = torch.tensor([[0.3, -1.0, 2.5, 0.7, 0.1], [4.0, 3.0, 2.0, 1.0, 0.0]])
    other = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 1.0, 4.0, 2.0, 3.0]])  # a number that goes with a response
    weights = best_of_n_weights(scores, n)
    for row in range(2):
        best = [max(rows, key=lambda at: float(scores[row, at])) for rows in itertools.combinations(range(5), n)]
        for values in (scores, other):
            expected = sum(float(values[row, at]) for at in best) / len(best)
            assert float((weights * values)[row].sum()) == pytest.approx(expected, abs=1e-6)


def test_weights_of_equal_scores_still_sum_to_one() -> None:
    assert best_of_n_weights(torch.zeros(3, 6), 4).sum(dim=1).tolist() == pytest.approx([1.0] * 3)


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match=r"best-of-4 needs at least 4 responses .* there are 3"):
        best_of_n_weights(torch.zeros(1, 3), 4)


def test_groups_give_their_best_and_no_fewer_texts_than_a_model() -> None:
    scores = torch.tensor([[3.0, 1.0, 0.0, 2.0, 9.0], [0.0, 1.0, 3.0, 2.0, 9.0]])  # the fifth is in no pair
    assert best_of_groups(scores, 2, most=2) == [0, 3, 6, 7]
    assert best_of_groups(scores, 2, most=1) == [0, 6]
    assert best_of_groups(scores, 2, most=3) == []


def test_best_of_one_costs_nothing_and_more_costs_less_than_log_n() -> None:
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)
    assert all(best_of_n_kl(n) < best_of_n_kl(n + 1) < math.log(n + 1) for n in range(1, 20))

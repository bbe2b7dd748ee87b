import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.evaluation.statistics import (
    bootstrap_mean,
    bootstrap_ratio,
    correlation,
    distinct_n,
    mean_interval,
    paired_difference,
    quantiles,
    share_interval,
    win_points,
    win_rate,
)

numbers = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30).map(torch.tensor)


def test_bootstrap_interval_of_two_values_by_hand() -> None:
    # A resample of {0, 1} has mean 0, 0.5 or 1 with probability 1/4, 1/2, 1/4: both tails hold more than 2.5 %.
    assert bootstrap_mean(torch.tensor([0.0, 1.0])) == (0.5, 0.0, 1.0)


def test_bootstrap_interval_is_that_of_the_normal_distribution_for_many_values() -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    found = bootstrap_mean(values)
    reach = 1.96 * float(values.std()) / math.sqrt(2000)
    assert found.high - found.mean == pytest.approx(reach, rel=0.06)
    assert found.mean - found.low == pytest.approx(reach, rel=0.06)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says() -> None:
    draws = torch.rand(200, 60, generator=torch.Generator().manual_seed(1))
    covered = sum(bootstrap_mean(row, resamples=400).contains(0.5) for row in draws)
    assert 0.90 <= covered / 200 <= 0.99


def test_the_seed_fixes_the_resamples() -> None:
    values = torch.arange(50.0).square()
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


@settings(max_examples=30, deadline=None)
@given(numbers, st.floats(-5, 5))
def test_bootstrap_moves_with_the_values_and_contains_their_mean(values: torch.Tensor, shift: float) -> None:
    found, moved = bootstrap_mean(values, resamples=100), bootstrap_mean(values.double() + shift, resamples=100)
    assert torch.tensor(moved).double() == pytest.approx(torch.tensor(found).double() + shift, abs=1e-4)
    assert float(values.min()) - 1e-6 <= found.low <= found.high <= float(values.max()) + 1e-6


def test_paired_difference_is_narrower_than_the_spread_of_what_both_share() -> None:
    shared = 100 * torch.randn(100, generator=torch.Generator().manual_seed(0))
    found = paired_difference(shared.double() + 1, shared)
    assert found.low == pytest.approx(1.0)
    assert found.high == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    # Published values of Wilson's interval without continuity correction, at 95 %.
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (1, 30, 0.0059, 0.1667)],
)
def test_wilson_interval(wins: int, count: int, low: float, high: float) -> None:
    values = torch.tensor([1.0] * wins + [0.0] * (count - wins))
    found = share_interval(values)
    assert found == pytest.approx((wins / count, low, high), abs=1e-4)
    assert mean_interval(values) == found


def test_mean_interval_resamples_what_is_no_share() -> None:
    values = torch.tensor([0.0, 1.0, 0.5])
    assert mean_interval(values) == bootstrap_mean(values)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20))
def test_win_rates_of_both_sides_add_up_to_one(pairs: list[tuple[int, int]]) -> None:
    ours, theirs = torch.tensor(pairs).float().unbind(dim=1)
    assert win_rate(ours, theirs).mean + win_rate(theirs, ours).mean == pytest.approx(1.0)
    assert win_rate(ours, ours).mean == 0.5
    assert torch.equal(win_points(ours, theirs), 1 - win_points(theirs, ours))


def test_quantiles_match_the_definition() -> None:
    found = quantiles(torch.arange(101.0), {"q05": 0.05, "median": 0.5, "top": 1.0})
    assert found == pytest.approx({"q05": 5.0, "median": 50.0, "top": 100.0})


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b c"], 1, 1.0),
        (["a a a a"], 2, 1 / 3),
        (["a b", "b a", "A B"], 2, 2 / 3),  # case does not count, and no pair reaches from text to text
        (["one", "two"], 2, math.nan),
    ],
)
def test_distinct_n_by_hand(texts: list[str], n: int, expected: float) -> None:
    assert distinct_n(texts, n) == pytest.approx(expected, nan_ok=True)


def test_distinct_n_does_not_depend_on_the_order_of_texts() -> None:
    texts = ["the cat sat", "the cat ran", "a dog"]
    assert distinct_n(texts, 2) == distinct_n(texts[::-1], 2)


@pytest.mark.parametrize("values", [torch.empty(0), torch.tensor([1.0, torch.nan]), torch.ones(2, 2)])
def test_what_has_no_mean_is_refused(values: torch.Tensor) -> None:
    for function in (bootstrap_mean, share_interval, mean_interval):
        with pytest.raises(ValueError, match="value"):
            function(values)


def test_wrong_shapes_and_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        paired_difference(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="outside"):
        share_interval(torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="n is 0"):
        distinct_n(["a"], 0)


def test_bootstrap_ratio_of_two_rows_by_hand() -> None:
    # Resamples of (-1 of 1, -9 of 3) give -1, -10 / 4 and -3, with probability 1/4, 1/2, 1/4.
    assert bootstrap_ratio(torch.tensor([-1.0, -9.0]), torch.tensor([1, 3])) == (-2.5, -3.0, -1.0)


def test_bootstrap_ratio_over_ones_is_the_bootstrap_of_the_mean() -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(0))
    assert bootstrap_ratio(values, torch.ones(40), seed=5) == pytest.approx(bootstrap_mean(values, seed=5))


def test_bootstrap_ratio_is_that_of_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    above, below = torch.randn(30, generator=generator), torch.randint(1, 20, (30,), generator=generator)
    draws = torch.randint(30, (8000, 30), generator=generator)
    numerators, denominators = above.tolist(), below.tolist()
    ratios = sorted(
        sum(numerators[row] for row in rows) / sum(denominators[row] for row in rows) for rows in draws.tolist()
    )
    found = bootstrap_ratio(above, below, resamples=8000)
    spread = ratios[7800] - ratios[200]
    assert found.mean == pytest.approx(float(above.sum() / below.sum()))
    assert found.low == pytest.approx(ratios[200], abs=0.05 * spread)
    assert found.high == pytest.approx(ratios[7800], abs=0.05 * spread)


def test_bootstrap_ratio_refuses_a_denominator_of_nothing() -> None:
    with pytest.raises(ValueError, match="a denominator is not above 0"):
        bootstrap_ratio(torch.ones(2), torch.tensor([1, 0]))


def test_correlation_is_that_of_torch_and_its_interval_that_of_fisher() -> None:
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(400, generator=generator)
    b = 0.5 * a + torch.randn(400, generator=generator)
    found = correlation(a, b)
    assert found is not None
    assert found.mean == pytest.approx(float(torch.corrcoef(torch.stack([a, b]))[0, 1]), abs=1e-6)
    reach = 1.96 / math.sqrt(397)
    assert found.low == pytest.approx(math.tanh(math.atanh(found.mean) - reach), abs=0.02)
    assert found.high == pytest.approx(math.tanh(math.atanh(found.mean) + reach), abs=0.02)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_there_is_no_correlation_with_a_constant(constant: float) -> None:
    assert correlation(torch.arange(7.0), torch.full((7,), constant)) is None
    assert correlation(torch.full((7,), constant), torch.arange(7.0)) is None

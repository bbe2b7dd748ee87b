import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.evaluation.calibration import best_temperature, calibrate, reliability_bins

margin_lists = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=30)


def logit(share: float) -> float:
    return math.log(share / (1 - share))


def test_by_hand() -> None:
    # Confidences 0.6 (right, wrong), 0.9 (right, right, right, wrong), in bins [0.6, 0.7) and [0.9, 1].
    margins = [logit(0.62), -logit(0.62), logit(0.92), logit(0.92), logit(0.92), -logit(0.92)]
    found = calibrate(torch.tensor(margins, dtype=torch.float64), bins=5)
    first, second = found.bins
    assert [first.low, first.high, second.low, second.high] == pytest.approx([0.6, 0.7, 0.9, 1.0])
    assert (first.pairs, first.share.mean, second.pairs, second.share.mean) == (2, 0.5, 4, 0.75)
    assert [first.confidence, second.confidence] == pytest.approx([0.62, 0.92])
    assert found.expected_error == pytest.approx((2 * 0.12 + 4 * 0.17) / 6)
    assert found.brier.mean == pytest.approx((0.38**2 + 0.62**2 + 3 * 0.08**2 + 0.92**2) / 6)
    assert found.log_loss.mean == pytest.approx(-math.log(0.62 * 0.38 * 0.92**3 * 0.08) / 6)
    assert found.log_loss_at_temperature < found.log_loss.mean
    assert found.temperature > 1  # too sure


def test_a_tie_is_half_right_with_the_least_confidence() -> None:
    (only,) = reliability_bins(torch.zeros(3))
    assert (only.confidence, only.share.mean, only.pairs) == (0.5, 0.5, 3)


def test_margins_drawn_from_what_they_state_are_calibrated() -> None:
    generator = torch.Generator().manual_seed(0)
    gaps = 3 * torch.randn(6000, generator=generator, dtype=torch.float64)
    won = torch.rand(6000, generator=generator) < gaps.sigmoid()
    found = calibrate(torch.where(won, gaps, -gaps))
    assert found.expected_error < 0.02
    assert found.temperature == pytest.approx(1.0, abs=0.08)
    assert sum(each.share.contains(each.confidence) for each in found.bins) >= 8
    twice = calibrate(torch.where(won, 2 * gaps, -2 * gaps))
    assert twice.expected_error > 0.05
    assert twice.temperature == pytest.approx(2 * found.temperature)


@settings(max_examples=60, deadline=None)
@given(margin_lists, st.floats(0.1, 10))
def test_the_best_temperature_is_the_best_of_many_and_moves_with_the_scale(values: list[float], scale: float) -> None:
    margins = torch.tensor(values, dtype=torch.float64)
    found = best_temperature(margins)
    assert best_temperature(scale * margins) == pytest.approx(scale * found, rel=1e-6)
    if 0 < found < math.inf:
        losses = [-torch.nn.functional.logsigmoid(margins / (found * f)).mean() for f in (0.5, 0.99, 1, 1.01, 2)]
        assert min(losses) >= losses[2] - 1e-12


def test_the_best_temperature_has_limits() -> None:
    assert best_temperature(torch.tensor([1.0, 2.0])) == 0.0  # all right: ever surer is ever better
    assert best_temperature(torch.tensor([1.0, 0.0])) == 0.0
    assert best_temperature(torch.tensor([1.0, -1.0])) == math.inf  # no better than a coin
    assert best_temperature(torch.tensor([0.0])) == math.inf
    assert calibrate(torch.tensor([1.0, 2.0])).log_loss_at_temperature == 0.0
    assert calibrate(torch.tensor([1.0, 0.0])).log_loss_at_temperature == pytest.approx(math.log(2) / 2)
    assert calibrate(torch.tensor([1.0, -1.0])).log_loss_at_temperature == pytest.approx(math.log(2))


@settings(max_examples=40, deadline=None)
@given(margin_lists, st.integers(1, 12))
def test_bins_hold_every_pair_once_and_their_edges_hold_their_confidence(values: list[float], bins: int) -> None:
    found = reliability_bins(torch.tensor(values), bins=bins)
    assert sum(each.pairs for each in found) == len(values)
    assert all(each.low - 1e-9 <= each.confidence <= each.high + 1e-9 for each in found)


def test_there_must_be_a_bin() -> None:
    with pytest.raises(ValueError, match="bins is 0"):
        calibrate(torch.ones(2), bins=0)

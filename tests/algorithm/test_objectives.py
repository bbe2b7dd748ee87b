import math

import pytest
import torch

from rlhf_lightning.algorithm.objectives import (
    ClippedObjective,
    ClippedValueObjective,
    FixedLength,
    MinibatchSize,
    SequenceMean,
    TokenMean,
)
from rlhf_lightning.errors import UserError

MASK = torch.tensor([[True, True, False]])
WEIGHTS = MASK / 4  # the minibatch has 4 tokens


def test_policy_objective_by_hand() -> None:
    # ε 0.1, advantages 1: ratios 1.5 and 0.5 give max(-1.5, -1.1) = -1.1 and -0.5, over the 4 tokens of the minibatch.
    result = ClippedObjective(clip_range=0.1).loss(
        logprobs=torch.tensor([[1.5, 0.5, 9.0]]).log(),
        old_logprobs=torch.zeros(1, 3),
        advantages=torch.ones(1, 3),
        response_mask=MASK,
        token_weights=WEIGHTS,
    )
    assert result.loss.item() == pytest.approx(-1.6 / 4)
    assert result.clipped_sum.item() == 1


def test_value_objective_by_hand() -> None:
    # ε 0.5, V_old 0: V 1, R 2 -> ½ · 1.5² = 1.125;  V 0.25, R 1 -> ½ · 0.75² = 0.28125
    tensors = {
        "values": torch.tensor([[1.0, 0.25, 9.0]]),
        "old_values": torch.zeros(1, 3),
        "returns": torch.tensor([[2.0, 1.0, 9.0]]),
        "response_mask": MASK,
        "token_weights": WEIGHTS,
    }
    clipped = ClippedValueObjective(coef=0.7, value_clip_range=0.5)
    assert clipped.loss(**tensors).loss.item() == pytest.approx((1.125 + 0.28125) / 4)
    assert clipped.coef == 0.7  # applied by who adds the losses up
    plain = ClippedValueObjective(value_clip_range=None)
    assert plain.loss(**tensors).loss.item() == pytest.approx((0.5 + 0.28125) / 4)


def test_defaults_are_those_of_the_sources() -> None:
    assert ClippedObjective().clip_range == 0.2
    assert (ClippedValueObjective().coef, ClippedValueObjective().value_clip_range) == (0.1, 0.2)


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"clip_range is 0\.0; it must be above 0"):
        ClippedObjective(clip_range=0.0)
    with pytest.raises(UserError, match=r"coef is -1\.0; it must be at least 0"):
        ClippedValueObjective(coef=-1.0)
    with pytest.raises(UserError, match=r"value_clip_range is 0\.0; it must be above 0, or null"):
        ClippedValueObjective(value_clip_range=0.0)


def token(ratio: float, advantage: float, **settings: float) -> tuple[float, float, float]:
    """Return loss, slope by the log-probability and 1 if clipped, of one token."""
    logprobs = torch.tensor([[ratio]]).log().requires_grad_()
    result = ClippedObjective(**settings).loss(  # type: ignore[arg-type]
        logprobs=logprobs,
        old_logprobs=torch.zeros(1, 1),
        advantages=torch.full((1, 1), advantage),
        response_mask=torch.ones(1, 1).bool(),
        token_weights=torch.ones(1, 1),
    )
    (slope,) = torch.autograd.grad(result.loss, logprobs)
    return round(result.loss.item(), 5), round(slope.item(), 5), result.clipped_sum.item()


def test_clip_range_high_moves_the_upper_edge_alone() -> None:
    assert token(1.25, 1.0) == (-1.2, 0.0, 1)
    assert token(1.25, 1.0, clip_range_high=0.3) == (-1.25, -1.25, 0)
    assert token(1.5, 1.0, clip_range_high=0.3) == (-1.3, 0.0, 1)
    assert token(0.75, -1.0, clip_range_high=0.3) == token(0.75, -1.0) == (0.8, 0.0, 1)


def test_dual_clip_bounds_the_loss_of_a_bad_token_that_became_likelier() -> None:
    assert token(5.0, -2.0) == (10.0, 10.0, 0)
    assert token(5.0, -2.0, dual_clip=3.0) == (6.0, 0.0, 1)  # at most 3 · 2, and no slope
    assert token(2.9, -2.0, dual_clip=3.0) == (5.8, 5.8, 0)
    assert token(5.0, 2.0, dual_clip=3.0) == token(5.0, 2.0) == (-2.4, 0.0, 1)  # good tokens as before


def test_log_ratio_guard_leaves_a_token_out_and_counts_it() -> None:
    logprobs = torch.tensor([[0.5, 0.1, 3.0]], requires_grad=True)
    tensors = {
        "logprobs": logprobs,
        "old_logprobs": torch.zeros(1, 3),
        "advantages": -torch.ones(1, 3),
        "response_mask": MASK,
        "token_weights": WEIGHTS,
    }
    free, guarded = ClippedObjective().loss(**tensors), ClippedObjective(log_ratio_guard=0.4).loss(**tensors)
    assert free.guarded_sum.item() == 0
    assert guarded.guarded_sum.item() == 1  # the third is under the mask
    torch.testing.assert_close(free.loss, torch.tensor([0.5, 0.1]).exp().sum() / 4)
    torch.testing.assert_close(guarded.loss, torch.tensor(0.1).exp() / 4)
    (slope,) = torch.autograd.grad(guarded.loss, logprobs)
    torch.testing.assert_close(slope, torch.tensor([[0.0, math.exp(0.1) / 4, 0.0]]))
    assert guarded.ratio_sum.item() == pytest.approx(math.exp(0.1))


def test_normalizations_by_hand() -> None:
    """A minibatch of 6 tokens in 2 responses, of which this micro-batch holds the 4 of one."""
    mask, size = torch.tensor([[True] * 4 + [False]]), MinibatchSize(torch.tensor(6.0), torch.tensor(2.0))
    assert TokenMean().weights(mask, size)[0].tolist() == pytest.approx([1 / 6] * 4 + [0])
    assert SequenceMean().weights(mask, size)[0].tolist() == pytest.approx([1 / 8] * 4 + [0])
    assert FixedLength(16).weights(mask, size)[0].tolist() == pytest.approx([1 / 32] * 4 + [0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_range_high": -1.0}, r"clip_range_high is -1\.0; it must be above 0"),
        ({"dual_clip": 1.0}, r"dual_clip is 1\.0; it must be above 1"),
        ({"log_ratio_guard": 0.0}, r"log_ratio_guard is 0\.0; it must be above 0"),
        ({"target_kl": 0.0}, r"target_kl is 0\.0; it must be above 0"),
        ({"entropy_coef": -0.1}, r"entropy_coef is -0\.1; it must be at least 0"),
        ({"entropy_coef": math.nan}, "entropy_coef is nan; it must be at least 0"),
        ({"clip_range": math.nan}, "clip_range is nan"),
    ],
)
def test_options_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ClippedObjective(**settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="FixedLength: length is 0"):
        FixedLength(0)

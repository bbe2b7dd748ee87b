import pytest
import torch

from rlhf_lightning.algorithm.objectives import ClippedObjective, ClippedValueObjective
from rlhf_lightning.errors import UserError

MASK, COUNT = torch.tensor([[True, True, False]]), torch.tensor(4.0)


def test_policy_objective_by_hand() -> None:
    # ε 0.1, advantages 1: ratios 1.5 and 0.5 give max(-1.5, -1.1) = -1.1 and -0.5, over the 4 tokens of the minibatch.
    result = ClippedObjective(clip_range=0.1).loss(
        logprobs=torch.tensor([[1.5, 0.5, 9.0]]).log(),
        old_logprobs=torch.zeros(1, 3),
        advantages=torch.ones(1, 3),
        response_mask=MASK,
        num_tokens=COUNT,
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
        "num_tokens": COUNT,
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

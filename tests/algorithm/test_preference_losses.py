import math
from typing import Any

import pytest
import torch

from rlhf_lightning.algorithm.preference_losses import (
    HingeLoss,
    IPOLoss,
    Pairs,
    PreferenceLoss,
    RobustLoss,
    SigmoidLoss,
)
from rlhf_lightning.errors import UserError

#: One pair whose log-ratios differ by 2 nats: 3 of a chosen response of 4 tokens, 1 of a rejected one of 2.
PAIR = Pairs(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([4]), torch.tensor([2]))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # beta and every other option change the number.
        (SigmoidLoss(), softplus(-0.2)),
        (SigmoidLoss(beta=0.5), softplus(-1.0)),
        (SigmoidLoss(beta=0.5, label_smoothing=0.25), 0.75 * softplus(-1.0) + 0.25 * softplus(1.0)),
        (RobustLoss(), (0.9 * softplus(-0.2) - 0.1 * softplus(0.2)) / 0.8),
        (RobustLoss(beta=0.5), (0.9 * softplus(-1.0) - 0.1 * softplus(1.0)) / 0.8),
        (RobustLoss(beta=0.5, label_smoothing=0.25), (0.75 * softplus(-1.0) - 0.25 * softplus(1.0)) / 0.5),
        (RobustLoss(beta=0.5, label_smoothing=0.0), softplus(-1.0)),
        (IPOLoss(), (2 - 5) ** 2),
        (IPOLoss(beta=0.5), (2 - 1) ** 2),
        (IPOLoss(beta=0.5, per_token=True), (3 / 4 - 1 / 2 - 1) ** 2),
        (HingeLoss(), 0.8),
        (HingeLoss(beta=0.25), 0.5),
    ],
)
def test_a_pair_by_hand(loss: PreferenceLoss, expected: float) -> None:
    assert loss.loss(PAIR).tolist() == pytest.approx([expected], rel=1e-6)


@pytest.mark.parametrize("kind", [SigmoidLoss, RobustLoss, IPOLoss, HingeLoss])
@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_beta_must_be_positive(kind: Any, beta: float) -> None:
    with pytest.raises(UserError, match=rf"{kind.__name__}: beta is {beta}; it must be above 0\."):
        kind(beta)


@pytest.mark.parametrize("kind", [SigmoidLoss, RobustLoss])
@pytest.mark.parametrize("share", [-0.1, 0.5, math.nan])
def test_label_smoothing_is_a_share_below_a_half(kind: Any, share: float) -> None:
    with pytest.raises(UserError, match=rf"{kind.__name__}: label_smoothing is {share}; it must lie in \[0, 0.5\)"):
        kind(label_smoothing=share)


def test_a_loss_of_ones_own_is_a_method() -> None:
    class Squared(PreferenceLoss):
        def loss(self, pairs: Pairs) -> torch.Tensor:
            return (pairs.chosen - pairs.rejected).square()

    assert Squared(beta=1.0).loss(PAIR).tolist() == [4]
    with pytest.raises(NotImplementedError):
        PreferenceLoss().loss(PAIR)

from collections.abc import Callable

import pytest
import torch

from rlhf_lightning.functional.reward_losses import center_loss, rating_loss


def test_center_loss_by_hand() -> None:
    # (1 + 2)², (-1 + 1)², (0.5 - 2)²
    losses = center_loss(torch.tensor([1.0, -1.0, 0.5]), torch.tensor([2.0, 1.0, -2.0]))
    assert losses.tolist() == [9, 0, 2.25]


def test_center_loss_pulls_both_scores_by_the_same_amount() -> None:
    chosen, rejected = torch.tensor([1.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    center_loss(chosen, rejected).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.tolist() == rejected.grad.tolist() == [6]  # 2 (1 + 2): their difference stays


def test_rating_loss_by_hand() -> None:
    assert rating_loss(torch.tensor([1.0, -1.0]), torch.tensor([3.0, -1.5])).tolist() == [4, 0.25]


@pytest.mark.parametrize("loss", [center_loss, rating_loss])
def test_gradients_are_those_of_finite_differences(loss: Callable[..., torch.Tensor]) -> None:
    scores = torch.randn(4, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    other = scores.flip(0).clone()
    leaf = scores.clone().requires_grad_()
    loss(leaf, other).sum().backward()
    assert leaf.grad is not None
    step = 1e-2  # exact for a square, up to rounding
    numeric = (loss(scores + step, other) - loss(scores - step, other)) / (2 * step)
    torch.testing.assert_close(leaf.grad, numeric, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("loss", [center_loss, rating_loss])
def test_low_precision_is_squared_in_float32_and_shapes_must_agree(loss: Callable[..., torch.Tensor]) -> None:
    assert loss(torch.ones(2).bfloat16(), torch.ones(2).bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(1,\) differ"):
        loss(torch.ones(2), torch.ones(1))

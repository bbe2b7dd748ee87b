"""By hand from the papers' formulas, in Python's own floats, and by the limits that they have."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_lightning.functional.preference import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    length_desensitised_logprobs,
    robust_dpo_loss,
)
from rlhf_lightning.functional.sequences import length_mask

margins = st.floats(-20, 20)
betas = st.floats(0.01, 2)
shares = st.floats(0, 0.45)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def pairs(*differences: float) -> dict[str, Any]:
    """Log-ratios that differ by these, the rejected one -1.5."""
    rejected = torch.full((len(differences),), -1.5)
    return {"chosen_logratios": rejected + torch.tensor(differences), "rejected_logratios": rejected}


def smoothed(margin: float, beta: float, share: float) -> float:
    return -(1 - share) * log_sigmoid(beta * margin) - share * log_sigmoid(-beta * margin)


def robust(margin: float, beta: float, share: float) -> float:
    return (-(1 - share) * log_sigmoid(beta * margin) + share * log_sigmoid(-beta * margin)) / (1 - 2 * share)


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[float], float]]] = {
    "sigmoid": (lambda **both: dpo_loss(**both, beta=0.3), lambda d: smoothed(d, 0.3, 0)),
    "smoothed": (lambda **both: dpo_loss(**both, beta=0.3, label_smoothing=0.2), lambda d: smoothed(d, 0.3, 0.2)),
    "robust": (lambda **both: robust_dpo_loss(**both, beta=0.3, label_smoothing=0.2), lambda d: robust(d, 0.3, 0.2)),
    "ipo": (lambda **both: ipo_loss(**both, beta=0.3), lambda d: (d - 1 / 0.6) ** 2),
    "hinge": (lambda **both: hinge_loss(**both, beta=0.3), lambda d: max(0.0, 1 - 0.3 * d)),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("difference", [-4.0, 0.0, 0.5, 7.0])
def test_loss_and_gradient_of_a_pair(name: str, difference: float) -> None:
    """The gradient against central differences of the formula in float64, of opposite sign for the two sides."""
    loss, formula = LOSSES[name]
    both = {side: tensor.requires_grad_() for side, tensor in pairs(difference).items()}
    result = loss(**both)
    assert result.shape == (1,)
    assert result.item() == pytest.approx(formula(difference), rel=1e-6, abs=1e-6)
    result.sum().backward()
    slope = (formula(difference + 1e-5) - formula(difference - 1e-5)) / 2e-5
    gradients: list[Any] = [tensor.grad for tensor in both.values()]
    assert [gradient.item() for gradient in gradients] == pytest.approx([slope, -slope], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name: str) -> None:
    loss, formula = LOSSES[name]
    result = loss(chosen_logratios=torch.tensor([3.0]).bfloat16(), rejected_logratios=torch.tensor([1.0]).bfloat16())
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(formula(2.0), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_unequal_shapes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"chosen has shape \(2,\) and rejected \(1,\)"):
        LOSSES[name][0](chosen_logratios=torch.zeros(2), rejected_logratios=torch.zeros(1))


def test_equal_log_ratios() -> None:
    equal = pairs(0.0)
    assert dpo_loss(**equal).item() == pytest.approx(math.log(2))
    assert dpo_loss(**equal, label_smoothing=0.3).item() == pytest.approx(math.log(2))
    assert robust_dpo_loss(**equal, label_smoothing=0.3).item() == pytest.approx(math.log(2))
    assert hinge_loss(**equal).item() == 1
    assert ipo_loss(**equal, beta=0.25).item() == 4  # (1 / 0.5)²


@given(margin=margins, beta=betas, share=shares)
def test_robust_is_unbiased_under_flipped_labels(margin: float, beta: float, share: float) -> None:
    """(1 - ε) L(chosen, rejected) + ε L(rejected, chosen) is plain DPO's loss on the right labels."""
    both = pairs(margin)
    flipped = {"chosen_logratios": both["rejected_logratios"], "rejected_logratios": both["chosen_logratios"]}
    right, wrong = (robust_dpo_loss(**given, beta=beta, label_smoothing=share).item() for given in (both, flipped))
    expected = dpo_loss(**both, beta=beta).item()
    assert (1 - share) * right + share * wrong == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_smoothing_changes_where_the_margin_stops(share: float) -> None:
    """d/dx of -(1 - ε) log σ(x) - ε log σ(-x) is σ(x) - (1 - ε): zero at log((1 - ε)/ε)."""
    best = math.log((1 - share) / share)
    chosen = torch.tensor([best / 0.5]).requires_grad_()
    dpo_loss(chosen_logratios=chosen, rejected_logratios=torch.zeros(1), beta=0.5, label_smoothing=share).backward()
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(0, abs=1e-6)


def test_a_margin_of_one_ends_the_hinge() -> None:
    assert hinge_loss(**pairs(2.0, 10.0, 11.0), beta=0.1).tolist() == pytest.approx([0.8, 0.0, 0.0], abs=1e-6)


def test_extreme_log_ratios_stay_finite() -> None:
    huge = pairs(2000.0, -2000.0)
    assert dpo_loss(**huge, beta=1).tolist() == [0, 2000]
    assert robust_dpo_loss(**huge, beta=1, label_smoothing=0.25).tolist() == [-1000, 3000]


class TestLengthDesensitised:
    LOGPROBS = torch.tensor([[-1.0, -2.0, -4.0], [-1.0, -3.0, torch.nan]])
    MASK = length_mask(torch.tensor([3, 2]))

    def weighed(self, alpha: float, shared: list[int]) -> list[float]:
        return length_desensitised_logprobs(
            logprobs=self.LOGPROBS, response_mask=self.MASK, shared_lengths=torch.tensor(shared), alpha=alpha
        ).tolist()

    @pytest.mark.parametrize(("alpha", "expected"), [(1.0, -7.0), (0.5, -5.0), (0.0, -3.0)])
    def test_alpha_changes_the_weight_of_the_excess(self, alpha: float, expected: float) -> None:
        assert self.weighed(alpha, [2, 2]) == [expected, -4.0]  # the shorter row has no excess

    def test_shared_lengths_decide_what_is_excess(self) -> None:
        assert self.weighed(0.5, [1, 1]) == [-1 - 3, -1 - 1.5]
        assert self.weighed(0.5, [3, 3]) == [-7, -4]

    def test_the_gradient_is_the_weight_and_nothing_under_the_mask(self) -> None:
        logprobs = self.LOGPROBS.clone().requires_grad_()
        length_desensitised_logprobs(
            logprobs=logprobs, response_mask=self.MASK, shared_lengths=torch.tensor([2, 2]), alpha=0.25
        ).sum().backward()
        assert logprobs.grad is not None
        assert logprobs.grad.tolist() == [[1, 1, 0.25], [1, 1, 0]]

    def test_shapes_are_checked(self) -> None:
        with pytest.raises(ValueError, match=r"shared_lengths \(1,\)"):
            length_desensitised_logprobs(
                logprobs=self.LOGPROBS, response_mask=self.MASK, shared_lengths=torch.tensor([2])
            )


class TestKTO:
    LOGRATIOS = torch.tensor([3.0, -2.0, 0.5, 4.0])
    GOOD = torch.tensor([True, True, False, False])

    def formula(self, r: float, good: bool, z: float, beta: float, d: float, u: float) -> float:
        """Return λ_y - v(x, y) after eq. 8, term by term."""
        weight, sign = (d, 1) if good else (u, -1)
        return weight - weight / (1 + math.exp(-sign * beta * (r - z)))

    @pytest.mark.parametrize(
        "options", [(1.0, 0.1, 1.0, 1.0), (0.0, 0.1, 1.0, 1.0), (1.0, 0.7, 1.0, 1.0), (1.0, 0.1, 2.0, 0.5)]
    )
    def test_loss_and_gradient_by_hand_under_every_option(self, options: tuple[float, float, float, float]) -> None:
        z, beta, d, u = options
        logratios = self.LOGRATIOS.clone().requires_grad_()
        losses = kto_loss(
            logratios=logratios,
            desirable=self.GOOD,
            reference_point=torch.tensor(z),
            beta=beta,
            desirable_weight=d,
            undesirable_weight=u,
        )
        rows = list(zip(self.LOGRATIOS.tolist(), self.GOOD.tolist(), strict=True))
        expected = [self.formula(r, good, z, beta, d, u) for r, good in rows]
        assert losses.tolist() == pytest.approx(expected, rel=1e-5)
        losses.sum().backward()
        step = 1e-5
        slopes = [
            (self.formula(r + step, good, z, beta, d, u) - self.formula(r - step, good, z, beta, d, u)) / (2 * step)
            for r, good in rows
        ]
        assert logratios.grad is not None
        assert logratios.grad.tolist() == pytest.approx(slopes, rel=1e-4)
        assert [slope < 0 for slope in slopes] == self.GOOD.tolist()

    def test_limits(self) -> None:
        losses = kto_loss(
            logratios=torch.tensor([5.0, 1e4, -1e4, 1e4, -1e4]),
            desirable=torch.tensor([True, True, True, False, False]),
            reference_point=torch.tensor(5.0),
            desirable_weight=2.0,
            undesirable_weight=3.0,
        )
        assert losses.tolist() == [1, 0, 2, 3, 0]

    def test_reference_point_is_a_mean_without_gradient_and_never_negative(self) -> None:
        logratios = torch.tensor([1.0, -0.5]).requires_grad_()
        point = kto_reference_point(logratios)
        assert point.item() == 0.25
        assert not point.requires_grad
        assert kto_reference_point(torch.tensor([0.5, -3.0])).item() == 0
        assert kto_reference_point(torch.empty(0)).item() == 0

    def test_shapes_are_checked(self) -> None:
        with pytest.raises(ValueError, match=r"logratios has shape \(4,\) but desirable has \(1,\)"):
            kto_loss(logratios=self.LOGRATIOS, desirable=self.GOOD[:1], reference_point=torch.tensor(0.0))

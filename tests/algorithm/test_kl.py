import math

import pytest
import torch

from rlhf_lightning.algorithm.kl import AdaptiveKL, FixedKL, KLControl
from rlhf_lightning.errors import UserError


@pytest.mark.parametrize(("estimator", "value"), [("k1", -0.5), ("k2", 0.125), ("k3", 0.14872127)])
@pytest.mark.parametrize("control", [FixedKL, AdaptiveKL])
def test_the_estimator_that_is_named_estimates(control: type[FixedKL], estimator: str, value: float) -> None:
    kl = control(coef=0.1, estimator=estimator)  # type: ignore[arg-type]
    result = kl.estimate(torch.tensor([-1.5]), torch.tensor([-1.0]))  # d = -0.5
    torch.testing.assert_close(result, torch.tensor([value]))


def test_a_fixed_coefficient_stays() -> None:
    kl = FixedKL(coef=0.05)
    kl.update(sequence_kl=100.0, num_sequences=512)
    assert kl.coef == 0.05
    kl.load_state_dict(FixedKL(coef=0.3).state_dict())  # a resumed run may be given another
    assert kl.coef == 0.05


@pytest.mark.parametrize(
    ("sequence_kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 0.05),  # a tenth above the target, for 500 of 10,000 sequences
        (5.4, 1 - 0.1 * 0.05),
        (60.0, 1 + 0.2 * 0.05),  # clipped
        (-3.0, 1 - 0.2 * 0.05),
    ],
)
def test_an_adaptive_coefficient_moves_by_the_error(sequence_kl: float, factor: float) -> None:
    kl = AdaptiveKL(coef=0.2, target=6.0, horizon=10_000)
    kl.update(sequence_kl, num_sequences=500)
    assert kl.coef == pytest.approx(0.2 * factor, rel=1e-9)


def test_it_settles_where_the_divergence_is_the_target() -> None:
    # A toy policy whose divergence falls with the price: KL = 1.2 / coef, so the target 6 asks for 0.2.
    kl = AdaptiveKL(coef=0.05, target=6.0, horizon=1000)
    for _ in range(400):
        kl.update(sequence_kl=1.2 / kl.coef, num_sequences=64)
    assert kl.coef == pytest.approx(0.2, rel=0.01)


def test_a_resumed_run_goes_on_with_the_coefficient_it_had() -> None:
    first, again = AdaptiveKL(), AdaptiveKL()
    first.update(60.0, 512)
    again.load_state_dict(first.state_dict())
    assert again.coef == first.coef != AdaptiveKL().coef


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"coef is -0\.1; it must be a finite number of at least 0"):
        FixedKL(coef=-0.1)
    with pytest.raises(UserError, match="coef is nan"):
        FixedKL(coef=math.nan)
    with pytest.raises(UserError, match="estimator is 'k4'; it must be one of k1, k2, k3"):
        KLControl(0.1, estimator="k4")  # type: ignore[arg-type]
    for settings in ({"target": 0.0}, {"horizon": 0}):
        with pytest.raises(UserError, match=r"AdaptiveKL: target is .* and horizon .*; both must be above 0"):
            AdaptiveKL(**settings)


def test_adaptive_kl_refuses_a_horizon_below_the_rollout() -> None:
    with pytest.raises(UserError, match="horizon is 10, but an iteration has 11 sequences"):
        AdaptiveKL(horizon=10).update(sequence_kl=6.0, num_sequences=11)


@pytest.mark.parametrize("control", [FixedKL, AdaptiveKL])
def test_the_price_is_paid_in_one_place(control: type[FixedKL]) -> None:
    in_reward, in_loss = control(coef=0.3), control(coef=0.3, place="loss")
    assert (in_reward.reward_coef, in_reward.loss_coef) == (0.3, 0)
    assert (in_loss.reward_coef, in_loss.loss_coef) == (0, 0.3)
    with pytest.raises(UserError, match="place is 'prior'; it must be reward or loss"):
        control(coef=0.3, place="prior")  # type: ignore[arg-type]


def test_expected_gradients_of_the_estimators_as_a_loss() -> None:
    """Over all 5 tokens, weighed by the policy: k1 gives nothing, k2 KL(π || ref), k3 KL(ref || π)."""
    generator = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    ref_logprobs = ref.log_softmax(0)

    def slope(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, logits)[0]

    def expected(estimator: str) -> torch.Tensor:
        logprobs = logits.log_softmax(0)
        control = FixedKL(1.0, estimator=estimator, place="loss")  # type: ignore[arg-type]
        return slope((logprobs.exp().detach() * control.estimate(logprobs, ref_logprobs)).sum())

    logprobs = logits.log_softmax(0)
    reverse = slope((logprobs.exp() * (logprobs - ref_logprobs)).sum())
    logprobs = logits.log_softmax(0)
    forward = slope((ref_logprobs.exp() * (ref_logprobs - logprobs)).sum())
    assert min(reverse.norm(), forward.norm(), (reverse - forward).norm()) > 0.05
    torch.testing.assert_close(expected("k1"), torch.zeros(5, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(expected("k2"), reverse, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(expected("k3"), forward, atol=1e-6, rtol=1e-5)


def test_it_is_said_that_k1_in_the_loss_holds_nothing_back(caplog: pytest.LogCaptureFixture) -> None:
    for arguments in ({}, {"estimator": "k2"}, {"place": "reward"}, {"coef": 0.0}):
        caplog.clear()
        FixedKL(**({"coef": 0.1, "estimator": "k1", "place": "loss"} | arguments))  # type: ignore[arg-type]
        assert len(caplog.messages) == (not arguments)

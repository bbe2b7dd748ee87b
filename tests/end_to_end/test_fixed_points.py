r"""Where the estimators lead that do not lead to the optimum of score - β KL.

One prompt, responses of one token y, policy π, reference ρ, score r, d = log π - log ρ, ∇ the gradient with respect to
the policy's weights. As E_π[∇ log π] = 0, any constant may be taken off what multiplies ∇ log π.

*KL in the loss.* The sampled estimate k(d) is differentiated at fixed samples, so in expectation its gradient is
E_π[k'(d) ∇ log π]:

- k1, k' = 1: zero. Nothing is held back, whatever the coefficient.
- k2, k' = d: E_π[d ∇ log π] = ∇ KL(π ‖ ρ), the wanted gradient.
- k3, k' = 1 - e⁻ᵈ: E_π[(1 - ρ/π) ∇ log π] = -Σ ρ ∇ log π = ∇ KL(ρ ‖ π). The maximum of E_π[r] - β KL(ρ ‖ π) has
  r + β ρ/π = λ, so π = β ρ / (λ - r) with λ > max r such that it sums to 1: tails as heavy as the reference's.

With responses of several tokens the estimate at token t pulls at token t alone. KL(π ‖ ρ) = E Σₜ dₜ has the gradient
E Σₜ (Σ_{u ≥ t} dᵤ) ∇ log πₜ: what is missing is each token's credit for the KL of the later states that it leads to. So
a token-wise k2 in the loss minimises each state's own KL at the states visited, as if the visits did not depend on π.

*GRPO's scale.* The score's gradient is divided by σ, the standard deviation of r under π. With k2 in the loss,
r/σ - β d is constant at the fixed point: π ∝ ρ exp(r / (β σ)), with σ that of this very π; each prompt has a price of
a nat of its own, β σ. As σ falls where π sharpens, there may be no such point but σ = 0: then the KL holds nothing back
and the policy collapses. With the KL in the *reward* the scale divides both alike, and the fixed point is the optimum.

*k2 or k3 in the reward.* The penalty is a number, so A = r - β k(d) multiplies ∇ log π, and at a fixed point A is
constant on the tokens that have probability. A depends on a token's own probability alone, so training climbs
Φ(π) = E_π[r] - β Σ ρ f(π/ρ) with f(u) = ∫ k(log u) du; f''(u) = k'(log u) / u has the sign of log u. Above the
reference the penalty is convex and holds; *below it is concave*: the less likely a token is, the more it is punished,
and the less likely it becomes. A point is stable only if Φ is concave there along Σ δ = 0, so at most one token can
stay below its reference; the others that fall below lose all probability. With k2 the survivors have
π = ρ exp(√(2 (r - c) / β)), c such that they sum to 1. With k3, π k → ρ as π → 0, a force on lost tokens that never
ends: Φ rises to infinity.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_lightning.evaluation.enumeration import regularised_optimum
from rlhf_lightning.functional.advantages import group_relative
from rlhf_lightning.functional.kl import kl_k1, kl_k2, kl_k3

REFERENCE = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
SCORES = torch.tensor([0.0, 0.3, 0.6, 1.0], dtype=torch.float64)
SOME_POLICY = torch.tensor([0.1, 0.5, 0.15, 0.25], dtype=torch.float64)


def gradient_of_the_loss_term(estimator: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the expected gradient with respect to the logits, with samples from the policy itself."""
    logits = SOME_POLICY.log().requires_grad_()
    estimate = estimator(logits.log_softmax(dim=0).float(), REFERENCE.log().float())
    (gradient,) = torch.autograd.grad((SOME_POLICY * estimate).sum(), logits)
    return gradient


def gradient_of(function: Callable[[Tensor], Tensor]) -> Tensor:
    logits = SOME_POLICY.log().requires_grad_()
    (gradient,) = torch.autograd.grad(function(logits.log_softmax(dim=0)), logits)
    return gradient


def test_k1_in_the_loss_has_no_gradient_in_expectation() -> None:
    torch.testing.assert_close(gradient_of_the_loss_term(kl_k1), torch.zeros(4).double(), atol=1e-7, rtol=0)


def test_k2_in_the_loss_has_the_gradient_of_the_kl() -> None:
    expected = gradient_of(lambda logprobs: (logprobs.exp() * (logprobs - REFERENCE.log())).sum())
    torch.testing.assert_close(gradient_of_the_loss_term(kl_k2), expected, atol=1e-6, rtol=0)
    assert expected.abs().max() > 0.1


def test_k3_in_the_loss_has_the_gradient_of_the_reverse_kl() -> None:
    expected = gradient_of(lambda logprobs: (REFERENCE * (REFERENCE.log() - logprobs)).sum())
    torch.testing.assert_close(gradient_of_the_loss_term(kl_k3), expected, atol=1e-6, rtol=0)
    assert (expected - gradient_of_the_loss_term(kl_k2)).abs().max() > 0.05


def optimum_of_the_reverse_kl(beta: float) -> Tensor:
    """Return π = β ρ / (λ - r), with λ found by bisection: the sum falls from infinity as λ rises from max r."""
    low, high = float(SCORES.max()), float(SCORES.max()) + beta
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (beta * REFERENCE / (middle - SCORES)).sum() > 1 else (low, middle)
    return beta * REFERENCE / (high - SCORES)


def flow(force: Callable[[Tensor], Tensor], *, start: Tensor = REFERENCE, steps: int, rate: float) -> Tensor:
    """Follow dθ = π A - π Σ π A, the expected policy gradient of logits θ; ``force`` gives π A."""
    logits = start.log()
    for _ in range(steps):
        policy = logits.softmax(dim=0)
        pull = force(policy)
        logits = logits + rate * (pull - policy * pull.sum())
    return logits.softmax(dim=0)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_optimum_with_k3_in_the_loss(beta: float) -> None:
    """Forces: π r from the score, and -β ∇ KL(ρ ‖ π), which for logits is β (ρ - π)."""
    expected = optimum_of_the_reverse_kl(beta)
    assert float(expected.sum()) == pytest.approx(1)
    reached = flow(lambda policy: policy * SCORES + beta * REFERENCE, steps=3000, rate=0.5)
    torch.testing.assert_close(reached, expected, atol=1e-6, rtol=0)
    best = regularised_optimum(ref_logprobs=REFERENCE.log(), rewards=SCORES, beta=beta).logprobs.exp()
    assert (expected - best).abs().max() > 0.02


def scaled_fixed_point(beta: float) -> Tensor:
    """Return π ∝ ρ exp(r / (β σ(π))), by iteration from the reference."""
    policy = REFERENCE
    for _ in range(500):
        policy = regularised_optimum(
            ref_logprobs=REFERENCE.log(), rewards=SCORES, beta=beta * max(standard_deviation(policy), 1e-3)
        ).logprobs.exp()
    return policy


def standard_deviation(policy: Tensor) -> float:
    return float((policy * (SCORES - policy @ SCORES).square()).sum().sqrt())


def test_grpos_scale_with_the_kl_in_the_loss_changes_the_price_of_a_nat() -> None:
    beta = 1.0
    expected = scaled_fixed_point(beta)

    def force(policy: Tensor) -> Tensor:
        log_ratio = policy.log() - REFERENCE.log()
        return policy * (SCORES / standard_deviation(policy) - beta * log_ratio)

    torch.testing.assert_close(flow(force, steps=3000, rate=0.3), expected, atol=1e-6, rtol=0)
    best = regularised_optimum(ref_logprobs=REFERENCE.log(), rewards=SCORES, beta=beta).logprobs.exp()
    assert (expected - best).abs().max() > 0.1
    assert standard_deviation(expected) == pytest.approx(0.3433, abs=1e-3)  # a third of the price that was asked


def test_grpos_scale_with_a_low_price_in_the_loss_collapses() -> None:
    """At β = 0.3 the optimum keeps 27 % for other tokens; scaled, σ and with it the price fall to 0."""
    best = regularised_optimum(ref_logprobs=REFERENCE.log(), rewards=SCORES, beta=0.3).logprobs.exp()
    assert float(best[-1]) < 0.75
    assert float(scaled_fixed_point(0.3)[-1]) > 0.999


def test_grpos_scale_with_the_kl_in_the_reward_leaves_the_optimum() -> None:
    """At the optimum r - β d is the same for all tokens: every group's advantages are 0, and a scale of 0 is 0."""
    best = regularised_optimum(ref_logprobs=REFERENCE.log(), rewards=SCORES, beta=0.3).logprobs
    totals = SCORES - 0.3 * (best - REFERENCE.log())
    drawn = totals[torch.tensor([0, 1, 2, 3, 3, 3, 2, 1])]
    for scale in (False, True):
        advantages = group_relative(drawn.float().round(decimals=5), 4, scale=scale)
        torch.testing.assert_close(advantages, torch.zeros(8), atol=1e-3, rtol=0)


def k2_penalised(policy: Tensor, beta: float) -> Tensor:
    return policy * (SCORES - beta * (policy.log() - REFERENCE.log()).square() / 2)


def k3_penalised(policy: Tensor, beta: float) -> Tensor:
    """Return π (r - β k3) with π k3 = ρ - π + π d, which stays finite as π falls to 0."""
    return policy * (SCORES - beta * ((policy / REFERENCE).log() - 1)) - beta * REFERENCE


def test_k2_in_the_reward_drives_tokens_below_the_reference_to_nothing() -> None:
    """From the reference, the two worst tokens fall below it; the others end at r - β k2 = c above it."""
    beta = 0.3
    reached = flow(lambda policy: k2_penalised(policy, beta), steps=20_000, rate=0.5)
    lost, kept = reached[:2], reached[2:]
    assert (lost < 1e-4).all()
    assert (kept > REFERENCE[2:]).all()
    level = SCORES[2:] - beta * (kept / REFERENCE[2:]).log().square() / 2
    assert float(level[0]) == pytest.approx(float(level[1]), abs=1e-3)
    expected = REFERENCE[2:] * ((2 * (SCORES[2:] - level.mean()) / beta).sqrt()).exp()
    torch.testing.assert_close(kept, expected, atol=1e-3, rtol=0)
    best = regularised_optimum(ref_logprobs=REFERENCE.log(), rewards=SCORES, beta=beta).logprobs.exp()
    assert float(best[:2].sum()) > 0.1


def test_k3_in_the_reward_drives_tokens_below_the_reference_to_nothing_without_end() -> None:
    """Lost tokens are pushed by β ρ for ever: their logits fall by β ρ a unit of time, and Φ has no maximum."""
    beta = 0.3
    early, late = (flow(lambda policy: k3_penalised(policy, beta), steps=steps, rate=0.1) for steps in (4000, 6000))
    lost = late < 1e-6
    assert 1 <= int(lost.sum()) <= 3
    assert (SCORES[lost].max() < SCORES[~lost].min()).item()
    assert (late[lost] < early[lost] / 100).all()
    best = regularised_optimum(ref_logprobs=REFERENCE.log(), rewards=SCORES, beta=beta).logprobs.exp()
    assert (best[lost] > 0.02).all()


@pytest.mark.parametrize("penalised", [k2_penalised, k3_penalised])
def test_with_the_estimate_in_the_reward_another_objective_is_climbed(
    penalised: Callable[[Tensor, float], Tensor],
) -> None:
    """∇ (E[r] - β Σ ρ f(π/ρ)) is the expected policy gradient.

    Integrating k(log u): f2 = u (log² u / 2 - log u + 1) and f3 = log u + u log u - 2u.
    """
    beta = 0.3

    def objective(logprobs: Tensor) -> Tensor:
        u, log_u = (logprobs - REFERENCE.log()).exp(), logprobs - REFERENCE.log()
        f2, f3 = u * (log_u.square() / 2 - log_u + 1), log_u + u * log_u - 2 * u
        return logprobs.exp() @ SCORES - beta * REFERENCE @ (f2 if penalised is k2_penalised else f3)

    pull = penalised(SOME_POLICY, beta)
    torch.testing.assert_close(gradient_of(objective), pull - SOME_POLICY * pull.sum())


def test_at_most_one_token_can_stay_below_the_reference_with_k2_in_the_reward() -> None:
    """Two tokens, ρ = (0.3, 0.7), scores 0.03 apart, β = 1: δ(A₁ - A₂) = -(d₁/π₁ - |d₂|/π₂) δπ₁ with d₁/π₁ larger.

    So the fixed point is stable. With ρ = (0.7, 0.3) the sign turns, and the worse token is lost.
    """
    for first, survives in ((0.3, True), (0.7, False)):
        reference = torch.tensor([first, 1 - first], dtype=torch.float64)
        logits = reference.log()
        for _ in range(20_000):
            policy = logits.softmax(dim=0)
            pull = policy * (torch.tensor([0.03, 0.0]) - (policy / reference).log().square() / 2)
            logits = logits + 0.5 * (pull - policy * pull.sum())
        policy = logits.softmax(dim=0)
        assert (float(policy[1]) > 0.3) == survives
        if survives:
            assert math.log(float(policy[1]) / 0.7) < 0

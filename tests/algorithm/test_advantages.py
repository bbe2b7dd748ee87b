import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.algorithm.advantages import (
    GAE,
    AdvantageEstimator,
    GlobalBaseline,
    GroupRelative,
    LeaveOneOut,
)
from rlhf_lightning.algorithm.objectives import FixedLength, MinibatchSize, Normalization, TokenMean
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.advantages import gae
from rlhf_lightning.functional.sequences import length_mask


def numbers() -> dict[str, Any]:
    """Return rewards, values and mask of three responses."""
    mask = length_mask(torch.tensor([3, 1, 4]))
    rewards, values = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    return {"rewards": rewards, "values": values, "response_mask": mask}


def test_discount_and_lambda_reach_the_formula() -> None:
    # delta: 1 + 0.5 · 2 - 1 = 1 and 3 - 2 = 1; advantages 1 + 0.5 · 0.4 · 1 = 1.2 and 1.
    tensors: dict[str, Any] = {"rewards": torch.tensor([[1.0, 3.0]]), "values": torch.tensor([[1.0, 2.0]])}
    result = GAE(gamma=0.5, gae_lambda=0.4, whiten=None).estimate(**tensors, response_mask=torch.ones(1, 2).bool())
    torch.testing.assert_close(result.advantages, torch.tensor([[1.2, 1.0]]))
    torch.testing.assert_close(result.returns, torch.tensor([[2.2, 3.0]]))


def test_whitened_advantages_have_mean_0_and_variance_1_and_returns_are_from_before() -> None:
    tensors = numbers()
    mask = tensors["response_mask"]
    plain = GAE(whiten=None).estimate(**tensors)
    white = GAE().estimate(**tensors)
    kept = white.advantages[mask]
    assert kept.mean().item() == pytest.approx(0, abs=1e-6)
    assert kept.var(correction=0).item() == pytest.approx(1, abs=1e-5)
    raw = plain.advantages[mask]
    torch.testing.assert_close(kept, (raw - raw.mean()) / raw.std(correction=0))
    assert not white.advantages[~mask].any()
    assert torch.equal(white.returns, plain.returns)


def test_the_default_is_undiscounted_with_lambda_095() -> None:
    tensors = numbers()
    expected = gae(
        rewards=tensors["rewards"],
        values=tensors["values"],
        response_mask=tensors["response_mask"],
        gamma=1.0,
        gae_lambda=0.95,
    )
    assert torch.equal(GAE(whiten=None).estimate(**tensors).advantages, expected[0])


@pytest.mark.parametrize("name", ["gamma", "gae_lambda"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"{name} is .*; it must lie in \[0, 1\]"):
        GAE(**{name: value})  # type: ignore[arg-type]


def test_whitening_by_minibatch_waits_for_the_minibatch() -> None:
    """The rollout's advantages stay as they are; those of a minibatch get mean 0 and variance 1 over its tokens."""
    tensors = numbers()
    estimator = GAE(whiten="minibatch")
    plain = GAE(whiten=None).estimate(**tensors).advantages
    assert torch.equal(estimator.estimate(**tensors).advantages, plain)
    parts, masks = [plain[:1, :3], plain[2:]], [tensors["response_mask"][:1, :3], tensors["response_mask"][2:]]
    white = estimator.of_minibatch(parts, masks)
    raw = torch.cat([part[mask] for part, mask in zip(parts, masks, strict=True)])
    kept = torch.cat([part[mask] for part, mask in zip(white, masks, strict=True)])
    torch.testing.assert_close(kept, (raw - raw.mean()) / raw.std(correction=0))
    assert [part.shape for part in white] == [part.shape for part in parts]
    for other in ("rollout", None):
        kept_as_is = GAE(whiten=other).of_minibatch(parts, masks)
        assert all(a is b for a, b in zip(kept_as_is, parts, strict=True))


def test_whitened_rewards_keep_their_mean_and_change_the_advantages() -> None:
    tensors = numbers()
    mask, raw = tensors["response_mask"], tensors["rewards"][tensors["response_mask"]]
    scaled = torch.where(mask, (tensors["rewards"] - raw.mean()) / raw.std(correction=0) + raw.mean(), 0.0)
    expected = GAE(whiten=None).estimate(**{**tensors, "rewards": scaled})
    found = GAE(whiten=None, whiten_rewards=True).estimate(**tensors)
    torch.testing.assert_close(found.advantages, expected.advantages)
    torch.testing.assert_close(found.returns, expected.returns)
    assert not torch.allclose(found.advantages, GAE(whiten=None).estimate(**tensors).advantages)


def grouped() -> dict[str, Any]:
    """Return two prompts with two responses each; returns of the responses 1, 3, 5 and -5; values are not looked at."""
    mask = length_mask(torch.tensor([2, 1, 3, 1]))
    rewards = torch.tensor([[0.5, 0.5, 9.0], [3.0, 9.0, 9.0], [1.0, 1.0, 3.0], [-5.0, 9.0, 9.0]])
    return {"rewards": rewards, "values": torch.full((4, 3), torch.nan), "response_mask": mask}


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (LeaveOneOut(), [-2.0, 2.0, 10.0, -10.0]),
        (GroupRelative(scale=False), [-1.0, 1.0, 5.0, -5.0]),
        (GroupRelative(), [-(0.5**0.5), 0.5**0.5, 0.5**0.5, -(0.5**0.5)]),
    ],
)
def test_groups_get_one_advantage_on_every_token(estimator: AdvantageEstimator, expected: list[float]) -> None:
    tensors = grouped()
    found = estimator.estimate(**tensors, group_size=2).advantages
    wanted = torch.where(tensors["response_mask"], torch.tensor(expected)[:, None], 0.0)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert not estimator.needs_critic
    with pytest.raises(UserError, match=f"{type(estimator).__name__} compares several responses to a prompt"):
        estimator.estimate(**tensors, group_size=1)


def expected_gradient(
    estimator: AdvantageEstimator, scores: list[float], lengths: list[int], normalization: Normalization
) -> tuple[Tensor, Tensor]:
    """Return the expected gradient of one group of two, a minibatch by itself, and that of the expected score.

    The policy draws one of three responses of the given scores and lengths by its first token; the others follow.
    """
    logits = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    probabilities, score, length = logits.softmax(0), torch.tensor(scores), torch.tensor(lengths)
    (wanted,) = torch.autograd.grad((probabilities * score).sum(), logits)
    found = torch.zeros(3)
    for drawn in itertools.product(range(3), repeat=2):
        mask = length_mask(length[list(drawn)])
        rewards = torch.zeros(mask.shape)
        rewards[[0, 1], length[list(drawn)] - 1] = score[list(drawn)]
        advantages = estimator.estimate(
            rewards=rewards, values=torch.zeros(mask.shape), response_mask=mask, group_size=2
        ).advantages
        weights = normalization.weights(mask, MinibatchSize(mask.sum(), torch.tensor(2)))
        logprobs = logits.log_softmax(0)[list(drawn)]
        (gradient,) = torch.autograd.grad((weights * advantages)[:, 0] @ logprobs, logits)
        found += probabilities.detach()[list(drawn)].prod() * gradient
    return found, wanted


def test_the_gradient_of_groups_in_expectation() -> None:
    """RLOO's is that of the score, GRPO's without scale (n - 1) / n of it: half, so that a KL in the loss costs twice.

    With lengths of 1, 4 and 4 tokens, of which only the first is chosen, a fixed length keeps the direction. A token
    mean over one group does not: it divides by 2, 5 or 8 tokens, whichever were drawn.
    """
    scores = [1.0, 0.6, 0.0]
    found, wanted = expected_gradient(LeaveOneOut(), scores, [1, 4, 4], FixedLength(1))
    torch.testing.assert_close(found, wanted)
    found, wanted = expected_gradient(GroupRelative(scale=False), scores, [1, 4, 4], FixedLength(1))
    torch.testing.assert_close(found, wanted / 2)
    found, wanted = expected_gradient(LeaveOneOut(), scores, [1, 1, 1], TokenMean())
    torch.testing.assert_close(found, wanted)
    found, wanted = expected_gradient(LeaveOneOut(), scores, [1, 4, 4], TokenMean())
    assert not torch.allclose(found / found.norm(), wanted / wanted.norm(), rtol=0.05)


def test_whitened_rewards_pay_for_length() -> None:
    """Rewards 1, 1, 0, 2 and 2: mean 1.2, deviation √0.56. Two responses earn 2 in 1 and in 2 tokens: whitened that is
    2 / σ + 1.2 (1 - 1/σ) a token, and the longer one gets the second term once more."""
    mask = length_mask(torch.tensor([2, 2, 1]))
    rewards = torch.tensor([[1.0, 1.0], [0.0, 2.0], [2.0, 0.0]])
    three: dict[str, Any] = {"rewards": rewards, "values": torch.zeros(3, 2), "response_mask": mask, "group_size": 3}
    assert not LeaveOneOut().estimate(**three).advantages.any()
    found = LeaveOneOut(whiten_rewards=True).estimate(**three).advantages[:, 0]
    torch.testing.assert_close(found[0] - found[2], torch.tensor(1.5 * 1.2 * (1 - 0.56**-0.5)))


def test_a_global_baseline_whitens_what_is_still_to_come() -> None:
    tensors = grouped()
    mask = tensors["response_mask"]
    to_go = torch.tensor([1.0, 0.5, 3.0, 5.0, 4.0, 3.0, -5.0])
    found = GlobalBaseline().estimate(**tensors).advantages
    torch.testing.assert_close(found[mask], (to_go - to_go.mean()) / to_go.std(correction=0))
    assert torch.equal(GlobalBaseline(whiten=None).estimate(**tensors).advantages[mask], to_go)
    # gamma 0: each token's own reward alone.
    own = GlobalBaseline(gamma=0.0, whiten=None).estimate(**tensors).advantages
    assert torch.equal(own[mask], tensors["rewards"][mask])


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="LeaveOneOut: whiten is 'always'; it must be rollout, minibatch or null"):
        LeaveOneOut(whiten="always")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"GlobalBaseline: gamma is 1\.5"):
        GlobalBaseline(gamma=1.5)

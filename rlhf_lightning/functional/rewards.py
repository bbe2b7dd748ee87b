"""From one score a response to one reward a token."""

from typing import NamedTuple

import torch
from torch import Tensor


def token_rewards(
    *, scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float, per_token: Tensor | None = None
) -> Tensor:
    """Return rₜ = -kl_coef · klₜ (+ dense reward), plus the score on the last real token.

    Args:
        scores: Score of each response, shape (batch,).
        kl: Estimate of the KL to the reference at each token, in nats, shape (batch, response).
        response_mask: True where a token counts, shape (batch, response), bool; each row starts with its True places.
        kl_coef: Price of a nat, at least 0; higher keeps the policy closer to the reference, 0 leaves the bare score.
        per_token: Further reward of each token, shape (batch, response), or ``None``.

    Returns:
        Rewards, shape (batch, response), float32, zero where the mask is False. A response of no tokens gets none.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> mask = torch.tensor([[True, True, False]])
        >>> token_rewards(scores=torch.tensor([1.0]), kl=torch.ones(1, 3), response_mask=mask, kl_coef=0.1)
        tensor([[-0.1000,  0.9000,  0.0000]])

    References:
        Stiennon et al. 2020, "Learning to summarize from human feedback", section 3.4; Ziegler et al. 2019, eq. 2.
    """
    if kl.shape != response_mask.shape or scores.shape != response_mask.shape[:1]:
        msg = (
            f"token_rewards: scores {tuple(scores.shape)}, kl {tuple(kl.shape)} and response_mask "
            f"{tuple(response_mask.shape)} do not fit; expected (batch,), (batch, response), (batch, response)."
        )
        raise ValueError(msg)
    if per_token is not None and per_token.shape != kl.shape:
        msg = f"token_rewards: per_token has shape {tuple(per_token.shape)}; expected that of kl, {tuple(kl.shape)}."
        raise ValueError(msg)
    rewards = torch.where(response_mask, -kl_coef * kl.float(), 0.0)
    if per_token is not None:
        rewards = rewards + torch.where(response_mask, per_token.float(), 0.0)
    lengths = response_mask.sum(dim=1, keepdim=True)
    last = torch.arange(response_mask.shape[1], device=response_mask.device) == lengths - 1
    return rewards + torch.where(last, scores.float()[:, None], 0.0)


def missing_eos_penalty(scores: Tensor, finished: Tensor, penalty: float) -> Tensor:
    """Subtract a penalty from the score of each response that never stopped.

    Args:
        scores: Shape (batch,).
        finished: True where a stop token was produced, shape (batch,), bool.
        penalty: What an unfinished response loses, in units of the score; 0 turns it off.

    Returns:
        Shape (batch,), float32.

    Example:
        >>> missing_eos_penalty(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), 0.5)
        tensor([1.0000, 0.5000])

    References:
        TRL's ``missing_eos_penalty``; Huang et al. 2023 *replace* the score by -1 instead.
    """
    return scores.float() - penalty * (~finished).float()


def missing_eos_score(scores: Tensor, finished: Tensor, score: float) -> Tensor:
    """Replace the score of each response that never stopped.

    Args:
        scores: Shape (batch,); what stands at unfinished responses, NaN included, changes nothing.
        finished: True where a stop token was produced, shape (batch,), bool.
        score: What an unfinished response gets.

    Returns:
        Shape (batch,), float32.

    Example:
        >>> missing_eos_score(torch.tensor([3.0, 5.0]), torch.tensor([True, False]), -1.0)
        tensor([ 3., -1.])

    References:
        Huang et al. 2023, "The N Implementation Details of RLHF with PPO".
    """
    return torch.where(finished, scores.float(), score)


def clip_scores(scores: Tensor, limit: float) -> Tensor:
    """Cut scores to [-limit, limit].

    Args:
        scores: Shape (batch,).
        limit: Above 0, in units of the score; infinity turns it off.

    Returns:
        Shape (batch,), float32.

    Example:
        >>> clip_scores(torch.tensor([-7.0, 1.0, 6.0]), 5.0)
        tensor([-5.,  1.,  5.])
    """
    return scores.float().clamp(-limit, limit)


def normalize_scores(scores: Tensor, *, mean: float, std: float) -> Tensor:
    """Return (score - mean) / std.

    Args:
        scores: Shape (batch,).
        mean: Subtracted; 0 keeps the signs.
        std: Divided by, above 0; 1 keeps the scale.

    Returns:
        Shape (batch,), float32.

    Raises:
        ValueError: If ``std`` is not above 0.

    Example:
        >>> normalize_scores(torch.tensor([1.0, 5.0]), mean=3.0, std=2.0)
        tensor([-1.,  1.])
    """
    if not std > 0:
        raise ValueError(f"normalize_scores: std is {std}; expected a number above 0.")
    return (scores.float() - mean) / std


class Moments(NamedTuple):
    """How many numbers there are, their mean, and the sum of their squared deviations from it."""

    number: int
    mean: float
    squares: float


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Return the moments of two sets of numbers together, without looking at the numbers again.

    Args:
        a: Of the first set, which may be empty.
        b: Of the second set, which may be empty.

    Example:
        >>> merge_moments(Moments(2, 1.0, 2.0), Moments(1, 4.0, 0.0))  # of 0, 2 and of 4
        Moments(number=3, mean=2.0, squares=8.0)

    References:
        Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".
    """
    number = a.number + b.number
    if not number:
        return a
    distance = b.mean - a.mean
    mean = a.mean + distance * b.number / number
    return Moments(number, mean, a.squares + b.squares + distance**2 * a.number * b.number / number)

"""Losses of reward modelling and of PPO.

The PPO losses are weighted *sums* over the tokens that count. Given the weights that a token has in its whole
minibatch, the losses of its micro-batches add up to the minibatch's, however it was cut.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_lightning.functional.masked import masked_sum


def token_mean_weights(response_mask: Tensor, *, num_tokens: Tensor | float | None = None) -> Tensor:
    """Return weights that average over all tokens of a minibatch, so that longer responses weigh more.

    Args:
        response_mask: True where a token counts, shape (batch, response), bool.
        num_tokens: Tokens of the whole minibatch; ``None`` takes those of this batch.

    Returns:
        1 / tokens where a token counts, shape (batch, response), float32.

    Example:
        >>> token_mean_weights(torch.tensor([[True, True, True], [True, False, False]]))
        tensor([[0.2500, 0.2500, 0.2500],
                [0.2500, 0.0000, 0.0000]])

    References:
        Yu et al. 2025, "DAPO", section 3.3.
    """
    return response_mask.float() / (response_mask.sum() if num_tokens is None else num_tokens)


def sequence_mean_weights(response_mask: Tensor, *, num_sequences: Tensor | float | None = None) -> Tensor:
    """Return weights that average over the tokens of each response, then over responses.

    A token of a long response weighs less than one of a short response, so that a long wrong answer costs less a token
    than a short one.

    Args:
        response_mask: True where a token counts, shape (batch, response), bool.
        num_sequences: Responses of the whole minibatch; ``None`` takes those of this batch.

    Returns:
        1 / (responses · tokens of the response) where a token counts, shape (batch, response), float32.

    Example:
        >>> sequence_mean_weights(torch.tensor([[True, True], [True, False]]))
        tensor([[0.2500, 0.2500],
                [0.5000, 0.0000]])

    References:
        Shao et al. 2024, "DeepSeekMath", eq. 3; its bias in length: Liu et al. 2025, "Understanding R1-Zero-Like
        Training", section 3.1.
    """
    count = len(response_mask) if num_sequences is None else num_sequences
    return response_mask.float() / response_mask.sum(dim=1, keepdim=True).clamp(min=1) / count


def fixed_length_weights(response_mask: Tensor, *, length: int, num_sequences: Tensor | float | None = None) -> Tensor:
    """Return weights that divide every response's token sum by one constant, whatever its length.

    With advantages that are one number a response this is, up to the constant, the plain gradient of the expected
    score.

    Args:
        response_mask: True where a token counts, shape (batch, response), bool.
        length: The constant, in tokens; the longest response allowed is usual.
        num_sequences: Responses of the whole minibatch; ``None`` takes those of this batch.

    Returns:
        1 / (responses · length) where a token counts, shape (batch, response), float32.

    Example:
        >>> fixed_length_weights(torch.tensor([[True, True], [True, False]]), length=2)
        tensor([[0.2500, 0.2500],
                [0.2500, 0.0000]])

    References:
        Liu et al. 2025, "Understanding R1-Zero-Like Training: A Critical Perspective" (Dr. GRPO), section 3.2.
    """
    return response_mask.float() / length / (len(response_mask) if num_sequences is None else num_sequences)


class PolicyLoss(NamedTuple):
    """A policy loss and what an update reports of it; the sums are over the tokens that count, without gradient.

    Attributes:
        loss: Scalar to be minimised.
        ratio_sum: Sum of the probability ratios.
        approx_kl_sum: Sum of (ratio - 1) - log ratio, in nats: the k3 estimate of KL(old || new).
        clipped_sum: Number of tokens at which a clipped form is the loss, so that no gradient flows.
        guarded_sum: Number of tokens left out for a log ratio beyond the guard.
    """

    loss: Tensor
    ratio_sum: Tensor
    approx_kl_sum: Tensor
    clipped_sum: Tensor
    guarded_sum: Tensor


def ppo_policy_loss(
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    log_ratio_guard: float | None = None,
    token_weights: Tensor | None = None,
) -> PolicyLoss:
    """Return the clipped surrogate, max(-A·ρ, -A·clip(ρ, 1 - ε, 1 + ε_high)), averaged over tokens.

    Where A < 0 the loss grows without bound with ρ; the dual clip bounds it: min(that, -A·c).

    Args:
        logprobs: Under the policy now, with gradient, nats, shape (batch, response).
        old_logprobs: Under the policy that sampled, shape (batch, response).
        advantages: Shape (batch, response).
        response_mask: True where a token counts, shape (batch, response), bool.
        clip_range: ε > 0; larger lets one rollout move the policy further, infinity turns clipping off.
        clip_range_high: ε_high > 0 of the upper bound alone; larger lets unlikely tokens gain more; ``None`` takes
            ``clip_range``.
        dual_clip: c > 1; smaller trusts tokens of negative advantage that have become likelier less; ``None`` is off.
        log_ratio_guard: A token whose log ratio is further than this from 0, in nats, adds nothing to the loss and is
            counted; ``None`` is off.
        token_weights: Weight of each token, shape (batch, response); ``None`` averages over the tokens of this batch.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> zeros, mask = torch.zeros(1, 2), torch.ones(1, 2).bool()
        >>> ppo_policy_loss(
        ...     logprobs=zeros, old_logprobs=zeros, advantages=torch.ones(1, 2), response_mask=mask
        ... ).loss
        tensor(-1.)

    References:
        Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7; the upper bound apart: Yu et al. 2025,
        "DAPO", section 3.1; the dual clip: Ye et al. 2020, "Mastering Complex Control in MOBA Games", eq. 5.
    """
    _check_shapes("ppo_policy_loss", logprobs, old_logprobs, advantages, response_mask)
    # Under the mask everything is set to 0 *before* exp, so that no NaN gets into the gradient.
    log_ratio = torch.where(response_mask, logprobs.float() - old_logprobs.float(), 0.0)
    advantages = torch.where(response_mask, advantages.float(), 0.0)
    guarded = torch.zeros_like(response_mask) if log_ratio_guard is None else log_ratio.abs() > log_ratio_guard
    log_ratio = torch.where(guarded, 0.0, log_ratio)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    high = clip_range if clip_range_high is None else clip_range_high
    bounded = -advantages * ratio.clamp(1 - clip_range, 1 + high)
    losses, clipped = torch.maximum(plain, bounded), bounded > plain
    if dual_clip is not None:
        ceiling = torch.where(advantages < 0, -advantages * dual_clip, torch.inf)
        losses, clipped = torch.minimum(losses, ceiling), clipped | (losses > ceiling)
    loss, counted = _weighted(torch.where(guarded, 0.0, losses), token_weights, response_mask), response_mask & ~guarded
    with torch.no_grad():
        return PolicyLoss(
            loss=loss,
            ratio_sum=masked_sum(ratio, counted),
            approx_kl_sum=masked_sum(torch.expm1(log_ratio) - log_ratio, counted),
            clipped_sum=masked_sum(clipped, counted),
            guarded_sum=guarded.sum().float(),
        )


class ValueLoss(NamedTuple):
    """A value loss and the number of tokens at which its clipped form was the larger."""

    loss: Tensor
    clipped_sum: Tensor


def ppo_value_loss(
    *,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    value_clip_range: float | None = 0.2,
    token_weights: Tensor | None = None,
) -> ValueLoss:
    """Return ½ max((V - R)², (clip(V, V_old ± ε) - R)²), averaged over tokens.

    Args:
        values: Predicted now, with gradient, shape (batch, response).
        old_values: Predicted at rollout, shape (batch, response).
        returns: What they should predict, shape (batch, response).
        response_mask: True where a token counts, shape (batch, response), bool.
        value_clip_range: ε > 0, in units of the value; ``None`` turns clipping off.
        token_weights: Weight of each token, shape (batch, response); ``None`` averages over the tokens of this batch.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> ones, zeros, mask = torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1, 2).bool()
        >>> ppo_value_loss(values=zeros, old_values=zeros, returns=ones, response_mask=mask).loss
        tensor(0.5000)

    References:
        Huang et al. 2023, "The N Implementation Details of RLHF with PPO"; after openai/baselines.
    """
    _check_shapes("ppo_value_loss", values, old_values, returns, response_mask)
    values = torch.where(response_mask, values.float(), 0.0)
    old_values = torch.where(response_mask, old_values.float(), 0.0)
    returns = torch.where(response_mask, returns.float(), 0.0)
    plain = (values - returns).square()
    if value_clip_range is None:
        clipped = plain
    else:
        clipped = (values.clamp(old_values - value_clip_range, old_values + value_clip_range) - returns).square()
    loss = _weighted(0.5 * torch.maximum(plain, clipped), token_weights, response_mask)
    return ValueLoss(loss, masked_sum((clipped > plain).detach(), response_mask))


def preference_loss(chosen_scores: Tensor, rejected_scores: Tensor, *, margin: Tensor | float = 0.0) -> Tensor:
    """Return the Bradley-Terry loss -log σ(s_chosen - s_rejected - margin) of each pair.

    Args:
        chosen_scores: Shape (pairs,).
        rejected_scores: Shape (pairs,).
        margin: By how much chosen should be better, in units of the score, shape (pairs,) or a number; 0 asks only for
            the order.

    Returns:
        Shape (pairs,), float32, above 0; log 2 where both scores are equal and the margin is 0.

    Example:
        >>> preference_loss(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor([0.6931])

    References:
        Ouyang et al. 2022, "Training language models to follow instructions with human feedback", eq. 1; the margin
        is that of Touvron et al. 2023, "Llama 2", eq. 2.
    """
    return -logsigmoid(chosen_scores.float() - rejected_scores.float() - margin)


def _weighted(losses: Tensor, weights: Tensor | None, mask: Tensor) -> Tensor:
    return (losses * (token_mean_weights(mask) if weights is None else weights)).sum()


def _check_shapes(name: str, *tensors: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        msg = f"{name}: the tensors have shapes {shapes}; all are (batch, response)."
        raise ValueError(msg)

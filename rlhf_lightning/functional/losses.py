"""Losses of reward modelling and of PPO.

The PPO losses return a *sum* over the tokens that count, divided by ``num_tokens``: given the token count of the whole
minibatch, the losses of its micro-batches add up to the minibatch's mean, however it was cut.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_lightning.functional.masked import masked_sum


class PolicyLoss(NamedTuple):
    """A policy loss and what an update reports of it; the sums are over the tokens that count, without gradient.

    Attributes:
        loss: Scalar to be minimised.
        ratio_sum: Sum of the probability ratios.
        approx_kl_sum: Sum of (ratio - 1) - log ratio, in nats: the k3 estimate of KL(old || new).
        clipped_sum: Number of tokens at which the clipped form is the larger loss, so that no gradient flows.
    """

    loss: Tensor
    ratio_sum: Tensor
    approx_kl_sum: Tensor
    clipped_sum: Tensor


def ppo_policy_loss(
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_range: float = 0.2,
    num_tokens: Tensor | float | None = None,
) -> PolicyLoss:
    """Return the clipped surrogate, max(-A·ρ, -A·clip(ρ, 1 - ε, 1 + ε)), averaged over tokens.

    Args:
        logprobs: Under the policy now, with gradient, nats, shape (batch, response).
        old_logprobs: Under the policy that sampled, shape (batch, response).
        advantages: Shape (batch, response).
        response_mask: True where a token counts, shape (batch, response), bool.
        clip_range: ε > 0; larger lets one rollout move the policy further, infinity turns clipping off.
        num_tokens: What the sum is divided by; ``None`` takes the tokens of this batch.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> zeros, mask = torch.zeros(1, 2), torch.ones(1, 2).bool()
        >>> ppo_policy_loss(
        ...     logprobs=zeros, old_logprobs=zeros, advantages=torch.ones(1, 2), response_mask=mask
        ... ).loss
        tensor(-1.)

    References:
        Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7.
    """
    _check_shapes("ppo_policy_loss", logprobs, old_logprobs, advantages, response_mask)
    # Under the mask everything is set to 0 *before* exp, so that no NaN gets into the gradient.
    log_ratio = torch.where(response_mask, logprobs.float() - old_logprobs.float(), 0.0)
    advantages = torch.where(response_mask, advantages.float(), 0.0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(plain, clipped).sum() / _token_count(num_tokens, response_mask)
    with torch.no_grad():
        return PolicyLoss(
            loss=loss,
            ratio_sum=masked_sum(ratio, response_mask),
            approx_kl_sum=masked_sum(torch.expm1(log_ratio) - log_ratio, response_mask),
            clipped_sum=masked_sum(clipped > plain, response_mask),
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
    num_tokens: Tensor | float | None = None,
) -> ValueLoss:
    """Return ½ max((V - R)², (clip(V, V_old ± ε) - R)²), averaged over tokens.

    Args:
        values: Predicted now, with gradient, shape (batch, response).
        old_values: Predicted at rollout, shape (batch, response).
        returns: What they should predict, shape (batch, response).
        response_mask: True where a token counts, shape (batch, response), bool.
        value_clip_range: ε > 0, in units of the value; ``None`` turns clipping off.
        num_tokens: What the sum is divided by; ``None`` takes the tokens of this batch.

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
    loss = 0.5 * torch.maximum(plain, clipped).sum() / _token_count(num_tokens, response_mask)
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


def _token_count(num_tokens: Tensor | float | None, mask: Tensor) -> Tensor | float:
    return mask.sum() if num_tokens is None else num_tokens


def _check_shapes(name: str, *tensors: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        msg = f"{name}: the tensors have shapes {shapes}; all are (batch, response)."
        raise ValueError(msg)

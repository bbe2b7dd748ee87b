"""Advantage estimators."""

import torch
from torch import Tensor


def gae(
    *, rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float = 1.0, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Estimate advantages and the returns that a value function should predict.

    Runs backwards through Âₜ = δₜ + γλ Âₜ₊₁ with δₜ = rₜ + γ Vₜ₊₁ - Vₜ; V is zero after a response's last token.

    Args:
        rewards: Reward of each response token, shape (batch, response).
        values: Value predicted before each response token, shape (batch, response).
        response_mask: True where a token counts, shape (batch, response), bool; each row starts with its True places.
        gamma: Discount per token, in [0, 1]; lower looks less far ahead.
        gae_lambda: In [0, 1]; 0 is one-step (more bias), 1 is Monte Carlo (more variance).

    Returns:
        Advantages and returns (Âₜ + Vₜ), each (batch, response), float32, zero where the mask is False. Not whitened.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> gae(rewards=torch.tensor([[0.0, 1.0]]), values=torch.zeros(1, 2), response_mask=torch.ones(1, 2).bool())
        (tensor([[0.9500, 1.0000]]), tensor([[0.9500, 1.0000]]))

    References:
        Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", eq. 16.
    """
    if rewards.shape != values.shape or values.shape != response_mask.shape:
        msg = (
            f"gae: rewards has shape {tuple(rewards.shape)}, values {tuple(values.shape)}, response_mask "
            f"{tuple(response_mask.shape)}; all are (batch, response). Drop the value after the last token."
        )
        raise ValueError(msg)
    rewards = torch.where(response_mask, rewards.float(), 0.0)
    values = torch.where(response_mask, values.float(), 0.0)
    advantages = torch.zeros_like(rewards)
    following_value = following_advantage = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        following_advantage = delta + gamma * gae_lambda * following_advantage
        following_value = values[:, t]
        advantages[:, t] = following_advantage
    # Padding stands only behind a row's tokens, where rewards and values are zero, so nothing has leaked in from it.
    return torch.where(response_mask, advantages, 0.0), torch.where(response_mask, advantages + values, 0.0)

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


def rewards_to_go(rewards: Tensor, response_mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Return Gₜ = rₜ + γ Gₜ₊₁, what is still to come from each token on.

    Args:
        rewards: Reward of each response token, shape (batch, response).
        response_mask: True where a token counts, shape (batch, response), bool; each row starts with its True places.
        gamma: Discount per token, in [0, 1]; lower looks less far ahead.

    Returns:
        Shape (batch, response), float32, zero where the mask is False.

    Example:
        >>> rewards_to_go(torch.tensor([[1.0, 2.0]]), torch.ones(1, 2).bool(), gamma=0.5)
        tensor([[2., 2.]])

    References:
        Sutton and Barto 2018, "Reinforcement Learning: An Introduction", eq. 3.8.
    """
    zeros = torch.zeros_like(rewards, dtype=torch.float32)
    return gae(rewards=rewards, values=zeros, response_mask=response_mask, gamma=gamma, gae_lambda=1.0)[0]


def leave_one_out(returns: Tensor, group_size: int) -> Tensor:
    """Return each response's return minus the mean return of the *other* responses to its prompt.

    As the baseline does not depend on the response, the policy gradient keeps its expectation.

    Args:
        returns: Sum of the rewards of each response, shape (batch,); the responses to a prompt stand together.
        group_size: Responses to each prompt, at least 2.

    Returns:
        Shape (batch,), float32; each group sums to 0.

    Raises:
        ValueError: If the batch is not made of such groups.

    Example:
        >>> leave_one_out(torch.tensor([1.0, 2.0, 6.0]), group_size=3)
        tensor([-3.0000, -1.5000,  4.5000])

    References:
        Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE-Style Optimization", eq. 8; Kool et al. 2019.
    """
    groups = _grouped("leave_one_out", returns, group_size)
    # r - (sum - r) / (n - 1) = (r - mean) · n / (n - 1)
    return ((groups - groups.mean(dim=1, keepdim=True)) * group_size / (group_size - 1)).flatten()


def group_relative(returns: Tensor, group_size: int, *, scale: bool = True) -> Tensor:
    """Return each response's return minus the mean of its group, divided by the group's standard deviation if asked.

    Args:
        returns: Sum of the rewards of each response, shape (batch,); the responses to a prompt stand together.
        group_size: Responses to each prompt, at least 2.
        scale: True divides by the group's unbiased standard deviation + 1e-4.

    Returns:
        Shape (batch,), float32; each group sums to 0.

    Raises:
        ValueError: If the batch is not made of such groups.

    Example:
        >>> group_relative(torch.tensor([1.0, 3.0]), group_size=2, scale=False)
        tensor([-1.,  1.])

    References:
        Shao et al. 2024, "DeepSeekMath", section 4.1.2; without the scale: Liu et al. 2025, "Understanding R1-Zero-Like
        Training" (Dr. GRPO).
    """
    groups = _grouped("group_relative", returns, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + 1e-4) if scale else centred).flatten()


def _grouped(name: str, returns: Tensor, group_size: int) -> Tensor:
    if group_size < 2 or len(returns) % group_size:
        msg = f"{name}: {len(returns)} returns are no whole groups of {group_size}; give at least 2 a prompt."
        raise ValueError(msg)
    return returns.float().view(-1, group_size)

"""Exact values for problems so small that every response can be listed.

The KL-regularised objective of a prompt is J(π) = E_π[r] - β KL(π ‖ ref). Its maximum is known,
π*(y) = ref(y) exp(r(y) / β) / Z with J* = β log Z, so that on a small enough problem one can say what share of the
possible gain a training run has reached, without sampling error.
"""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from torch import Tensor, nn

from rlhf_lightning.data.collate import collate_sequences
from rlhf_lightning.models.causal_lm import response_logprobs


class Optimum(NamedTuple):
    """The best policy and what it is worth.

    Attributes:
        logprobs: log π* of each response, nats, same shape as the rewards.
        value: J* = β log Z, shape without the last dimension.
    """

    logprobs: Tensor
    value: Tensor


def all_responses(tokens: Sequence[int], *, max_new_tokens: int, stop_ids: Sequence[int] = ()) -> list[list[int]]:
    """List every response that a sampler can return, shorter ones first.

    Args:
        tokens: Every token that the model can draw, stop tokens among them.
        max_new_tokens: Longest response, the stop token included.
        stop_ids: Tokens that end a response; one that is not among ``tokens`` never comes.

    Returns:
        Responses that end with their first stop token, and those of full length without one.

    Example:
        >>> all_responses([5, 2], max_new_tokens=2, stop_ids=[2])
        [[2], [5, 5], [5, 2]]
    """
    going_on = [token for token in tokens if token not in stop_ids]
    ending = [token for token in tokens if token in stop_ids]
    lengths = range(1, max_new_tokens)
    ended = [[*start, end] for n in lengths for start in product(going_on, repeat=n - 1) for end in ending]
    full = [[*start, last] for start in product(going_on, repeat=max_new_tokens - 1) for last in tokens]
    return ended + full


def enumerated_logprobs(
    model: nn.Module, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, temperature: float = 1.0
) -> Tensor:
    """Return the log-probability of each whole response to each prompt, nats, shape (prompts, responses), float64.

    Args:
        model: A causal language model of transformers; gradients flow unless they are switched off outside.
        prompts: Tokens of each prompt, at least one each.
        responses: Tokens of each response, at least one each.
        temperature: Divides the logits; above 0.
    """
    batch = collate_sequences(list(product(prompts, responses)), pad_id=0)
    device = next(model.parameters()).device
    logprobs = response_logprobs(model, type(batch)(*(part.to(device) for part in batch)), temperature=temperature)
    return logprobs.double().sum(dim=1).view(len(prompts), len(responses))


def regularised_value(*, logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Return J = Σ π(y) (r(y) - β (log π(y) - log ref(y))) over the last dimension.

    Args:
        logprobs: log π of every response, nats, shape (..., responses).
        ref_logprobs: log ref of every response, same shape.
        rewards: r of every response, same shape.
        beta: Price of a nat in units of the reward, at least 0.

    Example:
        >>> import torch
        >>> even = torch.tensor([0.5, 0.5]).log()
        >>> regularised_value(logprobs=even, ref_logprobs=even, rewards=torch.tensor([0.0, 1.0]), beta=0.1)
        tensor(0.5000)
    """
    return (logprobs.exp() * (rewards - beta * (logprobs - ref_logprobs))).sum(dim=-1)


def regularised_optimum(*, ref_logprobs: Tensor, rewards: Tensor, beta: float) -> Optimum:
    """Return π*(y) = ref(y) exp(r(y) / β) / Z and J* = β log Z over the last dimension.

    Args:
        ref_logprobs: log ref of every response, nats, shape (..., responses).
        rewards: r of every response, same shape.
        beta: Price of a nat in units of the reward, above 0.

    Example:
        >>> import torch
        >>> even, rewards = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, 1.0])
        >>> best = regularised_optimum(ref_logprobs=even, rewards=rewards, beta=1.0)
        >>> best.logprobs.exp(), best.value
        (tensor([0.2689, 0.7311]), tensor(0.6201))

    References:
        Ziebart 2010, "Modeling Purposeful Adaptive Behavior with the Principle of Maximum Causal Entropy"; Rafailov et
        al. 2023, "Direct Preference Optimization", eq. 4.
    """
    tilted = ref_logprobs + rewards / beta
    log_z = tilted.logsumexp(dim=-1)
    return Optimum(tilted - log_z[..., None], beta * log_z)


def share_reached(*, logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, beta: float) -> float:
    """Return (J - J_ref) / (J* - J_ref), each J the mean over prompts: 0 is the reference, 1 the best there is.

    Args:
        logprobs: log π of every response to every prompt, nats, shape (prompts, responses).
        ref_logprobs: log ref, same shape.
        rewards: r, same shape.
        beta: Price of a nat in units of the reward, above 0.

    Example:
        >>> import torch
        >>> even, rewards = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.0, 1.0]])
        >>> share_reached(logprobs=even, ref_logprobs=even, rewards=rewards, beta=1.0)
        0.0
    """
    reached = regularised_value(logprobs=logprobs, ref_logprobs=ref_logprobs, rewards=rewards, beta=beta).mean()
    start = (ref_logprobs.exp() * rewards).sum(dim=-1).mean()
    best = regularised_optimum(ref_logprobs=ref_logprobs, rewards=rewards, beta=beta).value.mean()
    return float((reached - start) / (best - start))

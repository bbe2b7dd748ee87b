"""Estimators of the KL divergence to the reference from single sampled tokens.

Each takes log-probabilities of tokens that the *policy* sampled, shape (...), nats, and returns an estimate for each
token of KL(policy || reference). After John Schulman, "Approximating KL Divergence" (2020), with d = log policy - log
reference.
"""

import torch
from torch import Tensor


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return d: unbiased, of high variance, negative on about half of the tokens while the models are close.

    Example:
        >>> kl_k1(torch.tensor([-1.0]), torch.tensor([-1.5]))
        tensor([0.5000])
    """
    return logprobs.float() - ref_logprobs.float()


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return d² / 2: biased (little while the models are close), of low variance, never negative.

    Example:
        >>> kl_k2(torch.tensor([-1.0]), torch.tensor([-1.5]))
        tensor([0.1250])
    """
    return kl_k1(logprobs, ref_logprobs).square() / 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return exp(-d) - 1 + d: unbiased, of low variance while the models are close, never negative.

    Example:
        >>> kl_k3(torch.tensor([-1.0]), torch.tensor([-1.5]))
        tensor([0.1065])
    """
    d = kl_k1(logprobs, ref_logprobs)
    return torch.expm1(-d) + d

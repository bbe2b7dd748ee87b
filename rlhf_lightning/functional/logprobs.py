"""Log-probabilities and entropies of tokens, always in float32."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def logprobs_from_logits(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability in nats of each token.

    Args:
        logits: Scores over the vocabulary, already divided by the temperature, shape (..., vocabulary).
        tokens: Token ids, shape (...), int64.

    Returns:
        Shape (...), float32, at most 0.

    Example:
        >>> logprobs_from_logits(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor([-0.6931])
    """
    flat = cross_entropy(logits.float().reshape(-1, logits.shape[-1]), tokens.flatten(), reduction="none")
    return -flat.view(tokens.shape)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Return the entropy in nats of the distribution over the next token.

    Args:
        logits: Scores over the vocabulary, already divided by the temperature, shape (..., vocabulary). A score of
            -inf is a token that cannot come and adds nothing.

    Returns:
        Shape (...), float32, in [0, log vocabulary].

    Example:
        >>> entropy_from_logits(torch.tensor([0.0, 0.0]))
        tensor(0.6931)
    """
    logprobs = logits.float().log_softmax(dim=-1)
    logprobs = torch.where(logprobs.isneginf(), 0.0, logprobs)  # 0 · 1 instead of -inf · 0, in the gradient too
    return -(logprobs * logprobs.exp()).sum(dim=-1)

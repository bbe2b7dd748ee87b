"""How much responses repeat themselves."""

import torch
from torch import Tensor


def repeated_fraction(tokens: Tensor, mask: Tensor, *, n: int = 4) -> Tensor:
    """Return the share of each response's n-grams that occurred in it before.

    Args:
        tokens: Shape (batch, response), int64.
        mask: True on response tokens, which come first, shape (batch, response), bool.
        n: Tokens of an n-gram, at least 1.

    Returns:
        0 to 1, shape (batch,), float32; 0 where a response has fewer than ``n`` tokens.

    Example:
        >>> repeated_fraction(torch.tensor([[5, 6, 5, 6, 5, 6], [1, 2, 3, 4, 0, 0]]), torch.ones(2, 6).bool(), n=2)
        tensor([0.6000, 0.0000])
    """
    shares = []
    for ids, length in zip(tokens.tolist(), mask.sum(dim=1).tolist(), strict=True):
        grams = [tuple(ids[at : at + n]) for at in range(length - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return torch.tensor(shares, dtype=torch.float32, device=tokens.device)

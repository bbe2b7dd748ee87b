"""Statistics over the tokens that count."""

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum what counts, in float32; what lies under a False mask, NaN included, changes nothing.

    Args:
        x: Values, any shape.
        mask: True where a value counts, same shape as ``x``, bool.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> masked_sum(torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([True, True, False]))
        tensor(3.)
    """
    if x.shape != mask.shape:
        msg = f"masked_sum: x has shape {tuple(x.shape)} but mask has {tuple(mask.shape)}; both must be the same."
        raise ValueError(msg)
    return torch.where(mask, x.float(), 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average what counts, in float32; NaN where nothing counts.

    Args:
        x: Values, any shape.
        mask: True where a value counts, same shape as ``x``, bool.

    Example:
        >>> masked_mean(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False]))
        tensor(1.5000)
    """
    return masked_sum(x, mask) / mask.sum()


def masked_var(x: Tensor, mask: Tensor, *, mean: Tensor | None = None) -> Tensor:
    """Return the biased variance (divided by the count) of what counts, in float32.

    Args:
        x: Values, any shape.
        mask: True where a value counts, same shape as ``x``, bool.
        mean: The mean to measure from; ``None`` takes that of what counts.

    Example:
        >>> masked_var(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
        tensor(1.)
    """
    centre = masked_mean(x, mask) if mean is None else mean
    # Zero first, so that a NaN under the mask stays out of the gradient too.
    return masked_mean((torch.where(mask, x.float(), 0.0) - centre) ** 2, mask)


def whiten(
    x: Tensor, mask: Tensor, *, mean: Tensor | None = None, var: Tensor | None = None, centre: bool = True
) -> Tensor:
    """Scale what counts to variance 1 and, if asked, move it to mean 0.

    Args:
        x: Values, any shape.
        mask: True where a value counts, same shape as ``x``, bool.
        mean: Mean to use instead of that of ``x``, for statistics that span several processes.
        var: Biased variance to use instead of that of ``x``.
        centre: False keeps the mean (rewards); True removes it (advantages).

    Returns:
        Whitened values, float32, zero where the mask is False.

    Example:
        >>> whiten(torch.tensor([1.0, 3.0]), torch.tensor([True, True]))
        tensor([-1.,  1.])

    References:
        Huang et al. 2023, "The N Implementation Details of RLHF with PPO": reward and advantage whitening, with the
        1e-8 inside the root.
    """
    mean = masked_mean(x, mask) if mean is None else mean
    var = masked_var(x, mask, mean=mean) if var is None else var
    scaled = (torch.where(mask, x.float(), 0.0) - mean) * torch.rsqrt(var + 1e-8)
    return torch.where(mask, scaled if centre else scaled + mean, 0.0)

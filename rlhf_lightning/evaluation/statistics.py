"""Means with their uncertainty, paired differences, and how varied a set of texts is.

Everything is float64 and depends on the seed alone. Two means over the same number of values and with the same seed are
resampled alike, so that a paired difference is just the mean of the row-wise differences.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.metrics import pair_points
from rlhf_lightning.seeding import derived_generator

Z_95 = 1.959963984540054
_RESAMPLED_VALUES = 4_000_000
_FLAT = 1e-24  # share of a side's squares that rounding alone may leave as its spread


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval.

    Example:
        >>> Interval(0.5, 0.4, 0.6).contains(0.45)
        True
    """

    mean: float
    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Tell whether ``value`` lies between the ends, the ends included."""
        return self.low <= value <= self.high


def bootstrap_mean(values: Tensor, *, seed: int = 0, resamples: int = 2000) -> Interval:
    """Return the mean with the percentile bootstrap interval of 95 %.

    For values that are all 0 or 1 use :func:`share_interval`: a bootstrap of values that are all the same sees no
    uncertainty.

    Args:
        values: Independent values, such as one score per prompt, shape (rows,).
        seed: Fixes the resamples.
        resamples: More give ends that depend less on the seed; at least 1.

    Raises:
        ValueError: If there are no values or one is not finite.

    Example:
        >>> bootstrap_mean(torch.tensor([1.0, 1.0, 1.0]))
        Interval(mean=1.0, low=1.0, high=1.0)

    References:
        Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3.
    """
    values = _checked("bootstrap_mean", values)
    means = [values[rows].mean(dim=1) for rows in _resampled(len(values), seed, resamples)]
    return Interval(float(values.mean()), *_percentiles(torch.cat(means)))


def bootstrap_ratio(numerators: Tensor, denominators: Tensor, *, seed: int = 0, resamples: int = 2000) -> Interval:
    """Return the sum of the numerators over that of the denominators, with its bootstrap interval over rows.

    A mean per token of texts of unequal length is such a ratio: texts are drawn, not tokens, as those of one text
    hang together.

    Args:
        numerators: Such as the log-probability of each text, shape (rows,).
        denominators: Such as its tokens, above 0, shape (rows,).
        seed: Fixes the resamples.
        resamples: As in :func:`bootstrap_mean`.

    Raises:
        ValueError: If the shapes differ, there are no values, one is not finite, or a denominator is not above 0.

    Example:
        >>> bootstrap_ratio(torch.tensor([-2.0, -6.0]), torch.tensor([1, 3]))
        Interval(mean=-2.0, low=-2.0, high=-2.0)
    """
    _same_rows("bootstrap_ratio", numerators, denominators)
    above, below = _checked("bootstrap_ratio", numerators), _checked("bootstrap_ratio", denominators)
    if bool((below <= 0).any()):
        raise ValueError("bootstrap_ratio: a denominator is not above 0; leave such rows out and say how many.")
    blocks = _resampled(len(above), seed, resamples)
    ratios = [above[rows].sum(dim=1) / below[rows].sum(dim=1) for rows in blocks]
    return Interval(float(above.sum() / below.sum()), *_percentiles(torch.cat(ratios)))


def correlation(values: Tensor, others: Tensor, *, seed: int = 0, resamples: int = 2000) -> Interval | None:
    """Return Pearson's correlation with its bootstrap interval; ``None`` where a side is constant or nearly so.

    Args:
        values: Shape (rows,).
        others: Row i belongs to the same thing as row i of the values, shape (rows,).
        seed: Fixes the resamples.
        resamples: As in :func:`bootstrap_mean`; those that draw but one value again and again are left out.

    Raises:
        ValueError: If the shapes differ, there are no values or one is not finite.

    Example:
        >>> correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])).mean
        -1.0
    """
    _same_rows("correlation", values, others)
    pairs = torch.stack([_checked("correlation", values), _checked("correlation", others)])
    whole = _pearson(pairs)
    if not bool(torch.isfinite(whole)):
        return None
    found = torch.cat([_pearson(pairs[:, rows]) for rows in _resampled(len(values), seed, resamples)])
    return Interval(float(whole), *_percentiles(found[torch.isfinite(found)]))


def paired_difference(values: Tensor, base: Tensor, *, seed: int = 0, resamples: int = 2000) -> Interval:
    """Return the mean of ``values - base`` with its bootstrap interval; row i of both belongs to the same prompt.

    Args:
        values: Shape (rows,).
        base: What they are measured against, shape (rows,).
        seed: Fixes the resamples.
        resamples: As in :func:`bootstrap_mean`.

    Raises:
        ValueError: If the shapes differ, there are no values or one is not finite.

    Example:
        >>> paired_difference(torch.tensor([3.0, 5.0]), torch.tensor([1.0, 3.0]))
        Interval(mean=2.0, low=2.0, high=2.0)
    """
    _same_rows("paired_difference", values, base)
    return bootstrap_mean(values.double() - base.double(), seed=seed, resamples=resamples)


def share_interval(values: Tensor) -> Interval:
    """Return the mean of values in [0, 1] with Wilson's interval of 95 %.

    Unlike the bootstrap it stays honest at the ends: 20 of 20 gives [0.839, 1]. It is exact in its approach for values
    that are 0 or 1, and too wide rather than too narrow for values in between, such as ties that count as half.

    Args:
        values: Shape (rows,), in [0, 1].

    Raises:
        ValueError: If there are no values or one lies outside [0, 1].

    Example:
        >>> [round(number, 3) for number in share_interval(torch.ones(20))]
        [1.0, 0.839, 1.0]

    References:
        Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    values = _checked("share_interval", values)
    if bool((values < 0).any()) or bool((values > 1).any()):
        raise ValueError("share_interval: a value lies outside [0, 1]; use bootstrap_mean for such values.")
    count, share = len(values), float(values.mean())
    scale = 1 + Z_95**2 / count
    centre = (share + Z_95**2 / (2 * count)) / scale
    reach = Z_95 / scale * math.sqrt(share * (1 - share) / count + Z_95**2 / (4 * count**2))
    return Interval(share, min(share, max(0.0, centre - reach)), max(share, min(1.0, centre + reach)))


def mean_interval(values: Tensor, *, seed: int = 0) -> Interval:
    """Return :func:`share_interval` where every value is 0 or 1, else :func:`bootstrap_mean`."""
    is_share = bool(((values == 0) | (values == 1)).all())
    return share_interval(values) if is_share and len(values) else bootstrap_mean(values, seed=seed)


def win_points(scores: Tensor, base: Tensor) -> Tensor:
    """Return 1 where a score is above the base's, 0.5 where both are equal, 0 where it is below, shape (rows,).

    Example:
        >>> win_points(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0]))
        tensor([1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    _same_rows("win_points", scores, base)
    return pair_points(scores, base).double()


def win_rate(scores: Tensor, base: Tensor) -> Interval:
    """Return the share of prompts on which a score is above the base's, ties counted as half, with Wilson's interval.

    Example:
        >>> win_rate(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0])).mean
        0.75
    """
    return share_interval(win_points(scores, base))


def quantiles(values: Tensor, points: Mapping[str, float]) -> dict[str, float]:
    """Return named quantiles, interpolated linearly.

    Args:
        values: Shape (rows,).
        points: Name and share of each, in [0, 1].

    Example:
        >>> quantiles(torch.tensor([0.0, 1.0, 4.0]), {"median": 0.5, "q75": 0.75})
        {'median': 1.0, 'q75': 2.5}
    """
    values = _checked("quantiles", values)
    found = torch.quantile(values, torch.tensor(list(points.values()), dtype=torch.float64))
    return dict(zip(points, found.tolist(), strict=True))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return the number of different n-grams over that of all n-grams, in all texts together; NaN where there are none.

    In (0, 1]; lower is more repetitive. Words are what blanks divide, in lower case, so that models with different
    tokenizers compare. More text lowers it: compare sets of the same prompts and of like length only.

    Args:
        texts: The texts; n-grams do not reach from one to the next.
        n: Words in an n-gram, at least 1.

    Example:
        >>> distinct_n(["the cat the cat", "The dog"], 2)
        0.75

    References:
        Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models".
    """
    if n < 1:
        raise ValueError(f"distinct_n: n is {n}; it must be at least 1.")
    grams = Counter[tuple[str, ...]]()
    for text in texts:
        words = text.lower().split()
        grams.update(zip(*(words[start:] for start in range(n)), strict=False))
    return len(grams) / grams.total() if grams else math.nan


def _resampled(count: int, seed: int, resamples: int) -> Iterator[Tensor]:
    """Yield row numbers drawn with replacement, some resamples at a time, shape (resamples, count)."""
    generator = derived_generator(seed, "bootstrap", count)
    at_once = max(1, _RESAMPLED_VALUES // count)
    for start in range(0, resamples, at_once):
        yield torch.randint(count, (min(at_once, resamples - start), count), generator=generator)


def _percentiles(estimates: Tensor) -> list[float]:
    ends: list[float] = torch.quantile(estimates, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return ends


def _pearson(pairs: Tensor) -> Tensor:
    """Return the correlations of two stacked sides, shape (2, ..., rows); NaN where one side is constant."""
    away = pairs - pairs.mean(dim=-1, keepdim=True)
    (a, b), (spread_a, spread_b) = away, away.square().sum(dim=-1)
    flat = (spread_a <= _FLAT * pairs[0].square().sum(dim=-1)) | (spread_b <= _FLAT * pairs[1].square().sum(dim=-1))
    found = (a * b).sum(dim=-1) / (spread_a * spread_b).sqrt()
    return torch.where(flat, torch.nan, found.clamp(-1, 1))


def _checked(name: str, values: Tensor) -> Tensor:
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name}: values have shape {tuple(values.shape)}; expected (rows,) with at least one row.")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name}: a value is not finite; leave such rows out and say how many.")
    return values.detach().to("cpu", torch.float64)


def _same_rows(name: str, values: Tensor, base: Tensor) -> None:
    if values.shape != base.shape:
        raise ValueError(
            f"{name}: values have shape {tuple(values.shape)} but base has {tuple(base.shape)}; both hold one number a "
            "prompt."
        )

"""Metrics that are right across processes and for uneven last batches.

Each keeps sums and counts (or the values themselves), never an average of batch averages, so that the result is that of
all examples together however they were cut into batches and processes. TRL 1.12 averages per-batch means, so that a
short last batch weighs as much as a full one, and counts a tie as wrong.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}


def _check_pairs(name: str, chosen: Tensor, rejected: Tensor) -> None:
    if chosen.shape != rejected.shape or chosen.ndim != 1:
        msg = (
            f"{name}: chosen has shape {tuple(chosen.shape)} and rejected {tuple(rejected.shape)}; expected one score "
            "per pair, both (batch,)."
        )
        raise ValueError(msg)


def pair_points(scores: Tensor, others: Tensor) -> Tensor:
    """Return 1 where a score is above the other, 0.5 where both are equal, 0 where it is below, shape (rows,), float32.

    Example:
        >>> pair_points(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0]))
        tensor([1.0000, 0.5000, 0.0000])
    """
    return (scores > others).float() + 0.5 * (scores == others).float()


class _PairShare(Metric):
    """Points of the pairs over the most that they could have; what gives points is the subclass's."""

    full_state_update = False
    is_differentiable = False
    most_points: int
    points: Tensor
    pairs: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("points", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("pairs", torch.tensor(0), dist_reduce_fx="sum")

    def _points(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the points of each pair, whole numbers up to ``most_points``, shape (batch,)."""
        raise NotImplementedError

    def update(self, chosen: Tensor, rejected: Tensor) -> None:
        """Count a batch of pairs.

        Args:
            chosen: Score of each chosen response, shape (batch,).
            rejected: Score of each rejected response, shape (batch,).

        Raises:
            ValueError: If the shapes differ or are not (batch,).
        """
        _check_pairs(type(self).__name__, chosen, rejected)
        self.points = self.points + self._points(chosen, rejected).sum()
        self.pairs = self.pairs + chosen.numel()

    def compute(self) -> Tensor:
        """Return the share over every pair of every process, a scalar."""
        return self.points / (self.most_points * self.pairs)


class RewardAccuracy(_PairShare):
    """Share of pairs whose chosen response scores higher than the rejected one; a tie counts as half.

    A reward model that gives every response the same score thus has accuracy 0.5, as one that guesses has; where ties
    count as wrong (TRL), it has 0. A pair with a NaN score counts as wrong. In [0, 1]; NaN before the first update.

    Example:
        >>> accuracy = RewardAccuracy()
        >>> accuracy.update(torch.tensor([2.0, 1.0, 0.0, 3.0]), torch.tensor([1.0, 1.0, 4.0, 2.0]))
        >>> accuracy.compute()
        tensor(0.6250)
    """

    higher_is_better = True
    most_points = 2

    def _points(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return (2 * pair_points(chosen, rejected)).long()


class TieShare(_PairShare):
    """Share of pairs whose two scores are exactly equal, in [0, 1].

    Above about 0.01 the scores are too coarse (bfloat16 has 8 bits), or the model does not see where the responses
    differ.

    Example:
        >>> ties = TieShare()
        >>> ties.update(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]))
        >>> ties.compute()
        tensor(0.5000)
    """

    higher_is_better = False
    most_points = 1

    def _points(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return (chosen == rejected).long()


class MarginStatistics(Metric):
    """Distribution of the margins, score of the chosen response minus score of the rejected one.

    Every margin is kept (4 bytes a pair), so that the quantiles are those of all pairs and not an average of the
    processes' quantiles. The margins are sorted first: the result does not depend on the order in which they came.

    Example:
        >>> margins = MarginStatistics()
        >>> margins.update(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 3.0, -4.0]))
        >>> {name: round(value.item(), 3) for name, value in margins.compute().items()}
        {'mean': 1.0, 'std': 2.449, 'q05': -1.7, 'q25': -0.5, 'median': 1.0, 'q75': 2.5, 'q95': 3.7}
        >>> margins.gather()
        tensor([-2.,  1.,  4.])
    """

    is_differentiable = False
    full_state_update = False
    margins: list[Tensor] | Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("margins", [], dist_reduce_fx="cat")

    def update(self, chosen: Tensor, rejected: Tensor) -> None:
        """Keep the margins of a batch of pairs.

        Args:
            chosen: Score of each chosen response, shape (batch,).
            rejected: Score of each rejected response, shape (batch,).

        Raises:
            ValueError: If the shapes differ or are not (batch,).
        """
        _check_pairs("MarginStatistics", chosen, rejected)
        assert isinstance(self.margins, list)
        self.margins.append(chosen.detach().float() - rejected.detach().float())

    def compute(self) -> dict[str, Tensor]:
        """Return mean, std (divided by the count), q05, q25, median, q75 and q95 of all pairs, each a scalar.

        Quantiles between two margins are interpolated linearly. All are NaN where there was no pair.
        """
        margins = self._sorted()
        if not margins.numel():
            return dict.fromkeys(("mean", "std", *QUANTILES), margins.new_tensor(torch.nan))
        points = torch.quantile(margins, margins.new_tensor(list(QUANTILES.values())))
        quantiles = dict(zip(QUANTILES, points.unbind(), strict=True))
        return {"mean": margins.mean(), "std": margins.std(correction=0), **quantiles}

    def gather(self) -> Tensor:
        """Return every margin of every process, ascending, shape (pairs,): what a histogram is drawn from.

        Every process must call it, as it gathers.
        """
        with self.sync_context():
            return self._sorted()

    def _sorted(self) -> Tensor:
        """Return the margins at hand (after synchronisation: of all processes), ascending."""
        margins = self.margins
        if isinstance(margins, list) and not margins:
            return torch.empty(0, device=self.device)
        return dim_zero_cat(margins).sort().values


class MaskedMean(Metric):
    """Mean over everything that counts, such as a loss per response token, over batches and processes of any size.

    Example:
        >>> mean = MaskedMean()
        >>> mean.update(torch.tensor([[1.0, 2.0, torch.nan]]), torch.tensor([[True, True, False]]))
        >>> mean.update(torch.tensor(5.0), torch.tensor(6))  # a batch whose 6 tokens have mean loss 5
        >>> mean.compute()
        tensor(4.1250)
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Tensor, counts: Tensor | int | None = None) -> None:
        """Add values.

        Args:
            values: Any shape; a mean of several values may stand for them.
            counts: How many each value stands for, bool (a mask, True counts) or integer, same shape as ``values``; a
                value with count 0, NaN included, changes nothing. ``None`` counts each value once.

        Raises:
            ValueError: If the shapes differ or the counts are not whole numbers.
        """
        values = values.detach().float()
        number = torch.ones_like(values, dtype=torch.long) if counts is None else torch.as_tensor(counts)
        if number.shape != values.shape or number.is_floating_point():
            msg = (
                f"MaskedMean: values has shape {tuple(values.shape)} but counts has {tuple(number.shape)} and dtype "
                f"{number.dtype}; expected the same shape, bool or integer."
            )
            raise ValueError(msg)
        number = number.to(values.device)
        self.total = self.total + torch.where(number > 0, values * number, 0.0).sum()
        self.count = self.count + number.sum()

    def compute(self) -> Tensor:
        """Return the mean over every process, a scalar; NaN where nothing counted."""
        return self.total / self.count

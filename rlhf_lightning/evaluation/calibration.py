"""Whether margins between scores mean what they say: does sigmoid(margin) match the share that is preferred?

Under the Bradley-Terry model a response is preferred to another with probability σ(s - s'). The margin of a labelled
pair, chosen minus rejected, states that probability for what was in fact preferred.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_lightning.evaluation.statistics import Interval, bootstrap_mean, share_interval

_HALVINGS = 80


class ReliabilityBin(NamedTuple):
    """Pairs of which a reward model was about equally sure.

    Attributes:
        low: Smallest confidence that falls into the bin.
        high: From here on it falls into the next.
        confidence: Mean confidence of its pairs, σ of the size of the margin, in [0.5, 1].
        share: Share of them in which the response that it prefers was indeed chosen, ties as half, with Wilson's
            interval.
        pairs: How many there are.
    """

    low: float
    high: float
    confidence: float
    share: Interval
    pairs: int


class Calibration(NamedTuple):
    """How well margins state probabilities.

    Attributes:
        bins: By confidence, ascending; empty ones are left out.
        expected_error: Mean distance of confidence and share over the bins, weighted by their pairs, in [0, 1].
        brier: Mean of (1 - σ(margin))², in [0, 1]; 0.25 for one that always says 0.5.
        log_loss: Mean of -log σ(margin), nats; log 2 for one that always says 0.5.
        temperature: What the margins must be divided by for the smallest log-loss on these very pairs: above 1 the
            model is too sure, below 1 not sure enough. 0 where no pair is wrong, infinite where the margins are no
            better than none.
        log_loss_at_temperature: That smallest log-loss, nats.
    """

    bins: list[ReliabilityBin]
    expected_error: float
    brier: Interval
    log_loss: Interval
    temperature: float
    log_loss_at_temperature: float


def calibrate(margins: Tensor, *, bins: int = 10, seed: int = 0) -> Calibration:
    """Measure how well margins state the probability of what was preferred.

    Args:
        margins: Score of the chosen response minus that of the rejected one, shape (pairs,).
        bins: Of equal width over confidences from 0.5 to 1, at least 1; more show more and are noisier.
        seed: Fixes the resamples of the intervals.

    Raises:
        ValueError: If there are no pairs, a margin is not finite, or there is no bin.

    Example:
        >>> found = calibrate(torch.tensor([2.0, 2.0, 2.0, -2.0]))
        >>> round(found.bins[0].confidence, 3), found.bins[0].share.mean, round(found.expected_error, 3)
        (0.881, 0.75, 0.131)

    References:
        Guo et al. 2017, "On Calibration of Modern Neural Networks": expected calibration error (eq. 3) and temperature
        scaling (section 4.2). Brier 1950, "Verification of Forecasts Expressed in Terms of Probability".
    """
    margins = margins.detach().to("cpu", torch.float64)
    found = reliability_bins(margins, bins=bins)
    pairs = sum(one.pairs for one in found)
    temperature = best_temperature(margins)
    return Calibration(
        bins=found,
        expected_error=sum(one.pairs * abs(one.share.mean - one.confidence) for one in found) / pairs,
        brier=bootstrap_mean((1 - margins.sigmoid()).square(), seed=seed),
        log_loss=bootstrap_mean(-logsigmoid(margins), seed=seed),
        temperature=temperature,
        log_loss_at_temperature=_log_loss_at(margins, temperature),
    )


def reliability_bins(margins: Tensor, *, bins: int = 10) -> list[ReliabilityBin]:
    """Sort pairs by how sure the model was, and count how often it was right.

    The label of every pair is "chosen", so σ(margin) itself has nothing to be compared with; the confidence in the
    response that the model prefers has.

    Args:
        margins: Chosen minus rejected, shape (pairs,).
        bins: Of equal width over [0.5, 1], at least 1.

    Raises:
        ValueError: If there is no bin.
    """
    if bins < 1:
        raise ValueError(f"reliability_bins: bins is {bins}; it must be at least 1.")
    confidence = margins.double().abs().sigmoid()
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    places = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    found = []
    for place in places.unique().tolist():
        own = places == place
        edges = 0.5 + 0.5 * place / bins, 0.5 + 0.5 * (place + 1) / bins
        found.append(ReliabilityBin(*edges, float(confidence[own].mean()), share_interval(right[own]), int(own.sum())))
    return found


def best_temperature(margins: Tensor) -> float:
    """Return the T above 0 that makes the mean of -log σ(margin / T) smallest.

    The loss is convex in 1 / T; its slope is halved down to the last bit.

    Args:
        margins: Chosen minus rejected, shape (pairs,), finite.

    Returns:
        0 where every margin is at least 0 and one is above, as surer is then always better; infinity where the mean
        margin is not above 0, as no size of them is then better than none.

    Example:
        >>> round(best_temperature(torch.tensor([2.0, 2.0, 2.0, -2.0])), 4)  # σ(2 / T) = 3 / 4, so T = 2 / log 3
        1.8205
    """
    margins = margins.double()
    if float(margins.mean()) <= 0:
        return math.inf
    if bool((margins >= 0).all()):
        return 0.0
    margins = margins / (unit := float(margins.abs().max()))
    low, high = 0.0, 1.0
    while _slope(margins, high) > 0:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _slope(margins, middle) > 0 else (low, middle)
    return unit / ((low + high) / 2)


def _slope(margins: Tensor, sharpness: float) -> float:
    """Return the slope of the mean of log σ(sharpness · margin), which falls as the sharpness grows."""
    return float((margins * (-sharpness * margins).sigmoid()).mean())


def _log_loss_at(margins: Tensor, temperature: float) -> float:
    if temperature == 0:  # a tie stays a tie
        return math.log(2) * float((margins == 0).double().mean())
    return float(-logsigmoid(margins / temperature).mean())

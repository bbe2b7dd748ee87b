"""What is done to a response's score between the reward source and the policy: clipping, normalising, penalties."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.distributed import global_sum
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.rewards import (
    Moments,
    clip_scores,
    merge_moments,
    missing_eos_penalty,
    missing_eos_score,
    normalize_scores,
)


class ScoreTransform:
    """Base of the transforms of scores; they are applied in the order in which they are listed.

    A transform sees the part of the score that is paid at the last token; dense rewards of single tokens pass it by.
    The log keeps the raw score.
    """

    def __call__(self, scores: Tensor, finished: Tensor, *, update: bool = True) -> Tensor:
        """Return the scores that the policy is trained on.

        Args:
            scores: Shape (batch,), float32.
            finished: True where the response stopped by itself, shape (batch,), bool.
            update: False leaves running statistics as they are, for responses that are not trained on.

        Returns:
            Shape (batch,), float32.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of an earlier run."""


class ScoreClip(ScoreTransform):
    """Clip scores, so that a few extreme ones do not rule an update.

    Args:
        limit: Scores are cut to [-limit, limit]; above 0, in units of the score. Smaller cuts more; leave the transform
            out for none. After :class:`RunningNormalization` it counts in standard deviations.

    References:
        Zheng et al. 2023, "Secrets of RLHF in Large Language Models Part I: PPO", section 5.3.1.
    """

    def __init__(self, limit: float = 5.0) -> None:
        if not limit > 0:
            raise UserError(f"ScoreClip: limit is {limit}; it must be above 0 (leave ScoreClip out for no clipping).")
        self.limit = limit

    def __call__(self, scores: Tensor, finished: Tensor, *, update: bool = True) -> Tensor:
        """Return the clipped scores."""
        return clip_scores(scores, self.limit)


class RunningNormalization(ScoreTransform):
    """Divide scores by the standard deviation of all scores seen so far, over all iterations and processes.

    A batch is taken into the statistics first and is normalised by them afterwards, so that the very first one is
    normalised already. While all scores seen were equal, nothing is divided.

    Args:
        center: True also subtracts their running mean; False keeps the sign of each score. A constant shift
            leaves the expected gradient of a score that is paid once a response as it is, and changes nothing at all
            for estimators that compare a group; it matters to a critic that has yet to learn it, and beside
            ``MissingEOSScore`` and ``ScoreClip``, which hold the scores against fixed numbers.

    References:
        Zheng et al. 2023, "Secrets of RLHF in Large Language Models Part I: PPO", section 5.3.1; the merging of means
        and variances is that of Chan, Golub & LeVeque 1979.
    """

    def __init__(self, center: bool = True) -> None:
        self.center = center
        self.moments = Moments(number=0, mean=0.0, squares=0.0)

    @property
    def std(self) -> float:
        """Standard deviation of all scores seen (divided by their count); 0 before the first."""
        return math.sqrt(self.moments.squares / max(self.moments.number, 1))

    def __call__(self, scores: Tensor, finished: Tensor, *, update: bool = True) -> Tensor:
        """Take the batch in, then return it normalised.

        Raises:
            UserError: If a score of any process is not finite, as it would spoil the statistics for good.
        """
        if update:
            batch = global_moments(scores)
            if not math.isfinite(batch.mean + batch.squares):
                raise UserError("RunningNormalization: a score is not finite; look at what the reward source returns.")
            self.moments = merge_moments(self.moments, batch)
        mean, std = self.moments.mean, self.std
        # Equal scores differ by rounding from their own mean, which is nothing to divide by.
        known = std > 1e-6 * max(1.0, abs(mean))
        return normalize_scores(scores, mean=mean if self.center else 0.0, std=std if known else 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return how many scores were seen, their mean and the sum of their squared deviations."""
        return self.moments._asdict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self.moments = Moments(int(state["number"]), float(state["mean"]), float(state["squares"]))


class MissingEOSPenalty(ScoreTransform):
    """Subtract a penalty from the score of each response that never stopped by itself.

    Args:
        penalty: In units of the score, at least 0; larger teaches the policy to end sooner, 0 is off.

    References:
        TRL's ``missing_eos_penalty``.
    """

    def __init__(self, penalty: float = 1.0) -> None:
        if not 0 <= penalty < math.inf:
            raise UserError(f"MissingEOSPenalty: penalty is {penalty}; it must be at least 0 (0 is off).")
        self.penalty = penalty

    def __call__(self, scores: Tensor, finished: Tensor, *, update: bool = True) -> Tensor:
        """Return the scores less the penalty."""
        return missing_eos_penalty(scores, finished, self.penalty)


class MissingEOSScore(ScoreTransform):
    """Give each response that never stopped by itself a fixed score, whatever the reward source said of it.

    A reward model was trained on whole responses; what it says of one that was cut off means little.

    Args:
        score: In units of the score; should lie below what responses that stop usually get. Leave the transform out for
            none.

    References:
        Huang et al. 2023, "The N Implementation Details of RLHF with PPO", which takes -1.
    """

    def __init__(self, score: float = -1.0) -> None:
        if not math.isfinite(score):
            raise UserError(f"MissingEOSScore: score is {score}; it must be finite.")
        self.score = score

    def __call__(self, scores: Tensor, finished: Tensor, *, update: bool = True) -> Tensor:
        """Return the scores with those of unfinished responses replaced."""
        return missing_eos_score(scores, finished, self.score)


def load_transforms(transforms: Sequence[ScoreTransform], saved: Sequence[Mapping[str, Any]]) -> None:
    """Give transforms the states that a checkpoint holds; those without a state may come and go.

    Args:
        transforms: The transforms.
        saved: ``class`` and ``state`` of each of the earlier run, in order.

    Raises:
        UserError: If others kept a state then, or in another order.
    """
    kept = [(each["class"], each["state"]) for each in saved if each["state"]]
    own = [transform for transform in transforms if transform.state_dict()]
    names, expected = [type(transform).__name__ for transform in own], [name for name, _ in kept]
    if names != expected:
        raise UserError(
            f"score_transforms: the checkpoint holds statistics of {', '.join(expected) or 'none'}, but this run keeps "
            f"some in {', '.join(names) or 'none'}; resume with the same, or start a new run from the exported model."
        )
    for transform, (_, state) in zip(own, kept, strict=True):
        transform.load_state_dict(state)


def global_moments(scores: Tensor) -> Moments:
    """Return count, mean and sum of squared deviations of the scores of all processes.

    Args:
        scores: Those of this process, shape (batch,).
    """
    scores = scores.detach().float()
    total, count = global_sum(torch.stack([scores.sum(), scores.new_tensor(len(scores))])).tolist()
    mean = total / count
    return Moments(int(count), mean, float(global_sum(((scores - mean) ** 2).sum())))

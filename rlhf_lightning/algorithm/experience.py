"""From what a rollout found to what an update trains on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_lightning.algorithm.advantages import AdvantageEstimator
from rlhf_lightning.algorithm.kl import KLControl
from rlhf_lightning.algorithm.score_transforms import ScoreTransform
from rlhf_lightning.functional.rewards import token_rewards
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.rollout.collect import Rollout


@dataclass(frozen=True)
class Experience:
    """What an update trains on, one row a response.

    Attributes:
        sequences: Prompts and responses.
        response_mask: True where a token counts, shape (batch, response), bool.
        old_logprobs: Log-probabilities at rollout, shape (batch, response); so are all below.
        ref_logprobs: Log-probabilities of the reference.
        old_values: Values at rollout; zeros where there is no critic.
        rewards: Reward of each token, KL penalty included.
        advantages: What the policy is trained on.
        returns: What the critic is trained on.
    """

    sequences: SequenceBatch
    response_mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    old_values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor

    def select(self, rows: Tensor) -> "Experience":
        """Return these rows, cut to the longest response among them."""
        sequences = self.sequences.select(rows)
        width = int(sequences.response_lengths.max())
        tensors = {name: value[rows, :width] for name, value in vars(self).items() if name != "sequences"}
        return Experience(sequences=sequences, **tensors)


def estimate_experience(
    rollout: Rollout,
    *,
    kl: KLControl,
    advantages: AdvantageEstimator,
    score_transforms: Sequence[ScoreTransform] = (),
) -> Experience:
    """Turn scores into token rewards, and those into advantages and returns.

    Args:
        rollout: What was sampled and scored.
        kl: Estimator, price and place of the divergence from the reference.
        advantages: The advantage estimator.
        score_transforms: Applied in order to the part of the score that is paid at the last token.
    """
    mask, per_token = rollout.sequences.response_mask, rollout.scores.per_token
    divergence = torch.where(mask, kl.estimate(rollout.old_logprobs, rollout.ref_logprobs), 0.0)
    scores = rollout.scores.total
    if per_token is not None:
        scores = scores - torch.where(mask, per_token, 0.0).sum(dim=1)
    for transform in score_transforms:
        scores = transform(scores, rollout.finished)
    rewards = token_rewards(
        scores=scores, kl=divergence, response_mask=mask, kl_coef=kl.reward_coef, per_token=per_token
    )
    estimate = advantages.estimate(
        rewards=rewards, values=rollout.old_values, response_mask=mask, group_size=rollout.group_size
    )
    return Experience(
        sequences=rollout.sequences,
        response_mask=mask,
        old_logprobs=rollout.old_logprobs,
        ref_logprobs=rollout.ref_logprobs,
        old_values=rollout.old_values,
        rewards=rewards,
        advantages=estimate.advantages,
        returns=estimate.returns,
    )

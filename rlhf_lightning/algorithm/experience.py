"""From what a rollout found to what an update trains on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_lightning.algorithm.advantages import GAE
from rlhf_lightning.algorithm.kl import KLControl
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
        old_values: Values at rollout.
        kl: Estimated KL to the reference at each token, nats.
        rewards: Reward of each token, KL penalty included.
        advantages: What the policy is trained on.
        returns: What the critic is trained on.
    """

    sequences: SequenceBatch
    response_mask: Tensor
    old_logprobs: Tensor
    old_values: Tensor
    kl: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor

    def select(self, rows: Tensor) -> "Experience":
        """Return these rows, cut to the longest response among them."""
        sequences = self.sequences.select(rows)
        width = int(sequences.response_lengths.max())
        tensors = {name: value[rows, :width] for name, value in vars(self).items() if name != "sequences"}
        return Experience(sequences=sequences, **tensors)


def estimate_experience(rollout: Rollout, *, kl: KLControl, advantages: GAE) -> Experience:
    """Turn scores into token rewards, and those into advantages and returns.

    Args:
        rollout: What was sampled and scored.
        kl: Estimator and price of the divergence from the reference.
        advantages: The advantage estimator.
    """
    mask = rollout.sequences.response_mask
    divergence = torch.where(mask, kl.estimate(rollout.old_logprobs, rollout.ref_logprobs), 0.0)
    rewards = token_rewards(scores=rollout.scores.total, kl=divergence, response_mask=mask, kl_coef=kl.coef)
    estimate = advantages.estimate(rewards=rewards, values=rollout.old_values, response_mask=mask)
    return Experience(
        sequences=rollout.sequences,
        response_mask=mask,
        old_logprobs=rollout.old_logprobs,
        old_values=rollout.old_values,
        kl=divergence,
        rewards=rewards,
        advantages=estimate.advantages,
        returns=estimate.returns,
    )

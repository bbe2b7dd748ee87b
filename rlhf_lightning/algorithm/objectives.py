"""What an update minimises."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.losses import (
    PolicyLoss,
    ValueLoss,
    fixed_length_weights,
    ppo_policy_loss,
    ppo_value_loss,
    sequence_mean_weights,
    token_mean_weights,
)


class MinibatchSize(NamedTuple):
    """Size of a minibatch over all processes, divided by their number, as gradients are averaged over them."""

    num_tokens: Tensor
    num_sequences: Tensor


class Normalization(ABC):
    """How a minibatch's token losses become one number, whatever its cut into micro-batches and processes."""

    @abstractmethod
    def weights(self, response_mask: Tensor, size: MinibatchSize) -> Tensor:
        """Return the weight of each token of a micro-batch, shape (batch, response), zero where masked."""


class TokenMean(Normalization):
    """The mean over all tokens of a minibatch: a response weighs as much as it has tokens."""

    def weights(self, response_mask: Tensor, size: MinibatchSize) -> Tensor:
        """Return one over the tokens."""
        return token_mean_weights(response_mask, num_tokens=size.num_tokens)


class SequenceMean(Normalization):
    """The mean over responses of each one's mean over its tokens, as in GRPO.

    Not the gradient of the expected score where lengths differ: a token of a longer response weighs less.
    """

    def weights(self, response_mask: Tensor, size: MinibatchSize) -> Tensor:
        """Return one over responses and over a response's tokens."""
        return sequence_mean_weights(response_mask, num_sequences=size.num_sequences)


class FixedLength(Normalization):
    """The mean over responses of each one's token sum over a constant, as in Dr. GRPO: no bias in length.

    Args:
        length: The constant in tokens, at least 1; ``max_new_tokens`` is usual. Twice as much is half the step.
    """

    def __init__(self, length: int) -> None:
        if length < 1:
            raise UserError(f"FixedLength: length is {length}; it must be at least 1.")
        self.length = length

    def weights(self, response_mask: Tensor, size: MinibatchSize) -> Tensor:
        """Return one over responses and the constant."""
        return fixed_length_weights(response_mask, length=self.length, num_sequences=size.num_sequences)


class PolicyObjective(ABC):
    """Base of what the policy minimises.

    Args:
        target_kl: See :class:`ClippedObjective`, as the others.
        entropy_coef: Weight of the entropy bonus, which the module adds.
        normalization: How token losses become one number.
    """

    def __init__(self, target_kl: float | None, entropy_coef: float, normalization: Normalization | None) -> None:
        _require_above(0, target_kl=target_kl)
        if not 0 <= entropy_coef < math.inf:
            raise UserError(f"policy_objective: entropy_coef is {entropy_coef}; it must be at least 0 (0 is off).")
        self.target_kl, self.entropy_coef = target_kl, entropy_coef
        self.normalization = normalization or TokenMean()

    @abstractmethod
    def loss(
        self,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        token_weights: Tensor,
    ) -> PolicyLoss:
        """Return the loss of a micro-batch as its part of the minibatch's, without the entropy bonus."""


class ClippedObjective(PolicyObjective):
    """PPO's clipped surrogate.

    Args:
        clip_range: ε > 0: a token whose probability has moved by more than this share no longer pulls; larger lets one
            rollout move the policy further, infinity turns clipping off.
        clip_range_high: Upper bound apart ("clip-higher"), above 0; larger lets unlikely tokens gain more. ``None``
            takes ``clip_range``.
        dual_clip: c > 1: the loss of a token of negative advantage is at most c times that advantage, however much
            likelier it became; usual is 3. ``None`` is off.
        log_ratio_guard: In nats, above 0: a token whose log ratio is further than this from 0 is left out of the loss
            and counted in ``train/guarded_fraction``. ``None`` is off.
        target_kl: In nats a token, above 0: an update ends, in all processes alike, at the first minibatch whose mean
            ``approx_kl`` to the policy of the rollout is above; that step is not taken, and a separate critic learns
            no more from that rollout either. Tokens beyond ``log_ratio_guard`` count as 0. ``None`` is off.
        entropy_coef: Weight of the entropy bonus, at least 0; higher keeps the policy more random, 0 is off.
        normalization: ``TokenMean``, ``SequenceMean`` or ``FixedLength``; ``None`` is ``TokenMean()``.

    References:
        Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7 and 9; Yu et al. 2025, "DAPO", section
        3.1 (the upper bound apart); Ye et al. 2020, "Mastering Complex Control in MOBA Games", eq. 5 (dual clip);
        stopping by the KL: OpenAI's Spinning Up.
    """

    def __init__(
        self,
        clip_range: float = 0.2,
        clip_range_high: float | None = None,
        dual_clip: float | None = None,
        log_ratio_guard: float | None = None,
        target_kl: float | None = None,
        entropy_coef: float = 0.0,
        normalization: Normalization | None = None,
    ) -> None:
        super().__init__(target_kl, entropy_coef, normalization)
        _require_above(0, clip_range=clip_range, clip_range_high=clip_range_high, log_ratio_guard=log_ratio_guard)
        _require_above(1, dual_clip=dual_clip)
        self.clip_range, self.clip_range_high = clip_range, clip_range_high
        self.dual_clip, self.log_ratio_guard = dual_clip, log_ratio_guard

    def loss(
        self,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        token_weights: Tensor,
    ) -> PolicyLoss:
        """Return the loss of a micro-batch as its part of the minibatch's, without the entropy bonus."""
        return ppo_policy_loss(
            logprobs=logprobs,
            old_logprobs=old_logprobs,
            advantages=advantages,
            response_mask=response_mask,
            clip_range=self.clip_range,
            clip_range_high=self.clip_range_high,
            dual_clip=self.dual_clip,
            log_ratio_guard=self.log_ratio_guard,
            token_weights=token_weights,
        )


class ClippedValueObjective:
    """The clipped squared error of the values, averaged over the tokens of a minibatch.

    Args:
        coef: Weight beside the policy loss, at least 0.
        value_clip_range: Furthest a value counts as moved from the rollout's, in units of the score, above 0; ``None``
            turns clipping off.

    References:
        Huang et al. 2023, "The N Implementation Details of RLHF with PPO": coefficient 0.1, range 0.2.
    """

    def __init__(self, coef: float = 0.1, value_clip_range: float | None = 0.2) -> None:
        if not 0 <= coef < math.inf:
            raise UserError(f"ClippedValueObjective: coef is {coef}; it must be at least 0.")
        if value_clip_range is not None and not value_clip_range > 0:
            raise UserError(
                f"ClippedValueObjective: value_clip_range is {value_clip_range}; it must be above 0, or null for none."
            )
        self.coef, self.value_clip_range = coef, value_clip_range

    def loss(
        self, *, values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, token_weights: Tensor
    ) -> ValueLoss:
        """Return the loss of a micro-batch as its part of the minibatch's, before ``coef``."""
        return ppo_value_loss(
            values=values,
            old_values=old_values,
            returns=returns,
            response_mask=response_mask,
            value_clip_range=self.value_clip_range,
            token_weights=token_weights,
        )


def _require_above(bound: float, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > bound:
            raise UserError(f"policy_objective: {name} is {value}; it must be above {bound}.")

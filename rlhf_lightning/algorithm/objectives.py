"""What an update minimises."""

from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.losses import PolicyLoss, ValueLoss, ppo_policy_loss, ppo_value_loss


class ClippedObjective:
    """PPO's clipped surrogate.

    Args:
        clip_range: ε > 0: a token whose probability has moved by more than this share no longer pulls; larger lets one
            rollout move the policy further, infinity turns clipping off.

    References:
        Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7.
    """

    def __init__(self, clip_range: float = 0.2) -> None:
        if clip_range <= 0:
            raise UserError(f"ClippedObjective: clip_range is {clip_range}; it must be above 0.")
        self.clip_range = clip_range

    def loss(
        self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor, num_tokens: Tensor
    ) -> PolicyLoss:
        """Return the loss of a micro-batch as its part of the minibatch's; see ``functional.losses``."""
        return ppo_policy_loss(
            logprobs=logprobs,
            old_logprobs=old_logprobs,
            advantages=advantages,
            response_mask=response_mask,
            clip_range=self.clip_range,
            num_tokens=num_tokens,
        )


class ClippedValueObjective:
    """The clipped squared error of the values.

    Args:
        coef: Weight beside the policy loss, at least 0.
        value_clip_range: Furthest a value counts as moved from the rollout's, in units of the score, above 0; ``None``
            turns clipping off.

    References:
        Huang et al. 2023, "The N Implementation Details of RLHF with PPO": coefficient 0.1, range 0.2.
    """

    def __init__(self, coef: float = 0.1, value_clip_range: float | None = 0.2) -> None:
        if coef < 0:
            raise UserError(f"ClippedValueObjective: coef is {coef}; it must be at least 0.")
        if value_clip_range is not None and value_clip_range <= 0:
            raise UserError(
                f"ClippedValueObjective: value_clip_range is {value_clip_range}; it must be above 0, or null for none."
            )
        self.coef, self.value_clip_range = coef, value_clip_range

    def loss(
        self, *, values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, num_tokens: Tensor
    ) -> ValueLoss:
        """Return the loss of a micro-batch as its part of the minibatch's, before ``coef``."""
        return ppo_value_loss(
            values=values,
            old_values=old_values,
            returns=returns,
            response_mask=response_mask,
            value_clip_range=self.value_clip_range,
            num_tokens=num_tokens,
        )

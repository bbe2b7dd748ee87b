"""From the rewards of a rollout to the advantages that the policy is trained on."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.distributed import global_mean_var
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.advantages import gae, group_relative, leave_one_out, rewards_to_go
from rlhf_lightning.functional.masked import whiten

Whitening = Literal["rollout", "minibatch"]


class Advantages(NamedTuple):
    """Advantages for the policy and returns for the critic, each (batch, response), zero where masked."""

    advantages: Tensor
    returns: Tensor


class AdvantageEstimator(ABC):
    """Base of the advantage estimators.

    A new one says in ``needs_critic`` and ``needs_groups`` what it lives on, and implements :meth:`compute`.

    Args:
        whiten: ``rollout`` scales the advantages of the whole rollout, over all processes, to mean 0 and variance 1;
            ``minibatch`` those of each minibatch, of which a single token or equal ones come to 0; ``None`` leaves
            them. Returns are those from before. A KL or an entropy bonus in the loss is not scaled along.
        whiten_rewards: True first scales the token rewards of the whole rollout to variance 1, keeping their mean:
            r / σ + m · (1 - 1 / σ). A KL in the reward is scaled along, one in the loss is not. The second term is
            paid for every token, so that where lengths differ it rewards or punishes length.
    """

    #: Whether ``values`` are needed; where not, no critic is built.
    needs_critic = False
    #: Whether several responses to each prompt are needed.
    needs_groups = False

    def __init__(self, whiten: Whitening | None = None, whiten_rewards: bool = False) -> None:
        if whiten not in ("rollout", "minibatch", None):
            raise UserError(f"{type(self).__name__}: whiten is {whiten!r}; it must be rollout, minibatch or null.")
        self.whiten, self.whiten_rewards = whiten, whiten_rewards

    @abstractmethod
    def compute(self, *, rewards: Tensor, values: Tensor, response_mask: Tensor, group_size: int) -> Advantages:
        """Compute advantages and returns before any whitening; the arguments are those of :meth:`estimate`."""

    def estimate(self, *, rewards: Tensor, values: Tensor, response_mask: Tensor, group_size: int = 1) -> Advantages:
        """Estimate advantages and returns of a rollout.

        Args:
            rewards: Reward of each token, shape (batch, response).
            values: Value before each token, shape (batch, response); zeros where there is no critic.
            response_mask: True where a token counts, shape (batch, response), bool.
            group_size: Responses to each prompt, which stand together.

        Raises:
            UserError: If groups are needed and there are none.
        """
        if self.needs_groups and group_size < 2:
            raise UserError(
                f"{type(self).__name__} compares several responses to a prompt, but got one of each; set "
                "responses_per_prompt of PromptDataModule or collate_prompts to at least 2."
            )
        if self.whiten_rewards:
            rewards = _whitened(rewards, response_mask, centre=False)
        advantages, returns = self.compute(
            rewards=rewards, values=values, response_mask=response_mask, group_size=group_size
        )
        if self.whiten == "rollout":
            advantages = _whitened(advantages, response_mask)
        return Advantages(advantages, returns)

    def of_minibatch(self, advantages: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Return the advantages of a minibatch's micro-batches as the update wants them."""
        if self.whiten != "minibatch":
            return list(advantages)
        sizes = [int(mask.sum()) for mask in masks]
        flat = torch.cat([part[mask] for part, mask in zip(advantages, masks, strict=True)])
        parts = _whitened(flat, torch.ones_like(flat, dtype=torch.bool)).split(sizes)
        return [
            torch.zeros_like(a).masked_scatter(mask, part)
            for a, mask, part in zip(advantages, masks, parts, strict=True)
        ]


class GAE(AdvantageEstimator):
    """Generalised advantage estimation with a critic.

    Args:
        gamma: Discount per token, in [0, 1]; 1 is right for a score that comes at the end.
        gae_lambda: In [0, 1]; 0 trusts the critic most (one step), 1 not at all (Monte Carlo).
        whiten: ``rollout`` scales the advantages of the whole rollout, over all processes, to mean 0 and variance 1;
            ``minibatch`` those of each minibatch; ``None`` leaves them. Returns are those from before.
        whiten_rewards: True first scales the token rewards of the whole rollout to variance 1, keeping their mean.

    References:
        Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation"; whitening:
        Huang et al. 2023, "The N Implementation Details of RLHF with PPO".
    """

    needs_critic = True

    def __init__(
        self,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        whiten: Whitening | None = "rollout",
        whiten_rewards: bool = False,
    ) -> None:
        super().__init__(whiten, whiten_rewards)
        for name, value in (("gamma", gamma), ("gae_lambda", gae_lambda)):
            if not 0 <= value <= 1:
                raise UserError(f"GAE: {name} is {value}; it must lie in [0, 1].")
        self.gamma, self.gae_lambda = gamma, gae_lambda

    def compute(self, *, rewards: Tensor, values: Tensor, response_mask: Tensor, group_size: int) -> Advantages:
        """Run backwards over the tokens."""
        return Advantages(
            *gae(
                rewards=rewards,
                values=values,
                response_mask=response_mask,
                gamma=self.gamma,
                gae_lambda=self.gae_lambda,
            )
        )


class GlobalBaseline(AdvantageEstimator):
    """REINFORCE++: what is still to come from each token on, whitened over the whole rollout; no critic.

    Mean and standard deviation are those of the rollout's tokens in all processes. Scaling by one number for all keeps
    the direction of the gradient, so that its fixed point is the optimum of score - kl_coef · KL where the KL is in the
    reward and minibatches are large (see ``LeaveOneOut`` for small ones under ``TokenMean``).

    Args:
        gamma: Discount per token, in [0, 1].
        whiten: ``rollout`` is the method; ``minibatch`` takes each minibatch's statistics, ``None`` has no baseline.
        whiten_rewards: True first scales the token rewards of the whole rollout to variance 1, keeping their mean.

    References:
        Hu et al. 2025, "REINFORCE++: An Efficient RLHF Algorithm with Robustness to Both Prompt and Reward Models".
    """

    def __init__(self, gamma: float = 1.0, whiten: Whitening | None = "rollout", whiten_rewards: bool = False) -> None:
        super().__init__(whiten, whiten_rewards)
        if not 0 <= gamma <= 1:
            raise UserError(f"GlobalBaseline: gamma is {gamma}; it must lie in [0, 1].")
        self.gamma = gamma

    def compute(self, *, rewards: Tensor, values: Tensor, response_mask: Tensor, group_size: int) -> Advantages:
        """Add up what is still to come."""
        returns = rewards_to_go(rewards, response_mask, gamma=self.gamma)
        return Advantages(returns, returns)


class LeaveOneOut(AdvantageEstimator):
    """RLOO: each response against the mean of the others to its prompt; no critic.

    One advantage for all tokens of a response. The policy gradient is unbiased with ``FixedLength``, and with
    ``TokenMean`` up to the spread of a minibatch's number of tokens, which the loss divides by: where lengths differ,
    small minibatches are biased. With the KL in the reward its fixed point is the optimum of score - kl_coef · KL,
    where all responses to a prompt earn the same and every advantage is 0.

    Args:
        whiten: ``rollout`` scales the advantages of the whole rollout, over all processes, to mean 0 and variance 1;
            ``minibatch`` those of each minibatch; ``None`` is the method.
        whiten_rewards: True first scales the token rewards of the whole rollout to variance 1, keeping their mean.

    References:
        Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback
        in LLMs".
    """

    needs_groups = True

    def compute(self, *, rewards: Tensor, values: Tensor, response_mask: Tensor, group_size: int) -> Advantages:
        """Compare within groups."""
        returns = torch.where(response_mask, rewards, 0.0).sum(dim=1)
        return _on_every_token(leave_one_out(returns, group_size), returns, response_mask)


class GroupRelative(AdvantageEstimator):
    """GRPO: each response against the mean of all to its prompt; no critic.

    One advantage for all tokens of a response. Without ``scale`` it is RLOO's times (n - 1) / n for n responses to a
    prompt, with the same fixed point; a KL in the *loss* is not scaled along, so that a nat then costs
    kl_coef · n / (n - 1).

    With ``scale`` each prompt's gradient is divided by the standard deviation σ of its group: prompts whose responses
    hardly differ weigh as much as others, and noise does not die down near the optimum. Where the KL stands in the
    *loss* (k2), outside of what is scaled, the fixed point is ref · exp(score / (kl_coef · σ)) with σ that of the
    scores under this very policy, so that each prompt has a price of its own; where kl_coef is low, or a prompt's
    scores differ little, there is none but σ = 0, and the policy collapses as if nothing held it. In the *reward* the
    fixed point stays the optimum.

    Args:
        scale: Divide by the group's standard deviation.
        whiten: ``rollout`` scales the advantages of the whole rollout, over all processes, to mean 0 and variance 1;
            ``minibatch`` those of each minibatch; ``None`` is the method.
        whiten_rewards: True first scales the token rewards of the whole rollout to variance 1, keeping their mean.

    References:
        Shao et al. 2024, "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models"; Liu et
        al. 2025, "Understanding R1-Zero-Like Training: A Critical Perspective" (without the scale).
    """

    needs_groups = True

    def __init__(self, scale: bool = True, whiten: Whitening | None = None, whiten_rewards: bool = False) -> None:
        super().__init__(whiten, whiten_rewards)
        self.scale = scale

    def compute(self, *, rewards: Tensor, values: Tensor, response_mask: Tensor, group_size: int) -> Advantages:
        """Compare within groups."""
        returns = torch.where(response_mask, rewards, 0.0).sum(dim=1)
        return _on_every_token(group_relative(returns, group_size, scale=self.scale), returns, response_mask)


def _on_every_token(advantages: Tensor, returns: Tensor, response_mask: Tensor) -> Advantages:
    return Advantages(*(torch.where(response_mask, each[:, None], 0.0) for each in (advantages, returns)))


def _whitened(x: Tensor, mask: Tensor, *, centre: bool = True) -> Tensor:
    mean, var = global_mean_var(x, mask)
    return whiten(x, mask, mean=mean, var=var, centre=centre)

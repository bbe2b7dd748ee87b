"""From the rewards of a rollout to the advantages that the policy is trained on."""

from typing import NamedTuple

from torch import Tensor

from rlhf_lightning.distributed import global_mean_var
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.advantages import gae
from rlhf_lightning.functional.masked import whiten


class Advantages(NamedTuple):
    """Advantages for the policy and returns for the critic, each (batch, response), zero where masked."""

    advantages: Tensor
    returns: Tensor


class GAE:
    """Generalised advantage estimation with a critic.

    Args:
        gamma: Discount per token, in [0, 1]; 1 is right for a score that comes at the end.
        gae_lambda: In [0, 1]; 0 trusts the critic most (one step), 1 not at all (Monte Carlo).
        whiten: True scales the advantages of the whole rollout, over all processes, to mean 0 and variance 1; the
            returns are those from before.

    References:
        Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation".
    """

    def __init__(self, gamma: float = 1.0, gae_lambda: float = 0.95, whiten: bool = True) -> None:
        for name, value in (("gamma", gamma), ("gae_lambda", gae_lambda)):
            if not 0 <= value <= 1:
                raise UserError(f"GAE: {name} is {value}; it must lie in [0, 1].")
        self.gamma, self.gae_lambda, self.whiten = gamma, gae_lambda, whiten

    def estimate(self, *, rewards: Tensor, values: Tensor, response_mask: Tensor) -> Advantages:
        """Estimate advantages and returns of a rollout.

        Args:
            rewards: Reward of each token, shape (batch, response).
            values: Value before each token, shape (batch, response).
            response_mask: True where a token counts, shape (batch, response), bool.
        """
        advantages, returns = gae(
            rewards=rewards, values=values, response_mask=response_mask, gamma=self.gamma, gae_lambda=self.gae_lambda
        )
        if self.whiten:
            mean, var = global_mean_var(advantages, response_mask)
            advantages = whiten(advantages, response_mask, mean=mean, var=var)
        return Advantages(advantages, returns)

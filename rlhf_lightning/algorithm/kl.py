"""How much a nat of divergence from the reference costs, and how that divergence is estimated."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.kl import kl_k1, kl_k2, kl_k3

_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


class KLControl:
    """Base of the KL controllers: a coefficient that may change, and an estimator.

    Args:
        coef: Price of a nat in units of the score, at least 0.
        estimator: ``k1`` is the one whose expected penalty is the KL itself; ``k2`` and ``k3`` have less variance,
            but as a *reward* they pull towards another optimum.
    """

    def __init__(self, coef: float, estimator: Literal["k1", "k2", "k3"] = "k1") -> None:
        if coef < 0:
            raise UserError(f"kl: coef is {coef}; it must be at least 0 (0 turns the penalty off).")
        if estimator not in _ESTIMATORS:
            raise UserError(f"kl: estimator is {estimator!r}; it must be one of {', '.join(_ESTIMATORS)}.")
        self.coef, self.estimator = coef, estimator

    def estimate(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """Estimate KL(policy || reference) at each sampled token, in nats, same shape as the arguments."""
        return _ESTIMATORS[self.estimator](logprobs, ref_logprobs)

    def update(self, sequence_kl: float, num_sequences: int) -> None:
        """Take note of an iteration's mean KL a sequence, over all processes; called once an iteration."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of an earlier run."""
        self.coef = float(state["coef"])


class FixedKL(KLControl):
    """A coefficient that stays.

    Args:
        coef: Price of a nat in units of the score, at least 0; higher keeps the policy closer to the reference, 0 turns
            the penalty off.
        estimator: ``k1``, ``k2`` or ``k3``; see :mod:`rlhf_lightning.functional.kl`.
    """

    def __init__(self, coef: float = 0.05, estimator: Literal["k1", "k2", "k3"] = "k1") -> None:
        super().__init__(coef, estimator)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the configured coefficient: it is a setting here, not a state."""


class AdaptiveKL(KLControl):
    """A coefficient steered so that the KL a sequence stays near a target.

    After an iteration of n sequences: coef ← coef · (1 + clip(KL / target - 1, -0.2, 0.2) · n / horizon).

    Args:
        coef: Where it starts, at least 0.
        target: Wanted KL a sequence, in nats, above 0.
        horizon: Sequences after which the coefficient can have changed by about a fifth; larger is slower.
        estimator: ``k1``, ``k2`` or ``k3``; see :mod:`rlhf_lightning.functional.kl`.

    References:
        Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2.
    """

    def __init__(
        self,
        coef: float = 0.15,
        target: float = 6.0,
        horizon: int = 10_000,
        estimator: Literal["k1", "k2", "k3"] = "k1",
    ) -> None:
        super().__init__(coef, estimator)
        if target <= 0 or horizon < 1:
            raise UserError(f"AdaptiveKL: target is {target} and horizon {horizon}; both must be above 0.")
        self.target, self.horizon = target, horizon

    def update(self, sequence_kl: float, num_sequences: int) -> None:
        """Move the coefficient one step.

        Raises:
            UserError: If an iteration has more sequences than the horizon, which would make the step wild.
        """
        if num_sequences > self.horizon:
            raise UserError(
                f"AdaptiveKL: horizon is {self.horizon}, but an iteration has {num_sequences} sequences; make it "
                "several times as large."
            )
        error = min(max(sequence_kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * num_sequences / self.horizon

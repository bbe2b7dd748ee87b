"""How much a nat of divergence from the reference costs, and how that divergence is estimated."""

import logging
import math
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.kl import kl_k1, kl_k2, kl_k3

log = logging.getLogger(__name__)

Estimator = Literal["k1", "k2", "k3"]
Place = Literal["reward", "loss"]

_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


class KLControl:
    """Base of the KL controllers: a coefficient that may change, an estimator, and the place where it acts.

    Args:
        coef: Price of a nat in units of the score, at least 0.
        estimator: ``k1``, ``k2`` or ``k3``; see :class:`FixedKL`.
        place: ``reward`` or ``loss``; see :class:`FixedKL`.
    """

    def __init__(self, coef: float, estimator: Estimator = "k1", place: Place = "reward") -> None:
        if not 0 <= coef < math.inf:
            raise UserError(f"kl: coef is {coef}; it must be a finite number of at least 0 (0 turns the penalty off).")
        if estimator not in _ESTIMATORS:
            raise UserError(f"kl: estimator is {estimator!r}; it must be one of {', '.join(_ESTIMATORS)}.")
        if place not in ("reward", "loss"):
            raise UserError(f"kl: place is {place!r}; it must be reward or loss.")
        if coef and place == "loss" and estimator == "k1":
            log.warning(
                "kl: k1 in the loss has a gradient of zero in expectation and holds nothing back; take k2 or k3."
            )
        self.coef, self.estimator, self.place = coef, estimator, place

    @property
    def reward_coef(self) -> float:
        """Price of a nat in the token rewards."""
        return self.coef if self.place == "reward" else 0.0

    @property
    def loss_coef(self) -> float:
        """Weight of the estimate in the policy's loss."""
        return self.coef if self.place == "loss" else 0.0

    def estimate(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """Estimate KL(policy || reference) at each sampled token, in nats, same shape as the arguments."""
        return _ESTIMATORS[self.estimator](logprobs, ref_logprobs)

    def check_sequences(self, num_sequences: int) -> None:
        """Refuse, before time is spent, iterations of so many sequences as cannot be steered."""

    def update(self, sequence_kl: float, num_sequences: int) -> None:
        """Take note of an iteration's mean KL a sequence, over all processes.

        Called once an iteration, but not while a critic learns alone: the policy then stays, whatever a nat costs.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of an earlier run."""
        self.coef = float(state["coef"])


class FixedKL(KLControl):
    """A coefficient that stays.

    In the *reward*, ``k1`` makes the optimum of score - coef · KL the fixed point. ``k2`` and ``k3`` there are other
    objectives: they are never negative, so a token less likely than under the reference is punished and not paid, which
    pushes it further down. All but at most one of the tokens that fall below the reference lose all probability; with
    ``k2`` those that stay have ref · exp(√(2 (score - c) / coef)), with ``k3`` the objective has no maximum.

    In the *loss*, the estimate is differentiated token by token. The gradient of ``k2`` is that of the KL; that of
    ``k3`` (GRPO's choice) is the gradient of KL(reference || policy), with the optimum coef · ref / (λ - score) for
    responses of one token; that of ``k1`` is zero in expectation and holds nothing back. A longer response's early
    tokens get no credit there for the KL of the states that they lead to.

    The price holds beside advantages in units of the score. Whatever divides these, such as ``whiten`` (a default of
    ``GAE`` and ``GlobalBaseline``) by their standard deviation σ, leaves a KL in the *reward* at its price but raises
    that of one in the *loss* to coef · σ.

    Args:
        coef: Price of a nat in units of the score, at least 0; higher keeps the policy closer to the reference, 0 turns
            the penalty off.
        estimator: ``k1``, ``k2`` or ``k3``; see :mod:`rlhf_lightning.functional.kl`.
        place: ``reward`` takes the penalty off the token rewards at rollout; ``loss`` adds it to the policy's loss.

    References:
        Schulman 2020, "Approximating KL Divergence"; Tang and Munos 2025, "On a few pitfalls in KL divergence gradient
        estimation for RL".
    """

    def __init__(self, coef: float = 0.05, estimator: Estimator = "k1", place: Place = "reward") -> None:
        super().__init__(coef, estimator, place)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the configured coefficient: it is a setting here, not a state."""


class AdaptiveKL(KLControl):
    """A coefficient steered so that the KL a sequence stays near a target.

    After an iteration of n sequences: coef ← coef · (1 + clip(KL / target - 1, -0.2, 0.2) · n / horizon). It stays
    while a critic warms up.

    Args:
        coef: Where it starts, at least 0.
        target: Wanted KL a sequence, in nats, above 0.
        horizon: Sequences after which the coefficient can have changed by about a fifth; larger is slower.
        estimator: ``k1``, ``k2`` or ``k3``; see :class:`FixedKL`.
        place: ``reward`` or ``loss``; see :class:`FixedKL`.

    References:
        Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2.
    """

    def __init__(
        self,
        coef: float = 0.15,
        target: float = 6.0,
        horizon: int = 10_000,
        estimator: Estimator = "k1",
        place: Place = "reward",
    ) -> None:
        super().__init__(coef, estimator, place)
        if not target > 0 or horizon < 1:
            raise UserError(f"AdaptiveKL: target is {target} and horizon {horizon}; both must be above 0.")
        self.target, self.horizon = target, horizon

    def update(self, sequence_kl: float, num_sequences: int) -> None:
        """Move the coefficient one step.

        Raises:
            UserError: As :meth:`check_sequences`.
        """
        self.check_sequences(num_sequences)
        error = min(max(sequence_kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * num_sequences / self.horizon

    def check_sequences(self, num_sequences: int) -> None:
        """Refuse more sequences in an iteration than the horizon, which would make the step wild.

        Raises:
            UserError: If there are.
        """
        if num_sequences > self.horizon:
            raise UserError(
                f"AdaptiveKL: horizon is {self.horizon}, but an iteration has {num_sequences} sequences; make it "
                "several times as large."
            )

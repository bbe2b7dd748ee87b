"""Guards that notice when a policy falls apart while its reward still looks well, and warn or end the run."""

import logging
import math
from abc import abstractmethod
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from rlhf_lightning.checkpoint_files import BEST, CHECKPOINTS
from rlhf_lightning.errors import UserError

logger = logging.getLogger("rlhf_lightning")


class CollapseGuard(pl.Callback):
    """Base of the guards: what is amiss several times in a row is said in one line, and ends the run if asked.

    A run that ends so is whole: its checkpoint is written, its model exported. What a guard has counted is part of the
    checkpoint. Every process sees the same numbers, and so all of them end.

    Args:
        action: ``warn`` says it once, and again after all was well in between; ``stop`` ends the run.
        patience: How often in a row something is amiss before it counts, at least 1.
        monitor: Name of the metric that it looks at; a run that does not log it is left alone.
    """

    def __init__(self, action: Literal["warn", "stop"], patience: int, monitor: str) -> None:
        if action not in ("warn", "stop"):
            raise UserError(f"{type(self).__name__}: action is {action!r}; it must be warn or stop.")
        if patience < 1:
            raise UserError(f"{type(self).__name__}: patience is {patience}; it must be at least 1.")
        self.action, self.patience, self.monitor = action, patience, monitor
        self.times = 0

    @property
    def state_key(self) -> str:
        """Name of its state in a checkpoint, by its metric: there may be several of a kind."""
        return self._generate_state_key(monitor=self.monitor)

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted so far."""
        return {name: getattr(self, name) for name in self._counted()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on."""
        vars(self).update(state_dict)

    def _counted(self) -> tuple[str, ...]:
        """Return the attributes that change in a run."""
        return ("times",)

    def _note(self, trainer: pl.Trainer, amiss: str | None) -> None:
        """Count, and act where it is time.

        Args:
            trainer: The trainer.
            amiss: What is amiss, with figures, as the beginning of a sentence; ``None`` where all is well.
        """
        self.times = 0 if amiss is None else self.times + 1
        if amiss is None or self.times < self.patience or (self.action == "warn" and self.times > self.patience):
            return
        ending = "the run ends here" if self.action == "stop" else "the policy may be falling apart: look at samples"
        if trainer.is_global_zero:
            where = f"step {trainer.global_step}"
            logger.warning("%s at %s: %s; %s.%s", type(self).__name__, where, amiss, ending, _best_checkpoint(trainer))
        if self.action == "stop":
            trainer.should_stop = True


class _OfIterations(CollapseGuard):
    """A guard that looks at its metric after each iteration."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Look at the iteration."""
        value = _metric(trainer, self.monitor)
        if value is not None:
            self._note(trainer, self._amiss(value))

    @abstractmethod
    def _amiss(self, value: float) -> str | None:
        """Tell what is amiss with a value, if anything."""


class KLBudget(_OfIterations):
    """Ends a run, or warns, once the policy has moved further from its reference than it may.

    Scores of a policy far from the texts that its reward model was trained on mean little (Gao et al. 2022, "Scaling
    Laws for Reward Model Overoptimization").

    Args:
        budget: Largest mean KL of a response, nats, above 0.
        action: ``stop`` or ``warn``.
        patience: Iterations in a row above it before it counts.
        monitor: The metric; ``val/kl`` looks at held-out prompts, after each iteration at the newest value.
    """

    def __init__(
        self,
        budget: float,
        action: Literal["warn", "stop"] = "stop",
        patience: int = 3,
        monitor: str = "rollout/kl",
    ) -> None:
        super().__init__(action, patience, monitor)
        if not 0 < budget < math.inf:
            raise UserError(f"KLBudget: budget is {budget}; it must be a number of nats above 0.")
        self.budget = budget

    def _amiss(self, value: float) -> str | None:
        return (
            None if value <= self.budget else f"{self.monitor} is {value:.3g} nats, above the budget of {self.budget:g}"
        )


class RepetitionGuard(_OfIterations):
    """Warns, or ends a run, where responses repeat themselves.

    Args:
        limit: Largest share of repeated 4-grams, above 0 and at most 1; English prose has less than 0.05.
        action: ``warn`` or ``stop``.
        patience: Iterations in a row above it before it counts.
        monitor: The metric; ``val/repetition`` looks at held-out prompts.
    """

    def __init__(
        self,
        limit: float = 0.3,
        action: Literal["warn", "stop"] = "warn",
        patience: int = 3,
        monitor: str = "rollout/repetition",
    ) -> None:
        super().__init__(action, patience, monitor)
        if not 0 < limit <= 1:
            raise UserError(f"RepetitionGuard: limit is {limit}; it is a share, above 0 and at most 1.")
        self.limit = limit

    def _amiss(self, value: float) -> str | None:
        return None if value <= self.limit else f"{value:.0%} of the 4-grams of a response stood in it before"


class LengthDrift(_OfIterations):
    """Warns, or ends a run, where responses become much longer or shorter than they were.

    Args:
        factor: How many times longer or shorter than in the first iterations, above 1.
        first: Iterations whose mean is what they are compared with, at least 1.
        action: ``warn`` or ``stop``.
        patience: Iterations in a row beyond it before it counts.
        monitor: The metric, in tokens.
    """

    def __init__(
        self,
        factor: float = 2.0,
        first: int = 5,
        action: Literal["warn", "stop"] = "warn",
        patience: int = 3,
        monitor: str = "rollout/response_length",
    ) -> None:
        super().__init__(action, patience, monitor)
        if not 1 < factor < math.inf:
            raise UserError(f"LengthDrift: factor is {factor}; it must be above 1.")
        if first < 1:
            raise UserError(f"LengthDrift: first is {first}; it must be at least 1.")
        self.factor, self.first = factor, first
        self.seen, self.sum = 0, 0.0

    def _counted(self) -> tuple[str, ...]:
        return (*super()._counted(), "seen", "sum")

    def _amiss(self, value: float) -> str | None:
        if self.seen < self.first:
            self.seen, self.sum = self.seen + 1, self.sum + value
            return None
        usual = self.sum / self.seen
        if usual / self.factor <= value <= usual * self.factor:
            return None
        return f"responses have {value:.3g} tokens where those of the first {self.first} iterations had {usual:.3g}"


class RewardDivergence(CollapseGuard):
    """Ends a run, or warns, where the held-out reward falls while that of training rises.

    Looked at after each validation, and against the one with the best held-out reward so far. To keep that one's
    weights, give ``RunCheckpoint`` the same ``monitor``; to judge by another reward than the one that is trained on,
    name its part of a ``WeightedSum``.

    Args:
        min_drop: How far below its best the held-out reward must lie, in standard deviations of the rollout's scores,
            at least 0; a validation of few prompts moves by chance.
        action: ``stop`` or ``warn``.
        patience: Validations in a row before it counts.
        monitor: The held-out reward.
        training: That of training; its mean since the last validation counts.
    """

    def __init__(
        self,
        min_drop: float = 0.2,
        action: Literal["warn", "stop"] = "stop",
        patience: int = 2,
        monitor: str = "val/score",
        training: str = "rollout/score",
    ) -> None:
        super().__init__(action, patience, monitor)
        if not 0 <= min_drop < math.inf:
            raise UserError(f"RewardDivergence: min_drop is {min_drop}; it must be at least 0.")
        self.min_drop, self.training = min_drop, training
        self.seen, self.sum, self.spread = 0, 0.0, 0.0
        self.best: float | None = None
        self.best_training = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Add up the reward of training."""
        score, spread = _metric(trainer, self.training), _metric(trainer, "rollout/score_std")
        if score is not None:
            self.seen, self.sum, self.spread = self.seen + 1, self.sum + score, spread or 0.0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the two; a validation before the first iteration has nothing to compare."""
        held_out = _metric(trainer, self.monitor)
        if trainer.sanity_checking or held_out is None or not self.seen:
            return
        training, self.seen, self.sum = self.sum / self.seen, 0, 0.0
        if self.best is None or held_out >= self.best:
            self.best, self.best_training = held_out, training
            amiss = None
        else:
            fell = self.best - held_out > self.min_drop * self.spread
            amiss = (
                f"{self.monitor} fell from {self.best:.3g} to {held_out:.3g} while {self.training} rose from "
                f"{self.best_training:.3g} to {training:.3g}"
                if fell and training > self.best_training
                else None
            )
        self._note(trainer, amiss)

    def _counted(self) -> tuple[str, ...]:
        return (*super()._counted(), "seen", "sum", "spread", "best", "best_training")


def _metric(trainer: pl.Trainer, name: str) -> float | None:
    value = trainer.callback_metrics.get(name)
    return None if value is None or not math.isfinite(float(value)) else float(value)


def _best_checkpoint(trainer: pl.Trainer) -> str:
    path = Path(trainer.default_root_dir, CHECKPOINTS, BEST)
    return f" The best checkpoint is {path}." if path.exists() else ""

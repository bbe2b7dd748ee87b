"""Learning-rate schedules with a warmup, in one formula each, that know where the run ends.

The number of steps is known to the Trainer and not to the config, so it is told afterwards: the modules of this package
call :meth:`WarmupSchedule.set_total_steps` before the first step. Elsewhere, call it or pass ``total_steps``.

A step is one call of ``step()``: an optimizer step for SFT and the reward model, an iteration for PPO. No update is
spent on a learning rate of zero: the warmup's first step has ``1 / (warmup + 1)`` of it, and zero is reached only after
the last step (the schedules of transformers begin at zero).
"""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rlhf_lightning.errors import UserError


class WarmupSchedule(LRScheduler):
    """Learning rate that rises linearly for some steps, and then follows :meth:`decay`.

    The checkpoint holds the position alone; length and shape are those of the config, so that a run that is resumed
    with more steps is spread over them.

    Args:
        optimizer: Its groups' learning rates are the peak.
        warmup: Steps of the rise; an int counts them, a float in [0, 1) is a share of all steps. 0 turns it off.
        total_steps: Steps of the whole run; ``None`` waits for :meth:`set_total_steps`.
        floor: Share of the peak that is left at the end, in [0, 1].

    Raises:
        UserError: If a number is out of its range.
    """

    #: Whether the formula needs to know where the run ends.
    needs_total = True

    def __init__(
        self, optimizer: Optimizer, warmup: int | float = 0, total_steps: int | None = None, floor: float = 0.0
    ) -> None:
        name = type(self).__name__
        if warmup < 0 or (isinstance(warmup, float) and warmup >= 1 and not warmup.is_integer()):
            msg = f"{name}: warmup is {warmup}; give a number of steps (an int) or a share of the run in [0, 1)."
            raise UserError(msg)
        if not 0 <= floor <= 1:
            msg = f"{name}: floor is {floor}; give the share of the peak that is left at the end, in [0, 1]."
            raise UserError(msg)
        self.warmup = warmup if warmup < 1 else int(warmup)
        self.floor = floor
        self.total_steps: int | None = None
        super().__init__(optimizer)
        if total_steps is not None:
            self.set_total_steps(total_steps)

    def set_total_steps(self, total_steps: int | float) -> None:
        """Tell how many steps the run has, and set the learning rate of the present step by it.

        Args:
            total_steps: Such as ``trainer.estimated_stepping_batches``. Infinity will do where nothing depends on it:
                :class:`ConstantWithWarmup` whose warmup is a number of steps.

        Raises:
            UserError: If the end matters and there is none, or if the warmup is longer than the run.
        """
        if not math.isfinite(total_steps) or total_steps < 1:
            if self.needs_total or self.warmup_is_share:
                msg = (
                    f"{type(self).__name__}: the run has no known end (total steps {total_steps}); set max_epochs or "
                    "max_steps, or use ConstantWithWarmup with a number of warmup steps."
                )
                raise UserError(msg)
            return
        if self.needs_total and self.warmup > total_steps:
            msg = (
                f"{type(self).__name__}: warmup is {self.warmup} steps but the run has only {total_steps:.0f}; lower "
                "warmup or give it as a share, such as 0.1."
            )
            raise UserError(msg)
        self.total_steps = int(total_steps)
        self._apply()

    @property
    def warmup_is_share(self) -> bool:
        """Whether the warmup is a share of the run, so that its length depends on the total."""
        return 0 < self.warmup < 1

    def factor(self, step: int) -> float:
        """Return the share of the peak learning rate at a step.

        Args:
            step: Steps taken before, from 0.

        Raises:
            UserError: If it depends on the total and that is unknown (for the first step, 1 is returned).
        """
        if self.total_steps is None and (self.needs_total or self.warmup_is_share):
            if step == 0:
                return 1.0 if self.warmup_is_share else 1.0 / (self.warmup + 1)
            msg = (
                f"{type(self).__name__}: the number of steps is unknown; pass total_steps or call set_total_steps "
                "before the first step."
            )
            raise UserError(msg)
        warmup = math.ceil(self.warmup * (self.total_steps or 0)) if self.warmup_is_share else int(self.warmup)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        left = 1.0
        if self.total_steps is not None and self.total_steps > warmup:
            left = max(0.0, (self.total_steps - step) / (self.total_steps - warmup))
        return self.floor + (1 - self.floor) * self.decay(left)

    def decay(self, left: float) -> float:
        """Return the share of the peak after the warmup; ``left`` falls from 1 to 0 over the rest of the run."""
        raise NotImplementedError

    def get_lr(self) -> list[Any]:
        """Return the learning rate of every group at the present step."""
        factor = self.factor(self.last_epoch)
        return [base * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the peaks, as plain numbers."""
        names = ("last_epoch", "_step_count", "base_lrs", "_last_lr")
        state = {name: getattr(self, name) for name in names}
        return {name: [float(x) for x in value] if isinstance(value, list) else value for name, value in state.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the position of a checkpoint, and set the learning rate by it."""
        super().load_state_dict(state_dict)
        if self.total_steps is not None or not (self.needs_total or self.warmup_is_share):
            self._apply()

    def _apply(self) -> None:
        """Write the present step's learning rate into the optimizer."""
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if hasattr(group["lr"], "fill_"):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class LinearDecay(WarmupSchedule):
    """Straight line from the peak to ``floor`` (TRL's schedule for PPO is this one without a warmup).

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule = LinearDecay(optimizer, warmup=1, total_steps=5)
        >>> [schedule.factor(step) for step in range(6)]
        [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    def decay(self, left: float) -> float:
        """Return ``left``."""
        return left


class CosineDecay(WarmupSchedule):
    """Half a cosine from the peak to ``floor``: slow at both ends.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule = CosineDecay(optimizer, total_steps=4, floor=0.1)
        >>> [round(schedule.factor(step), 3) for step in range(5)]
        [1.0, 0.868, 0.55, 0.232, 0.1]

    References:
        Loshchilov and Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", eq. 5, without restarts.
    """

    def decay(self, left: float) -> float:
        """Return ``(1 - cos(pi * left)) / 2``."""
        return (1 - math.cos(math.pi * left)) / 2


class ConstantWithWarmup(WarmupSchedule):
    """The peak, once it is reached.

    Args:
        optimizer: Its groups' learning rates are the peak.
        warmup: Steps of the rise; an int counts them, a float in [0, 1) is a share of all steps. 0 turns it off.
        total_steps: Steps of the whole run, which only a warmup given as a share needs.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule = ConstantWithWarmup(optimizer, warmup=3)
        >>> [schedule.factor(step) for step in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]
    """

    needs_total = False

    def __init__(self, optimizer: Optimizer, warmup: int | float = 0, total_steps: int | None = None) -> None:
        super().__init__(optimizer, warmup, total_steps)

    def decay(self, left: float) -> float:
        """Return 1."""
        return 1.0

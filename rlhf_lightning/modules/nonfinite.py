"""Numbers gone wrong: a step on a loss or gradient that is not finite is named, skipped and counted."""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from rlhf_lightning.distributed import first_text, global_sum
from rlhf_lightning.errors import UserError

if TYPE_CHECKING:
    from lightning import LightningModule

log = logging.getLogger("rlhf_lightning")

_ADVICE = "lower the learning rate, clip the gradients, or look at the data of this step"


class NonFiniteSteps:
    """Decides which optimizer steps are taken, in all processes alike, and how many may be skipped.

    Of a healthy run it changes nothing: losses are added up on the device, and one answer is waited for a step.

    Attributes:
        allowed: Steps that may be skipped before the run is stopped.
        count: Steps skipped so far, those before a restart included.
    """

    def __init__(self, allowed: int = 10) -> None:
        self.allowed, self.count = allowed, 0
        self._taken = self._skipped = 0  # since the fit began
        self._loss: Tensor | None = None

    def allow(self, max_nonfinite: int) -> None:
        """Set how many steps may be skipped, at least 0.

        Raises:
            UserError: If the number is negative.
        """
        if max_nonfinite < 0:
            raise UserError(f"max_nonfinite is {max_nonfinite}; it must be at least 0 (0 stops at the first).")
        self.allowed = max_nonfinite

    def begin(self) -> None:
        """Begin a fit; what was counted before a restart stays."""
        self._taken = self._skipped = 0
        self.forget()

    def forget(self) -> None:
        """Forget the losses of a step that is not to be taken, for another reason."""
        self._loss = None

    def watch(self, loss: Tensor) -> None:
        """Take note of a loss that is about to be differentiated, a scalar; a step has one or more."""
        loss = loss.detach()
        self._loss = loss if self._loss is None else self._loss + loss

    def admits(self, norm: Tensor, module: "LightningModule") -> bool:
        """Tell whether a step is to be taken; one that is not is named and counted.

        Args:
            norm: Of the gradients of all parameters, before they are clipped, a scalar.
            module: The one that is trained.

        Raises:
            UserError: If more steps were skipped than are allowed, or a weight is not finite.
        """
        wrong, loss, self._loss = ~torch.isfinite(norm), self._loss, None
        if loss is not None:
            wrong = wrong | ~torch.isfinite(loss)
        if not bool(global_sum(wrong.float())):
            self._taken += 1
            return True
        self.refuse_weights(module)
        found = [f"the loss is {float(loss)}"] if loss is not None and not torch.isfinite(loss) else []
        gradients = ((name, weight.grad) for name, weight in module.named_parameters() if weight.grad is not None)
        found += named("the gradient of", gradients)
        if not found and not torch.isfinite(norm):
            found = [f"the norm of the gradient is {float(norm)}"]
        self._skip(module, " and ".join(found))
        return False

    def admits_all(self, tensors: Mapping[str, Tensor], module: "LightningModule") -> bool:
        """Tell whether tensors are finite in all processes; where one is not, that is a step skipped.

        Args:
            tensors: By what they are called, of any shape.
            module: The one that is trained.

        Raises:
            UserError: If more steps were skipped than are allowed.
        """
        wrong = ~torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).all()
        if not bool(global_sum(wrong.float())):
            return True
        self._skip(module, " and ".join(named("the rollout's", tensors.items())))
        return False

    def refuse_weights(self, module: "LightningModule") -> None:
        """Refuse to go on with weights that are not finite, which skipping steps does not mend.

        Raises:
            UserError: If a trained weight is not finite.
        """
        steps = module.trainer.global_step
        refuse_nonfinite(
            trained_weights(module), f"{{}} after {steps} {_word(module)}s, which no further step mends; {_ADVICE}."
        )

    def refuse_nothing_learnt(self) -> None:
        """Refuse to end a fit, as if it had worked, in which each step was skipped.

        Raises:
            UserError: In that case.
        """
        if self._skipped and not self._taken:
            raise UserError(
                f"all {self._skipped} steps of this run were skipped, as a loss, a gradient or a rollout was not "
                f"finite: nothing was learnt; {_ADVICE}."
            )

    def _skip(self, module: "LightningModule", found: str) -> None:
        self.count += 1
        self._skipped += 1
        what = f"{place_of(module)}: {first_text(found)}"
        if self.count > self.allowed:
            raise UserError(f"{what}; {self.count} skipped, max_nonfinite is {self.allowed}. Stopped: {_ADVICE}.")
        if module.global_rank == 0:
            log.warning("%s; skipped, %d so far (max_nonfinite is %d)", what, self.count, self.allowed)


class SkippedStepsLog(Callback):
    """Logs how many steps have been skipped, once the step is done and before a checkpoint is written.

    The module's own hook would be too late for that: checkpoints are written by the last callback, before it.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: "LightningModule", *args: Any) -> None:
        """Log the number so far."""
        steps: Any = pl_module.nonfinite
        pl_module.log("train/nonfinite_steps", float(steps.count), on_step=True, on_epoch=False)


def place_of(module: "LightningModule") -> str:
    """Return the step or iteration that is under way, counted from 1."""
    return f"{_word(module)} {module.trainer.global_step + 1}"


def _word(module: "LightningModule") -> str:
    return "step" if module.automatic_optimization else "iteration"


@contextlib.contextmanager
def placed(module: "LightningModule") -> Iterator[None]:
    """Put the step or iteration before what a ``UserError`` raised inside has to say."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place_of(module)}: {error}") from error


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of all gradients together, a scalar, as ``clip_grad_norm_`` computes it."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def named(what: str, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the first tensor that holds what is not finite, with a word before it, and how many others do.

    Example:
        >>> good, bad = torch.ones(2), torch.tensor([1.0, torch.inf])
        >>> named("weight", [("a", good), ("b", bad), ("c", bad)]), named("weight", [("a", good)])
        (["weight 'b' holds inf (and 1 more)"], [])
    """
    wrong = [(name, tensor[~torch.isfinite(tensor)]) for name, tensor in tensors]
    wrong = [(name, values) for name, values in wrong if len(values)]
    if not wrong:
        return []
    name, values = wrong[0]
    others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return [f"{what} {name!r} holds {float(values[0])}{others}"]


def refuse_nonfinite(weights: Mapping[str, Tensor], message: str) -> None:
    """Refuse weights that are not finite: nothing can be learnt with them, and no step mends them.

    Looks through them once, and waits for the device once.

    Args:
        weights: By name; whole numbers among them are left out.
        message: What to say, with ``{}`` where the first such weight is to be named.

    Raises:
        UserError: If one is not finite.
    """
    weights = {name: weight for name, weight in weights.items() if weight.is_floating_point()}
    # A finite sum of squares has finite parts; it is computed ten times as fast as isfinite, and needs no copy.
    if not bool(torch.isfinite(torch.nn.utils.get_total_norm(weights.values()))):
        for found in named("weight", weights.items()):
            raise UserError(message.format(found))


def trained_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights that a module trains, by name."""
    return {name: weight.detach() for name, weight in module.named_parameters() if weight.requires_grad}

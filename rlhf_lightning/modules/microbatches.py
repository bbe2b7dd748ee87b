"""A training batch in parts of few tokens, under Lightning's automatic optimization."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import token_groups
from rlhf_lightning.models.memory_limit import MemoryLimit, can_be_cut

OutcomeT = TypeVar("OutcomeT")
TensorsT = TypeVar("TensorsT", bound=tuple[Tensor, ...])


class MicroBatching(LightningModule):
    """Lets a training step go over its batch in parts of at most ``max_tokens_per_microbatch`` tokens.

    All parts but the last run their backward pass within the training step; the last is left to Lightning, so that
    gradient clipping, accumulation over batches and several processes work as ever. In between Lightning would forget
    the gradients of the earlier parts; so ``optimizer_zero_grad`` is ours.

    Where memory runs out, the gradients of the batch are dropped, and it is gone over again in smaller parts; not with
    several processes, nor where gradients of earlier batches, which wait to be accumulated, would be dropped too.
    """

    max_tokens_per_microbatch: int
    _holds_gradients = False
    _batch: "_Batch | None" = None  # while Lightning runs its last part backwards

    def take_microbatches(self, max_tokens_per_microbatch: int) -> None:
        """Set the budget; called once, by ``__init__``.

        Args:
            max_tokens_per_microbatch: Tokens of a forward pass, at least 1; a row that has more goes alone.
        """
        if max_tokens_per_microbatch < 1:
            raise UserError(f"max_tokens_per_microbatch is {max_tokens_per_microbatch}; it must be at least 1.")
        self.max_tokens_per_microbatch = max_tokens_per_microbatch
        self.memory = MemoryLimit("max_tokens_per_microbatch")

    def sum_of_parts(
        self, lengths: Tensor, loss_of: Callable[[Tensor], tuple[Tensor, OutcomeT]], batch_idx: int
    ) -> tuple[Tensor, list[OutcomeT]]:
        """Return the sum of the parts' losses, of which only the last one's gradient is still to be computed.

        Args:
            lengths: Tokens of each row of this process's batch, shape (batch,).
            loss_of: Takes the numbers of some rows and returns their share of the loss, a scalar, and what else is
                wanted of them.
            batch_idx: Lightning's, which tells where it accumulates gradients over batches.

        Returns:
            The sum, and what else is wanted of each part.
        """
        self._batch = None
        batch = _Batch(self, lengths, loss_of, first=batch_idx % self.trainer.accumulate_grad_batches == 0)
        result = self.memory.whole(self._parts(lengths), lengths, batch.go_over, may=batch.can_begin_anew)
        self._batch = batch
        return result

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run a part backwards; where the last of a batch, Lightning's, runs out of memory, begin the batch anew."""
        batch, self._batch = self._batch, None
        if batch is not None:
            batch.went_backwards = True
        try:
            super().backward(loss, *args, **kwargs)
        except torch.OutOfMemoryError:
            if batch is None or not (batch.can_begin_anew() and can_be_cut(batch.parts)):
                raise
        else:
            return
        loss.detach_()  # Lightning holds it, and with it all that is kept for this pass
        self.memory.halve(batch.parts, batch.lengths)
        run = functools.partial(batch.go_over, to_the_end=True)
        with self.trainer.precision_plugin.train_step_context():
            self.memory.whole(batch.parts, batch.lengths, run, may=batch.can_begin_anew)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Keep the gradients of a batch's earlier parts, before which those of other batches were dropped."""
        if not self._holds_gradients:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def _parts(self, lengths: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            return token_groups(lengths, self.max_tokens_per_microbatch)
        return (torch.arange(len(lengths), device=lengths.device),)  # others' backward passes want the whole step


class _Batch:
    """A batch on its way through a training step.

    Args:
        module: The one that is trained.
        lengths: Tokens of each row, shape (batch,).
        loss_of: As of :meth:`MicroBatching.sum_of_parts`.
        first: Whether it is the first of those whose gradients are accumulated.
    """

    def __init__(self, module: MicroBatching, lengths: Tensor, loss_of: Callable[[Tensor], Any], first: bool) -> None:
        self.module, self.lengths, self.loss_of, self.first = module, lengths, loss_of, first
        self.parts: list[Tensor] = []
        self.went_backwards = False

    def go_over(self, parts: list[Tensor], *, to_the_end: bool = False) -> tuple[Tensor, list[Any]]:
        """Run all parts forwards, and all but the last, or all of them, backwards."""
        module, self.parts = self.module, parts
        module._holds_gradients = len(parts) > 1
        if (len(parts) > 1 or to_the_end) and self.first:
            optimizer: Any = module.optimizers()
            optimizer.zero_grad()
        total, outcomes = torch.zeros((), device=self.lengths.device), []
        for number, rows in enumerate(parts, start=1):
            loss, outcome = self.loss_of(rows)
            outcomes.append(outcome)
            if number < len(parts) or to_the_end:
                self.went_backwards = True
                with torch.autocast(self.lengths.device.type, enabled=False):
                    module.trainer.strategy.backward(loss / module.trainer.accumulate_grad_batches, None)
                loss = loss.detach()
            total = total + loss
        return total, outcomes

    def can_begin_anew(self) -> bool:
        """Tell whether no gradients but its own would be dropped, and no other process waits for them."""
        alone = isinstance(self.module.trainer.strategy, SingleDeviceStrategy)
        return alone and (self.first or not self.went_backwards)


def joined(outcomes: Sequence[TensorsT]) -> TensorsT:
    """Return NamedTuples of rows as one, without gradient."""
    return type(outcomes[0])(*(torch.cat(parts).detach() for parts in zip(*outcomes, strict=True)))

"""A training batch in parts of few tokens, under Lightning's automatic optimization."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import token_groups

OutcomeT = TypeVar("OutcomeT", bound=tuple[Tensor, ...])


class MicroBatching(LightningModule):
    """Lets a training step go over its batch in parts of at most ``max_tokens_per_microbatch`` tokens.

    All parts but the last run their backward pass within the training step; the last is left to Lightning, so that
    gradient clipping, accumulation over batches and several processes work as ever. In between Lightning would forget
    the gradients of the earlier parts; so ``optimizer_zero_grad`` is ours.
    """

    max_tokens_per_microbatch: int
    _holds_gradients = False

    def take_microbatches(self, max_tokens_per_microbatch: int) -> None:
        """Set the budget; called once, by ``__init__``.

        Args:
            max_tokens_per_microbatch: Tokens of a forward pass, at least 1; a row that has more goes alone.
        """
        if max_tokens_per_microbatch < 1:
            raise UserError(f"max_tokens_per_microbatch is {max_tokens_per_microbatch}; it must be at least 1.")
        self.max_tokens_per_microbatch = max_tokens_per_microbatch

    def sum_of_parts(self, lengths: Tensor, loss_of: Callable[[Tensor], Tensor], batch_idx: int) -> Tensor:
        """Return the sum of the parts' losses; only the last one's gradient is still to be computed.

        Args:
            lengths: Tokens of each row of this process's batch, shape (batch,).
            loss_of: Takes the numbers of some rows and returns their share of the loss, a scalar.
            batch_idx: Lightning's, which tells where it accumulates gradients over batches.
        """
        parts = self._parts(lengths)
        self._holds_gradients = len(parts) > 1
        if len(parts) > 1 and batch_idx % self.trainer.accumulate_grad_batches == 0:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
        before = torch.zeros((), device=lengths.device)
        for rows in parts[:-1]:
            loss = loss_of(rows)
            with torch.autocast(lengths.device.type, enabled=False):
                self.trainer.strategy.backward(loss / self.trainer.accumulate_grad_batches, None)
            before += loss.detach()
        return before + loss_of(parts[-1])

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Keep the gradients of a batch's earlier parts, before which those of other batches were dropped."""
        if not self._holds_gradients:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def _parts(self, lengths: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            return token_groups(lengths, self.max_tokens_per_microbatch)
        return (torch.arange(len(lengths), device=lengths.device),)  # others' backward passes want the whole step


def joined(outcomes: Sequence[OutcomeT]) -> OutcomeT:
    """Return NamedTuples of rows as one, without gradient."""
    return type(outcomes[0])(*(torch.cat(parts).detach() for parts in zip(*outcomes, strict=True)))

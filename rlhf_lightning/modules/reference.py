"""What DPO and KTO share: a policy in training beside the frozen reference that it is measured against."""

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from rlhf_lightning.data.base import RowsDataModule
from rlhf_lightning.distributed import global_sum, world_size
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import (
    context_length,
    load_causal_lm,
    load_config,
    load_reference,
    refuse_foreign_tokens,
)
from rlhf_lightning.models.lora import LoRA, add_adapters
from rlhf_lightning.modules.base import ModelModule
from rlhf_lightning.modules.microbatches import MicroBatching

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ReferenceModule(MicroBatching, ModelModule):
    """Base of the modules that train a policy on given responses beside a frozen reference.

    Args:
        policy: Hugging Face folder or hub name of the model to be tuned.
        reference: Folder or hub name of the reference; ``None`` takes a copy of the policy as it starts.
        reference_free: True loads no reference; its log-probabilities count as 0.
        lora: Adapters of the policy; ``None`` trains all of it.
        max_tokens_per_microbatch: Tokens in one forward pass of a process.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimizer, stepped once a training step; ``None`` keeps the learning rate.
    """

    export_prefix = "policy."

    def __init__(
        self,
        policy: str,
        reference: str | None,
        reference_free: bool,
        lora: LoRA | None,
        max_tokens_per_microbatch: int,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__(policy, optimizer, lr_scheduler)
        self.take_microbatches(max_tokens_per_microbatch)
        if reference is not None and reference_free:
            raise UserError(f"reference is {reference!r}, but reference_free is true; leave one of them out.")
        self.reference_name, self.reference_free, self.lora = reference, reference_free, lora
        self._told: set[str] = set()

    @property
    def exported_model(self) -> "PreTrainedModel":
        """The policy."""
        return self.policy

    def frozen_modules(self) -> dict[str, nn.Module]:
        """The reference is never trained."""
        return {"reference": self.reference} if hasattr(self, "reference") else {}

    def setup(self, stage: str) -> None:
        """Refuse data or a reference that do not fit, before weights are loaded."""
        super().setup(stage)
        if self.reference_name:
            self._check_reference(self.reference_name)

    def configure_model(self) -> None:
        """Load policy and reference, once."""
        if hasattr(self, "policy"):
            return
        self.policy = add_adapters(load_causal_lm(self.model_name), self.lora)
        if not self.reference_free:
            self.reference = load_reference(self.reference_name, self.policy)

    def _check_reference(self, name: str) -> None:
        refuse_foreign_tokens(self.tokenizer, name, key="model.reference")
        data, limit = getattr(self.trainer, "datamodule", None), context_length(load_config(name))
        longest = data.extremes()[0] if isinstance(data, RowsDataModule) else 0
        if limit is not None and longest > limit:
            raise UserError(
                f"the data has sequences of {longest} tokens, but model.reference {name!r} reads at most {limit}; "
                "lower data.max_length."
            )

    def _log_means(self, values: dict[str, Tensor], of: Tensor | None = None) -> None:
        """Log the mean of each under ``train/``, over the rows of all processes.

        Where there is no row nothing is logged, and NaN if there were rows before, as their mean would be told again.

        Args:
            values: By name, shape (batch,).
            of: True where a row counts, shape (batch,), bool; ``None`` counts all.
        """
        first = next(iter(values.values()))
        counts = torch.ones_like(first, dtype=torch.bool) if of is None else of
        rows = global_sum(counts.sum().float())
        if of is not None and not rows and not self._told.issuperset(values):
            return
        self._told.update(values)
        for name, value in values.items():
            total = torch.where(counts, value.detach().float(), 0.0).sum()
            # The mean over processes of each one's share.
            self.log(f"train/{name}", total * world_size() / rows, sync_dist=True)


def mean_over_processes(losses: Tensor) -> Tensor:
    """Return this process's part of the mean loss of all processes' rows, as gradients are averaged over processes.

    Args:
        losses: Shape (batch,), of unequal size on the processes.
    """
    return losses.sum() / rows_of_a_process(losses)


def rows_of_a_process(rows: Tensor) -> Tensor:
    """Return the mean number of rows over the processes, by which a sum of losses becomes one's share of their mean.

    Args:
        rows: Anything of a row each, shape (batch, ...), of unequal size on the processes.
    """
    return global_sum(torch.tensor(float(len(rows)), device=rows.device)) / world_size()

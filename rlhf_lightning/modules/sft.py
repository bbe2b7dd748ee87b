"""Supervised fine-tuning: the model learns to give the responses of the data."""

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rlhf_lightning.distributed import global_sum, world_size
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.metrics import MaskedMean
from rlhf_lightning.models.causal_lm import response_logprobs
from rlhf_lightning.models.loading import load_causal_lm, load_config
from rlhf_lightning.models.lora import LoRA, add_adapters
from rlhf_lightning.modules.base import ModelModule
from rlhf_lightning.modules.microbatches import MicroBatching

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class SFTModule(MicroBatching, ModelModule):
    """Train a causal language model on responses; prompt tokens are read, but not learnt.

    Args:
        model: Hugging Face folder or hub name of the start, or ``builtin:demo``.
        pretrained: False draws random weights for the folder's config and keeps its tokenizer: training from scratch.
        config_overrides: Entries of the config to be changed, such as ``{hidden_size: 128}``; only with random weights.
        lora: Adapters that are trained in place of all weights; ``null`` trains all weights.
        max_tokens_per_microbatch: Tokens, prompts included, in one forward pass of a process, at most; a longer
            sequence goes alone. More is faster and needs more memory; results change by
            rounding alone, which bf16-mixed shows.
        gradient_checkpointing: True keeps of each layer its input alone and computes the rest again backwards: a third
            to a half more time in training passes, for a small part of their memory. Results stay the same.
        max_nonfinite: Steps that may be skipped because a loss or a gradient is not finite, in the whole run, before it
            is stopped; 0 stops at the first.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimizer, stepped once a training step; ``null`` keeps the learning rate.
    """

    batch_type = SequenceBatch
    export_prefix = "policy."

    def __init__(
        self,
        model: str,
        pretrained: bool = True,
        config_overrides: dict[str, Any] | None = None,
        lora: LoRA | None = None,
        max_tokens_per_microbatch: int = 4096,
        gradient_checkpointing: bool = False,
        max_nonfinite: int = 10,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(model, optimizer, lr_scheduler)
        self.take_microbatches(max_tokens_per_microbatch)
        if lora is not None and not pretrained:
            raise UserError(
                "lora is set, but pretrained is false: the random weights would stay as they are; leave it out."
            )
        self.gradient_checkpointing = gradient_checkpointing
        self.nonfinite.allow(max_nonfinite)
        self.pretrained, self.config_overrides, self.lora = pretrained, config_overrides, lora
        self.save_hyperparameters(ignore=["lora", "optimizer", "lr_scheduler"])
        # A metric of our own: self.log averages the batches' weights over processes as whole numbers, rounded down.
        self.val_loss = MaskedMean()

    @property
    def exported_model(self) -> "PreTrainedModel":
        """The language model."""
        return self.policy

    def start_config(self) -> "PretrainedConfig":
        """Return the config with its overrides."""
        return load_config(self.model_name, self.config_overrides)

    def configure_model(self) -> None:
        """Load or draw the weights, once."""
        if not hasattr(self, "policy"):
            model = load_causal_lm(self.model_name, pretrained=self.pretrained, config_overrides=self.config_overrides)
            self.policy = add_adapters(model, self.lora)

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """Return the mean negative log-likelihood of the response tokens, over all processes."""
        # Of a process in the mean, as gradients are averaged over processes.
        tokens = global_sum(batch.response_lengths.sum().float()) / world_size()

        def loss_of(rows: Tensor) -> tuple[Tensor, None]:
            return -response_logprobs(self.policy, batch.select(rows)).sum() / tokens, None

        loss, _ = self.sum_of_parts(batch.lengths, loss_of, batch_idx)
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True)
        self._log_learning_rate()
        return loss

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Take note of the negative log-likelihood of a batch."""
        tokens = batch.response_lengths.sum()
        self.val_loss.update(-response_logprobs(self.policy, batch).sum() / tokens, tokens)

    def on_validation_epoch_end(self) -> None:
        """Log loss and perplexity a token of the whole set."""
        loss = self.val_loss.compute()
        self.log("val/loss", loss, prog_bar=True, sync_dist=True)
        self.log("val/perplexity", loss.exp(), sync_dist=True)
        self.val_loss.reset()

    def test_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Do the same as in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Do the same as after validation."""
        self.on_validation_epoch_end()

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> dict[str, Any]:
        """Return prompts and responses as text, and ``logprob``: the mean a response token, nats, shape (batch,)."""
        prompts, responses = self.texts(batch)
        logprob = response_logprobs(self.policy, batch).sum(dim=1) / batch.response_lengths
        return {"prompt": prompts, "response": responses, "logprob": logprob}

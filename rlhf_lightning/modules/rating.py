"""A reward model from ratings: a score that is the number people gave a response."""

import warnings
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import PearsonCorrCoef, SpearmanCorrCoef

from rlhf_lightning.data.collate import LabelledBatch
from rlhf_lightning.functional.reward_losses import rating_loss
from rlhf_lightning.metrics import MaskedMean
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.modules.reference import rows_of_a_process
from rlhf_lightning.modules.scoring import ScoringModule


class RatingModule(ScoringModule):
    """Train a reward model on responses with a number each, by the mean squared error of the score.

    What is exported is the same kind of model as that of ``RewardModule``. Data come from ``UnpairedDataModule``, whose
    ``label_column`` names the rating.

    Args:
        model: Hugging Face folder or hub name of the start: a language model, which gets a new scalar head, or a
            reward model.
        head_std: Standard deviation of the normal distribution from which the head's first weights are drawn, also
            where the start is a reward model; 0 begins with scores of 0. ``null`` keeps a reward model's head, and
            draws a new one with 1/√(d + 1) for hidden size d.
        store_score_statistics: True writes mean and standard deviation of the validation scores into the exported
            config, for ``RewardModel(normalize=True)``; see ``RewardModule``.
        lora: Adapters that are trained in place of all weights but the head's; ``null`` trains all weights.
        max_tokens_per_microbatch: Tokens, prompts included, in one forward pass of a process, at most; a longer
            sequence goes alone. More is faster and needs more memory; results change by
            rounding alone, which bf16-mixed shows.
        gradient_checkpointing: True keeps of each layer its input alone and computes the rest again backwards: a third
            to a half more time in training passes, for a small part of their memory. Results stay the same.
        max_nonfinite: Steps that may be skipped because a loss or a gradient is not finite, in the whole run, before it
            is stopped; 0 stops at the first.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimizer, stepped once a training step; ``null`` keeps the learning rate.

    References:
        Wang et al. 2023, "HelpSteer: Multi-attribute Helpfulness Dataset for SteerLM", fits ratings by regression.
    """

    batch_type = LabelledBatch

    def __init__(
        self,
        model: str,
        head_std: float | None = None,
        store_score_statistics: bool = False,
        lora: LoRA | None = None,
        max_tokens_per_microbatch: int = 4096,
        gradient_checkpointing: bool = False,
        max_nonfinite: int = 10,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0, fused=True),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(
            model, head_std, store_score_statistics, lora, max_tokens_per_microbatch, optimizer, lr_scheduler
        )
        self.gradient_checkpointing = gradient_checkpointing
        self.nonfinite.allow(max_nonfinite)
        self.save_hyperparameters(ignore=["lora", "optimizer", "lr_scheduler"])
        self.val_loss, self.pearson = MaskedMean(), PearsonCorrCoef()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tells that it keeps all numbers: 8 bytes a response
            self.spearman = SpearmanCorrCoef()

    def batch_scores(self, batch: LabelledBatch) -> Tensor:
        """Return the score of each response."""
        return self.scalar.scores(batch.sequences)

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """Return the mean squared error of the responses of all processes."""
        self._note_scored_token(batch.sequences)
        responses = rows_of_a_process(batch.labels)

        def loss_of(rows: Tensor) -> tuple[Tensor, None]:
            part = batch.select(rows)
            return rating_loss(self.batch_scores(part), part.labels).sum() / responses, None

        loss, _ = self.sum_of_parts(batch.sequences.lengths, loss_of, batch_idx)
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True)
        self._log_learning_rate()
        return loss

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Take note of a batch of responses."""
        scores = self.batch_scores(batch)
        self.val_loss.update(rating_loss(scores, batch.labels))
        self.pearson.update(scores, batch.labels)
        self.spearman.update(scores, batch.labels)
        self._note_scores(scores)

    def on_validation_epoch_end(self) -> None:
        """Log the error of the whole set, and how well scores and ratings agree in value and in order."""
        self.log("val/loss", self.val_loss.compute(), prog_bar=True, sync_dist=True)
        self.log("val/pearson", self.pearson.compute(), sync_dist=True)
        self.log("val/spearman", self.spearman.compute(), prog_bar=True, sync_dist=True)
        for metric in (self.val_loss, self.pearson, self.spearman):
            metric.reset()
        self._store_statistics()

    def predict_step(self, batch: LabelledBatch, batch_idx: int) -> dict[str, Any]:
        """Return the texts, and ``score`` and ``label``, shape (responses,) each."""
        prompts, responses = self.texts(batch.sequences)
        return {"prompt": prompts, "response": responses, "score": self.batch_scores(batch), "label": batch.labels}

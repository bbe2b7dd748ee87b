"""The reward model: a score that puts the chosen response above the rejected one."""

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rlhf_lightning.data.collate import PairBatch
from rlhf_lightning.functional.losses import preference_loss
from rlhf_lightning.metrics import MarginStatistics, MaskedMean, RewardAccuracy, TieShare
from rlhf_lightning.models.export import CHECKPOINT_KEY
from rlhf_lightning.models.loading import load_sequence_classifier
from rlhf_lightning.models.scalar_head import ScalarModel, ensure_distinct_pad
from rlhf_lightning.modules.base import ModelModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RewardModule(ModelModule):
    """Train a reward model on preference pairs with the Bradley-Terry loss.

    What is exported is an ``AutoModelForSequenceClassification`` with one label, read at the last token.

    Args:
        model: Hugging Face folder or hub name of the start: a language model, which gets a new scalar head, or a
            reward model.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimizer, stepped once a training step; ``null`` keeps the learning rate.

    References:
        Ouyang et al. 2022, "Training language models to follow instructions with human feedback", section 3.5.
    """

    batch_type = PairBatch
    export_prefix = "scalar.model."

    def __init__(
        self,
        model: str,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0, fused=True),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(model, optimizer, lr_scheduler)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.val_loss, self.accuracy = MaskedMean(), RewardAccuracy()
        self.ties, self.margins = TieShare(), MarginStatistics()

    @property
    def exported_model(self) -> "PreTrainedModel":
        """The sequence-classification model."""
        return self.scalar.model

    def configure_model(self) -> None:
        """Load the weights, once."""
        if not hasattr(self, "scalar"):
            model = load_sequence_classifier(self.model_name, new_head=True)
            ensure_distinct_pad(model, self.tokenizer)
            self.scalar = ScalarModel(model)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the mean loss of the pairs."""
        self._note_scored_token(batch)
        chosen, rejected = self._scores(batch)
        loss = preference_loss(chosen, rejected).mean()
        margins = (chosen - rejected).detach()
        accuracy = (margins > 0).float() + 0.5 * (margins == 0).float()
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True)
        self.log("train/accuracy", accuracy.mean(), prog_bar=True, sync_dist=True)
        self.log("train/margin", margins.mean(), sync_dist=True)
        self._log_learning_rate()
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Take note of a batch of pairs."""
        chosen, rejected = self._scores(batch)
        for metric in (self.accuracy, self.ties, self.margins):
            metric.update(chosen, rejected)
        self.val_loss.update(preference_loss(chosen, rejected))

    def on_validation_epoch_end(self) -> None:
        """Log loss, accuracy, ties and margins of the whole set."""
        self.log("val/loss", self.val_loss.compute(), sync_dist=True)
        self.log("val/accuracy", self.accuracy.compute(), prog_bar=True, sync_dist=True)
        self.log("val/ties", self.ties.compute(), sync_dist=True)
        margins = self.margins.compute()
        self.log_dict({f"val/margin_{name}": value for name, value in margins.items()}, sync_dist=True)
        for metric in (self.val_loss, self.accuracy, self.ties, self.margins):
            metric.reset()

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Do the same as in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Do the same as after validation."""
        self.on_validation_epoch_end()

    def predict_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return the scores of both sides, shape (pairs,) each."""
        chosen, rejected = self._scores(batch)
        return {"chosen": chosen, "rejected": rejected}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over at which token the score is read."""
        super().on_load_checkpoint(checkpoint)
        config = json.loads(checkpoint[CHECKPOINT_KEY]["files"]["config.json"])
        if "scored_token_id" in config:
            self.scalar.model.config.scored_token_id = config["scored_token_id"]

    def _scores(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        return self.scalar.scores(batch.chosen), self.scalar.scores(batch.rejected)

    def _note_scored_token(self, batch: PairBatch) -> None:
        """Write into the config at which token the score is read, so that PPO can tell whether its responses end so."""
        config: Any = self.scalar.model.config
        if getattr(config, "scored_token_id", None) is None:
            chosen = batch.chosen
            last = chosen.input_ids.gather(1, (chosen.lengths - 1)[:, None]).flatten()
            config.scored_token_id = Counter(torch.Tensor.tolist(last)).most_common(1)[0][0]

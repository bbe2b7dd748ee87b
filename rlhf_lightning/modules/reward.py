"""The reward model: a score that puts the chosen response above the rejected one."""

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rlhf_lightning.data.collate import PairBatch
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.losses import preference_loss
from rlhf_lightning.functional.reward_losses import center_loss
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.metrics import MarginStatistics, MaskedMean, RewardAccuracy, TieShare, pair_points
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.modules.reference import mean_over_processes, rows_of_a_process
from rlhf_lightning.modules.scoring import ScoringModule


class RewardModule(ScoringModule):
    """Train a reward model on preference pairs with the Bradley-Terry loss.

    What is exported is an ``AutoModelForSequenceClassification`` with one label, read at the last token. Where the data
    has margins (``PreferenceDataModule(margin_column=...)``), a pair's scores are asked to differ by more than its
    margin (Llama 2, eq. 2).

    Args:
        model: Hugging Face folder or hub name of the start: a language model, which gets a new scalar head, or a
            reward model.
        center_coef: Weight of the mean of (score of chosen + score of rejected)², at least 0; higher holds the scores
            closer around zero, 0 is off. TRL recommends 0.01 (its ``center_rewards_coefficient``).
        head_std: Standard deviation of the normal distribution from which the head's first weights are drawn, also
            where the start is a reward model; smaller begins with smaller scores, 0 with scores of 0. ``null`` keeps a
            reward model's head, and draws a new one with 1/√(d + 1) for hidden size d (Stiennon et al. 2020; Huang et
            al. 2024, "The N+ Implementation Details of RLHF with PPO").
        store_score_statistics: True writes mean and standard deviation of the scores of all validation responses,
            chosen and rejected, into the exported config as ``score_mean`` and ``score_std``, for
            ``RewardModel(normalize=True)``. They are measured in each validation and, where weights have changed since,
            once more at the end of an epoch; a checkpoint between holds those of the validation before it.
        lora: Adapters that are trained in place of all weights but the head's; ``null`` trains all weights.
        max_tokens_per_microbatch: Tokens, prompts included, in one forward pass of a process, at most; a longer
            pair goes alone. More is faster and needs more memory; results change by
            rounding alone, which bf16-mixed shows.
        gradient_checkpointing: True keeps of each layer its input alone and computes the rest again backwards: a third
            to a half more time in training passes, for a small part of their memory. Results stay the same.
        max_nonfinite: Steps that may be skipped because a loss or a gradient is not finite, in the whole run, before it
            is stopped; 0 stops at the first.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimizer, stepped once a training step; ``null`` keeps the learning rate.

    References:
        Ouyang et al. 2022, "Training language models to follow instructions with human feedback", section 3.5; Touvron
        et al. 2023, "Llama 2: Open Foundation and Fine-Tuned Chat Models", section 3.2.2 (margins).
    """

    batch_type = PairBatch
    uses_margins = True

    def __init__(
        self,
        model: str,
        center_coef: float = 0.0,
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
        if not center_coef >= 0:
            raise UserError(f"center_coef is {center_coef}; it must be at least 0 (0 is off).")
        self.save_hyperparameters(ignore=["lora", "optimizer", "lr_scheduler"])
        self.center_coef = center_coef
        self.val_loss, self.accuracy = MaskedMean(), RewardAccuracy()
        self.ties, self.margins = TieShare(), MarginStatistics()

    def batch_scores(self, batch: PairBatch) -> Tensor:
        """Return the scores of all chosen responses, then of all rejected ones."""
        return self.scalar.scores(SequenceBatch.stack([batch.chosen, batch.rejected]))

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the mean loss of the pairs of all processes."""
        self._note_scored_token(batch.chosen)
        pairs = rows_of_a_process(batch.lengths)

        def loss_of(rows: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            part = batch.select(rows)
            scores = self._scores(part)
            return self._losses(part, *scores).sum() / pairs, scores

        loss, scores = self.sum_of_parts(batch.lengths, loss_of, batch_idx)
        chosen, rejected = (torch.cat(side).detach() for side in zip(*scores, strict=True))
        margins = chosen - rejected
        accuracy = pair_points(chosen, rejected)
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True)
        self.log("train/accuracy", mean_over_processes(accuracy), prog_bar=True, sync_dist=True)
        self.log("train/margin", mean_over_processes(margins), sync_dist=True)
        if self.center_coef:
            center = mean_over_processes(center_loss(chosen, rejected))
            self.log("train/center_loss", center, sync_dist=True)
        self._log_learning_rate()
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Take note of a batch of pairs."""
        chosen, rejected = self._scores(batch)
        for metric in (self.accuracy, self.ties, self.margins):
            metric.update(chosen, rejected)
        self.val_loss.update(self._losses(batch, chosen, rejected))
        self._note_scores(chosen, rejected)

    def on_validation_epoch_end(self) -> None:
        """Log loss, accuracy, ties and margins of the whole set."""
        self.log("val/loss", self.val_loss.compute(), sync_dist=True)
        self.log("val/accuracy", self.accuracy.compute(), prog_bar=True, sync_dist=True)
        self.log("val/ties", self.ties.compute(), sync_dist=True)
        margins = self.margins.compute()
        self.log_dict({f"val/margin_{name}": value for name, value in margins.items()}, sync_dist=True)
        for metric in (self.val_loss, self.accuracy, self.ties, self.margins):
            metric.reset()
        self._store_statistics()

    def predict_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Any]:
        """Return the texts, and ``chosen_score`` and ``rejected_score``, shape (pairs,) each."""
        (prompts, chosen), (_, rejected) = self.texts(batch.chosen), self.texts(batch.rejected)
        scores = dict(zip(("chosen_score", "rejected_score"), self._scores(batch), strict=True))
        return {"prompt": prompts, "chosen": chosen, "rejected": rejected, **scores}

    def _scores(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        chosen, rejected = self.batch_scores(batch).split([len(batch.chosen.lengths), len(batch.rejected.lengths)])
        return chosen, rejected

    def _losses(self, batch: PairBatch, chosen: Tensor, rejected: Tensor) -> Tensor:
        margin = 0.0 if batch.margins is None else batch.margins
        losses = preference_loss(chosen, rejected, margin=margin)
        return losses + self.center_coef * center_loss(chosen, rejected) if self.center_coef else losses

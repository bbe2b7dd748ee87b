"""Direct preference optimisation: the policy learns from preference pairs, without a reward model."""

import logging
import math
import time
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from rlhf_lightning.algorithm.preference_losses import Pairs, PreferenceLoss, SigmoidLoss
from rlhf_lightning.checkpoint_files import CHECKPOINT_KEY
from rlhf_lightning.data.collate import PairBatch
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.preference import length_desensitised_logprobs
from rlhf_lightning.functional.sequences import SequenceBatch, token_groups
from rlhf_lightning.metrics import MarginStatistics, MaskedMean, RewardAccuracy, TieShare, pair_points
from rlhf_lightning.models.causal_lm import response_logprobs
from rlhf_lightning.models.loading import load_reference
from rlhf_lightning.models.logprob_cache import LogprobCache
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.modules.base import fingerprint
from rlhf_lightning.modules.microbatches import joined
from rlhf_lightning.modules.reference import ReferenceModule, rows_of_a_process

log = logging.getLogger("rlhf_lightning")

_ROWS_AT_A_TIME = 256  # pairs that are padded to one width, for the cache of the reference
_SECONDS_BETWEEN_LINES = 10.0


class PairOutcome(NamedTuple):
    """What a batch of pairs came to; each of shape (pairs,), float32.

    Attributes:
        losses: With gradient.
        reward_chosen: β times the log-ratio of the chosen response, without gradient, as are the rest.
        reward_rejected: Of the rejected one.
        logprob_chosen: Log-probability of the chosen response under the policy, nats, weighted as the loss weighs it.
        logprob_rejected: Of the rejected one.
    """

    losses: Tensor
    reward_chosen: Tensor
    reward_rejected: Tensor
    logprob_chosen: Tensor
    logprob_rejected: Tensor


class DPOModule(ReferenceModule):
    """Tune a language model to preference pairs directly, staying near a reference.

    The implied reward of a response is β (log π - log π_ref); before the first step it is 0, and the sigmoid loss is
    log 2. Gradients are clipped by ``trainer.gradient_clip_val``.

    Args:
        policy: Hugging Face folder or hub name of the model to be tuned.
        reference: Folder or hub name of the frozen reference; ``null`` takes a copy of the policy as it starts.
        loss: What is minimised on a pair: ``SigmoidLoss``, ``RobustLoss``, ``IPOLoss``, ``HingeLoss`` or a class of
            your own; ``null`` is ``SigmoidLoss()``.
        ld_alpha: Weight of the tokens by which one response of a pair is longer than the other, in [0, 1]; lower
            teaches less to write longer, 1 is off (LD-DPO, Liu et al. 2024).
        reference_free: True loads no reference and counts its log-probabilities as 0: less memory, and nothing that
            holds the policy where it started.
        lora: Adapters that the policy is trained by, in place of all its weights; the reference, unless another is
            named, is then the policy without them, over the same weights. ``null`` trains all weights.
        reference_cache: Folder in which the reference's log-probabilities are kept. Those that are not there yet, of
            training and validation rows, are computed before the first step; then the reference leaves memory, and a
            step is about a third cheaper. A run that is too short to see every training row keeps the reference, and
            asks it about the rows that come. ``null`` computes them in every step.
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
        Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model".
    """

    batch_type = PairBatch

    def __init__(
        self,
        policy: str,
        reference: str | None = None,
        loss: PreferenceLoss | None = None,
        ld_alpha: float = 1.0,
        reference_free: bool = False,
        lora: LoRA | None = None,
        reference_cache: str | None = None,
        max_tokens_per_microbatch: int = 4096,
        gradient_checkpointing: bool = False,
        max_nonfinite: int = 10,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0, fused=True),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(policy, reference, reference_free, lora, max_tokens_per_microbatch, optimizer, lr_scheduler)
        self.gradient_checkpointing = gradient_checkpointing
        self.nonfinite.allow(max_nonfinite)
        if not 0 <= ld_alpha <= 1:
            raise UserError(f"ld_alpha is {ld_alpha}; it must lie in [0, 1] (1 is off).")
        # By value: objects stay out, which a weights-only load would refuse.
        kept = {"policy": policy, "reference": reference, "ld_alpha": ld_alpha, "reference_free": reference_free}
        self.save_hyperparameters(kept)
        if reference_cache is not None and reference_free:
            raise UserError("reference_cache is set, but reference_free is true; leave one of them out.")
        self.reference_cache = reference_cache
        self._cache: LogprobCache | None = None
        self.loss, self.ld_alpha = loss or SigmoidLoss(), ld_alpha
        self.accuracy, self.ties, self.margins = RewardAccuracy(), TieShare(), MarginStatistics()
        names = ("loss", "reward_chosen", "reward_rejected", "logprob_chosen", "logprob_rejected")
        self.val_means = cast("dict[str, MaskedMean]", nn.ModuleDict({name: MaskedMean() for name in names}))

    def on_fit_start(self) -> None:
        """Compute what the reference says, where that is to be kept, and let the reference go."""
        super().on_fit_start()
        data = getattr(self.trainer, "datamodule", None)
        if self.reference_cache is None:
            return
        if not isinstance(data, PreferenceDataModule):
            raise UserError(
                "reference_cache is set, but the rows come from a dataloader, so that they are not known beforehand; "
                "give a PreferenceDataModule as datamodule, or leave reference_cache out."
            )
        self._load_reference_again()
        self._cache = LogprobCache(
            self.reference_cache, model=fingerprint(self.reference), precision=str(self.trainer.precision)
        )
        seen, pairs = self._pairs_of_the_run(data), len(data.train_examples)
        if seen < pairs:
            log.info("reference_cache: %d of %d pairs are trained on, asked about as they come", seen, pairs)
            return
        self._fill(self._cache, data)
        del self.reference

    def on_fit_end(self) -> None:
        """Keep what the reference was asked about on the way."""
        if self._cache is not None:
            self._cache.save()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Tell of a reference that has gone too, so that a resumed run meets the same."""
        super().on_save_checkpoint(checkpoint)
        if self._cache is not None:
            checkpoint[CHECKPOINT_KEY]["frozen"].setdefault("reference", self._cache.model)
            self._cache.save()

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the mean loss of the pairs of all processes."""
        pairs = rows_of_a_process(batch.lengths)

        def loss_of(rows: Tensor) -> tuple[Tensor, PairOutcome]:
            outcome = self.evaluate(batch.select(rows))
            return outcome.losses.sum() / pairs, outcome

        loss, outcomes = self.sum_of_parts(batch.lengths, loss_of, batch_idx)
        _, *parts = outcome = joined(outcomes)
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True)
        margins = outcome.reward_chosen - outcome.reward_rejected
        accuracy = pair_points(outcome.reward_chosen, outcome.reward_rejected)
        self._log_means({"accuracy": accuracy, "margin": margins, **dict(zip(outcome._fields[1:], parts, strict=True))})
        self._log_learning_rate()
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Take note of a batch of pairs."""
        outcome = self.evaluate(batch)
        for metric in (self.accuracy, self.ties, self.margins):
            metric.update(outcome.reward_chosen, outcome.reward_rejected)
        for mean, values in zip(self.val_means.values(), outcome, strict=True):
            mean.update(values)

    def on_validation_epoch_end(self) -> None:
        """Log loss, accuracy, ties, margins, rewards and log-probabilities of the whole set."""
        self.log("val/accuracy", self.accuracy.compute(), prog_bar=True, sync_dist=True)
        self.log("val/ties", self.ties.compute(), sync_dist=True)
        margins = self.margins.compute()
        self.log_dict({f"val/margin_{name}": value for name, value in margins.items()}, sync_dist=True)
        self.log_dict({f"val/{name}": mean.compute() for name, mean in self.val_means.items()}, sync_dist=True)
        for metric in (self.accuracy, self.ties, self.margins, *self.val_means.values()):
            metric.reset()

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Do the same as in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Do the same as after validation."""
        self.on_validation_epoch_end()

    def predict_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Any]:
        """Return the texts, and the implied rewards ``chosen_reward`` and ``rejected_reward``, shape (pairs,) each."""
        (prompts, chosen), (_, rejected) = self.texts(batch.chosen), self.texts(batch.rejected)
        outcome = self.evaluate(batch)
        rewards = {"chosen_reward": outcome.reward_chosen, "rejected_reward": outcome.reward_rejected}
        return {"prompt": prompts, "chosen": chosen, "rejected": rejected, **rewards}

    def evaluate(self, batch: PairBatch) -> PairOutcome:
        """Return losses, implied rewards and log-probabilities of a batch of pairs."""
        chosen_lengths, rejected_lengths = batch.chosen.response_lengths, batch.rejected.response_lengths
        both = SequenceBatch.stack([batch.chosen, batch.rejected])
        shared_lengths = torch.minimum(chosen_lengths, rejected_lengths).repeat(2)
        (chosen, rejected), (chosen_ref, rejected_ref) = (
            logprobs.chunk(2) for logprobs in self._logprobs(both, shared_lengths)
        )
        chosen_logratios, rejected_logratios = chosen - chosen_ref, rejected - rejected_ref
        return PairOutcome(
            losses=self.loss.loss(Pairs(chosen_logratios, rejected_logratios, chosen_lengths, rejected_lengths)),
            reward_chosen=self.loss.beta * chosen_logratios.detach(),
            reward_rejected=self.loss.beta * rejected_logratios.detach(),
            logprob_chosen=chosen.detach(),
            logprob_rejected=rejected.detach(),
        )

    def _logprobs(self, batch: SequenceBatch, shared_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each response under policy and reference, shape (batch,) each."""

        def weighted(logprobs: Tensor) -> Tensor:
            return length_desensitised_logprobs(
                logprobs=logprobs,
                response_mask=batch.response_mask,
                shared_lengths=shared_lengths,
                alpha=self.ld_alpha,
            )

        logprobs = weighted(response_logprobs(self.policy, batch))
        return logprobs, torch.zeros_like(logprobs) if self.reference_free else weighted(self._reference_says(batch))

    @torch.no_grad()
    def _reference_says(self, batch: SequenceBatch) -> Tensor:
        cache = self._cache
        if cache is not None and cache.precision != str(self.trainer.precision):  # that of a fit before
            cache = None
        kept = None if cache is None else cache.get(batch)
        if kept is not None:
            return kept
        self._load_reference_again()
        logprobs = response_logprobs(self.reference, batch)
        if cache is not None:
            cache.put(batch, logprobs)
        return logprobs

    def _load_reference_again(self) -> None:
        """Bring back a reference that has gone, for rows that it has not seen."""
        if not hasattr(self, "reference"):
            name = self.reference_name or (None if self.lora else self.model_name)
            self.reference = load_reference(name, self.policy).to(self.device)

    def _pairs_of_the_run(self, data: PreferenceDataModule) -> int:
        """Return how many pairs training takes at most, one that comes twice counted twice."""
        trainer, pairs = self.trainer, len(data.train_examples)
        limit, epochs, steps = trainer.limit_train_batches, trainer.max_epochs, trainer.max_steps
        an_epoch = min(pairs, limit * data.batch_size) if isinstance(limit, int) else math.ceil(limit * pairs)
        of_epochs = pairs if epochs in (None, -1) else an_epoch * epochs
        of_steps = pairs if steps == -1 else steps * trainer.accumulate_grad_batches * data.batch_size
        return int(min(of_epochs, of_steps))

    @torch.no_grad()
    def _fill(self, cache: LogprobCache, data: PreferenceDataModule) -> None:
        validated = data.val_examples if self.trainer.limit_val_batches else []
        own = [*data.train_examples, *validated][self.global_rank :: self.trainer.world_size]
        known, began = len(cache), time.monotonic()
        told = began
        try:
            for start in range(0, len(own), _ROWS_AT_A_TIME):
                self._ask_reference(cache, data.collate(own[start : start + _ROWS_AT_A_TIME]))
                if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
                    told = time.monotonic()
                    done = start + _ROWS_AT_A_TIME
                    left = (told - began) / done * max(0, len(own) - done)
                    log.info("reference_cache: %d of %d pairs, %.0f s left", min(done, len(own)), len(own), left)
        finally:
            cache.save()  # an interrupted run has not worked for nothing
        self.trainer.strategy.barrier("reference_cache")
        cache.load()
        log.info("reference_cache: %d sequences in %s, %d of them known before", len(cache), cache.folder, known)

    def _ask_reference(self, cache: LogprobCache, pairs: PairBatch) -> None:
        batch = SequenceBatch.stack([pairs.chosen, pairs.rejected])
        rows = torch.tensor(cache.missing(batch), dtype=torch.int64)
        if not len(rows):
            return
        with self.trainer.precision_plugin.forward_context():
            for group in token_groups(batch.lengths[rows], self.max_tokens_per_microbatch):
                part = SequenceBatch(*(tensor.to(self.device) for tensor in batch.select(rows[group])))
                cache.put(part, response_logprobs(self.reference, part))

"""Kahneman-Tversky optimisation: the policy learns from single responses that were found good or bad."""

import logging
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import pad

from rlhf_lightning.data.collate import LabelledBatch
from rlhf_lightning.distributed import gather_rows, global_max
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.preference import kto_loss, kto_reference_point
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.metrics import MaskedMean
from rlhf_lightning.models.causal_lm import response_logprobs
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.modules.microbatches import joined
from rlhf_lightning.modules.reference import ReferenceModule, rows_of_a_process

log = logging.getLogger(__name__)


class LabelledOutcome(NamedTuple):
    """What labelled responses came to; each of shape (batch,).

    Attributes:
        losses: With gradient, float32; the rest is without.
        desirable: True for a good response, bool.
        rewards: β times the log-ratio of each response, float32.
        logprobs: Log-probability of each response under the policy, nats.
    """

    losses: Tensor
    desirable: Tensor
    rewards: Tensor
    logprobs: Tensor


class KTOModule(ReferenceModule):
    """Tune a language model to responses that were found good or bad one by one, staying near a reference.

    A good response should be likelier than under the reference by more than responses are at large, a bad one less. How
    much they are at large, z₀, is estimated from the log-ratios of the batch's responses behind the prompt of the row
    before each, over all processes; a batch needs at least two rows, and the more the better. Before the first step the
    loss is half the weight. Gradients are clipped by ``trainer.gradient_clip_val``.

    Args:
        policy: Hugging Face folder or hub name of the model to be tuned.
        reference: Folder or hub name of the frozen reference; ``null`` takes a copy of the policy as it starts.
        lora: Adapters that the policy is trained by, in place of all its weights; the reference, unless another is
            named, is then the policy without them, over the same weights. ``null`` trains all weights.
        beta: How fast a gain over z₀ saturates, above 0; higher keeps the policy closer to the reference.
        desirable_weight: Weight of good responses, at least 0.
        undesirable_weight: Weight of bad ones, at least 0. Where the two kinds are unequally many, the paper wants
            desirable_weight · good / (undesirable_weight · bad) in [1, 1.5].
        threshold: Labels above it are good: 0.5 serves for true and false; for ratings give the one in the middle.
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
        Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization".
    """

    batch_type = LabelledBatch

    def __init__(
        self,
        policy: str,
        reference: str | None = None,
        lora: LoRA | None = None,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        threshold: float = 0.5,
        max_tokens_per_microbatch: int = 4096,
        gradient_checkpointing: bool = False,
        max_nonfinite: int = 10,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0, fused=True),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(policy, reference, False, lora, max_tokens_per_microbatch, optimizer, lr_scheduler)
        self.gradient_checkpointing = gradient_checkpointing
        self.nonfinite.allow(max_nonfinite)
        if not beta > 0:
            raise UserError(f"beta is {beta}; it must be above 0.")
        weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        for name, weight in weights.items():
            if not weight >= 0:
                raise UserError(f"{name} is {weight}; it must be at least 0.")
        self.save_hyperparameters(
            {"policy": policy, "reference": reference, "beta": beta, "threshold": threshold, **weights}
        )
        self.beta, self.threshold, self.weights = beta, threshold, weights
        names = ("loss", "kl", "reward_desirable", "reward_undesirable", "logprob_desirable", "logprob_undesirable")
        self.val_means = cast("dict[str, MaskedMean]", nn.ModuleDict({name: MaskedMean() for name in names}))

    def on_fit_start(self) -> None:
        """Refuse data from which nothing can be learnt.

        Raises:
            UserError: If batches have one row, or all rows are good, or all bad.
        """
        super().on_fit_start()
        data: Any = getattr(self.trainer, "datamodule", None)
        if getattr(data, "batch_size", 2) < 2:  # of all processes together
            raise UserError("data.batch_size is 1; KTOModule compares the rows of a batch, so it must be at least 2.")
        labels = [example.label for example in getattr(data, "train_examples", [])]
        good = sum(label > self.threshold for label in labels)
        if labels and good in (0, len(labels)):
            kind, word = ("above", "good") if good else ("at or below", "bad")
            raise UserError(
                f"all {len(labels)} labels lie {kind} model.threshold {self.threshold:g}, so all rows are {word}; "
                "KTOModule needs both kinds. Set model.threshold between them."
            )
        if labels and self.global_rank == 0:
            log.info("labels: %d good (above %g), %d bad", good, self.threshold, len(labels) - good)

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """Return the mean loss of the responses of all processes."""
        responses, reference_point = rows_of_a_process(batch.labels), self._reference_point(batch.sequences)

        def loss_of(rows: Tensor) -> tuple[Tensor, LabelledOutcome]:
            outcome = self.evaluate(batch.select(rows), reference_point)
            return outcome.losses.sum() / responses, outcome

        loss, outcomes = self.sum_of_parts(batch.sequences.lengths, loss_of, batch_idx)
        outcome = joined(outcomes)
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True)
        self.log("train/kl", reference_point, sync_dist=True)
        for kind, rows in (("desirable", outcome.desirable), ("undesirable", ~outcome.desirable)):
            self._log_means({f"reward_{kind}": outcome.rewards, f"logprob_{kind}": outcome.logprobs}, of=rows)
        self._log_learning_rate()
        return loss

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Take note of a batch of responses."""
        reference_point = self._reference_point(batch.sequences)
        outcome = self.evaluate(batch, reference_point)
        self.val_means["loss"].update(outcome.losses)
        self.val_means["kl"].update(reference_point)
        for kind, rows in (("desirable", outcome.desirable), ("undesirable", ~outcome.desirable)):
            self.val_means[f"reward_{kind}"].update(outcome.rewards, rows)
            self.val_means[f"logprob_{kind}"].update(outcome.logprobs, rows)

    def on_validation_epoch_end(self) -> None:
        """Log loss, z₀, and rewards and log-probabilities by label, of the whole set."""
        values = {name: mean.compute() for name, mean in self.val_means.items()}
        values["margin"] = values["reward_desirable"] - values["reward_undesirable"]
        known = {f"val/{name}": value for name, value in values.items() if not value.isnan()}  # of kinds that came
        self.log_dict(known, prog_bar=True, sync_dist=True)
        for mean in self.val_means.values():
            mean.reset()

    def test_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Do the same as in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Do the same as after validation."""
        self.on_validation_epoch_end()

    def predict_step(self, batch: LabelledBatch, batch_idx: int) -> dict[str, Any]:
        """Return the texts, and ``label`` and implied ``reward`` of each response, shape (batch,) each."""
        prompts, responses = self.texts(batch.sequences)
        logratios, _ = self._logratios(batch.sequences)
        return {"prompt": prompts, "response": responses, "label": batch.labels, "reward": self.beta * logratios}

    def evaluate(self, batch: LabelledBatch, reference_point: Tensor) -> LabelledOutcome:
        """Return losses, implied rewards and log-probabilities of labelled responses.

        Args:
            batch: The responses.
            reference_point: z₀ of the batch that they are from, nats, a scalar.
        """
        logratios, logprobs = self._logratios(batch.sequences)
        desirable = batch.labels > self.threshold
        losses = kto_loss(
            logratios=logratios, desirable=desirable, reference_point=reference_point, beta=self.beta, **self.weights
        )
        return LabelledOutcome(losses, desirable, self.beta * logratios.detach(), logprobs.detach())

    @torch.no_grad()
    def _reference_point(self, batch: SequenceBatch) -> Tensor:
        mismatched = mismatched_sequences(batch)
        if mismatched is None:
            return kto_reference_point(torch.empty(0, device=self.device))
        return kto_reference_point(gather_rows(self._logratios(mismatched)[0])[0])

    def _logratios(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Return log π - log π_ref and log π of each response, nats, shape (batch,) each."""
        logprobs = response_logprobs(self.policy, batch).float().sum(dim=1)
        with torch.no_grad():
            ref_logprobs = response_logprobs(self.reference, batch).float().sum(dim=1)
        return logprobs - ref_logprobs, logprobs


def mismatched_sequences(batch: SequenceBatch) -> SequenceBatch | None:
    """Put behind each prompt the response of the next row, behind the last that of the first, over all processes.

    Returns:
        As many rows, or ``None`` where all processes together have but one.

    Example:
        >>> lengths = torch.tensor([1, 2])
        >>> batch = SequenceBatch(torch.tensor([[5, 6, 0], [7, 8, 9]]), torch.tensor([1, 1]), lengths)
        >>> mismatched_sequences(batch).input_ids
        tensor([[5, 8, 9],
                [7, 6, 0]])
    """
    width = int(global_max(batch.response_lengths.max()))
    tokens = pad(batch.response_tokens, (0, width - batch.response_tokens.shape[1]))
    rows, places = gather_rows(torch.cat([tokens, batch.response_lengths[:, None]], dim=1))
    if len(rows) == 1:
        return None
    others = rows[(places + 1) % len(rows)]
    prompt_lengths, lengths = batch.prompt_lengths, others[:, -1]
    total, longest_prompt = prompt_lengths + lengths, int(prompt_lengths.max())
    columns = torch.arange(int(total.max()), device=rows.device).expand(len(others), -1)
    of_prompt = batch.input_ids[:, :longest_prompt].gather(1, columns.clamp(max=longest_prompt - 1))
    of_response = others[:, :-1].gather(1, (columns - prompt_lengths[:, None]).clamp(min=0, max=width - 1))
    ids = torch.where(columns < prompt_lengths[:, None], of_prompt, of_response)
    return SequenceBatch(torch.where(columns < total[:, None], ids, 0), prompt_lengths, lengths)

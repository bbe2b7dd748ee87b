"""How likely the model in training finds given answers, as training goes on."""

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from rlhf_lightning.distributed import global_sum
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.answer_sets import LikelihoodSet

if TYPE_CHECKING:
    from rlhf_lightning.evaluation.answer_sets import EncodedAnswers


class EvaluateLikelihood(pl.Callback):
    """Logs how likely the model in training finds the answers of named data sets, after validations.

    ``val/logprob_<name>`` is the mean over answers of each one's mean log-probability a token, nats, and
    ``val/perplexity_<name>`` e to the minus mean over all tokens. It draws no random numbers of the run's, so a run
    with it ends in the same weights as one without.

    Args:
        sets: What to measure, by name, such as ``{unseen: {source: dolly.jsonl, limit: 64}}``. Names are of letters,
            digits, ``-`` and ``_``.
        every_n: Validations from one measurement to the next; the first one measures.
        batch_size: Answers of a process in one forward pass.
        seed: Fixes which rows are drawn.

    Raises:
        UserError: If a number is below 1, or there are no sets; from ``setup`` if one cannot be read.
    """

    def __init__(self, sets: dict[str, LikelihoodSet], every_n: int = 1, batch_size: int = 32, seed: int = 0) -> None:
        if not sets:
            raise UserError("EvaluateLikelihood: sets is empty; name at least one data set.")
        for name in sets:
            if not name.replace("-", "_").replace("_", "a").isalnum():
                raise UserError(
                    f"EvaluateLikelihood: {name!r} cannot be part of a log key; use letters, digits, - and _."
                )
        if every_n < 1 or batch_size < 1:
            raise UserError(
                f"EvaluateLikelihood: every_n is {every_n} and batch_size {batch_size}; both must be at least 1."
            )
        self.sets, self.every_n, self.batch_size, self.seed = sets, every_n, batch_size, seed
        self.validations = 0
        self._answers: dict[str, EncodedAnswers] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the sets, before any training time is spent.

        Raises:
            UserError: If a set cannot be read, or the module trains no language model.
        """
        from rlhf_lightning.evaluation.answer_sets import read_answers

        module: Any = pl_module
        if not str(getattr(module, "export_prefix", "")).startswith("policy"):
            raise UserError(
                f"EvaluateLikelihood: {type(module).__name__} trains no language model whose answers have a likelihood;"
                " remove the callback."
            )
        if stage in ("fit", "validate") and not self._answers:
            self._answers = {
                name: read_answers(wanted, module.tokenizer, seed=self.seed, where=f"EvaluateLikelihood.sets.{name}")
                for name, wanted in self.sets.items()
            }
            self._refuse_too_long(getattr(module.start_config(), "max_position_embeddings", None))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, after every n-th validation; not after the few batches of a sanity check."""
        if trainer.sanity_checking:
            return
        self.validations += 1
        if (self.validations - 1) % self.every_n:
            return
        for name, answers in self._answers.items():
            per_answer, per_token = self._measure(trainer, pl_module, answers)
            pl_module.log(f"val/logprob_{name}", per_answer, sync_dist=True)
            pl_module.log(f"val/perplexity_{name}", (-per_token).exp(), sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        """Return how many validations there were."""
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on."""
        self.validations = state_dict["validations"]

    def _measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, answers: "EncodedAnswers"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean over answers and that over tokens, nats a token, each process reading its share."""
        from rlhf_lightning.evaluation.generations import sequence_logprobs

        module: Any = pl_module
        own = torch.arange(trainer.global_rank, len(answers.sequences.lengths), trainer.world_size)
        sums = torch.zeros(4)
        if len(own):
            sequences = answers.sequences.select(own)
            with trainer.precision_plugin.forward_context():
                totals = sequence_logprobs(module.exported_model, sequences, batch_size=self.batch_size)
            lengths = sequences.response_lengths
            sums = torch.stack([(totals / lengths).sum(), totals.sum(), lengths.sum(), torch.tensor(len(own))])
        means, totals, tokens, count = global_sum(sums.float().to(pl_module.device)).cpu()
        return means / count, totals / tokens

    def _refuse_too_long(self, reach: int | None) -> None:
        for name, answers in self._answers.items():
            length = int(answers.sequences.lengths.max())
            if reach is not None and length > reach:
                raise UserError(
                    f"EvaluateLikelihood.sets.{name} has sequences of {length} tokens, but the model reads at most "
                    f"{reach}; lower its max_length."
                )

"""What the modules that train a reward model share: the model, its head, and what its config tells those who use it."""

import json
import logging
from abc import abstractmethod
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from rlhf_lightning.algorithm.score_transforms import global_moments
from rlhf_lightning.checkpoint_files import CHECKPOINT_KEY
from rlhf_lightning.data.chat import end_chats_at_stop
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.models.loading import is_sequence_classifier, load_sequence_classifier
from rlhf_lightning.models.lora import LoRA, add_adapters
from rlhf_lightning.models.scalar_head import ScalarModel, ensure_distinct_pad
from rlhf_lightning.modules.base import ModelModule
from rlhf_lightning.modules.microbatches import MicroBatching

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

#: Entries of the exported config that are found in training.
_NOTED = ("scored_token_id", "score_mean", "score_std")


class ScoringModule(MicroBatching, ModelModule):
    """Base of the modules that train an ``AutoModelForSequenceClassification`` with one label, read at the last token.

    Args:
        model: Hugging Face folder or hub name of the start: a language model, which gets a new scalar head, or a
            reward model.
        head_std: Standard deviation of the head's first weights; ``None`` keeps those of a reward model and draws those
            of a new head with 1/√(d + 1), where d is the hidden size.
        store_score_statistics: Whether mean and standard deviation of the validation scores go into the config.
        lora: Adapters of the model; ``None`` trains all of it.
        max_tokens_per_microbatch: Tokens in one forward pass of a process.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimizer, stepped once a training step; ``None`` keeps the learning rate.
    """

    export_prefix = "scalar.model."

    def __init__(
        self,
        model: str,
        head_std: float | None,
        store_score_statistics: bool,
        lora: LoRA | None,
        max_tokens_per_microbatch: int,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__(model, optimizer, lr_scheduler)
        self.take_microbatches(max_tokens_per_microbatch)
        if head_std is not None and not head_std >= 0:
            raise UserError(f"head_std is {head_std}; it must be at least 0, or null for 1/sqrt(hidden size + 1).")
        self.head_std, self.store_score_statistics, self.lora = head_std, store_score_statistics, lora
        self._seen_scores: list[Tensor] = []
        self._measured_at: int | None = None
        self._untrained_head = False

    @abstractmethod
    def batch_scores(self, batch: Any) -> Tensor:
        """Return the scores of all responses of a batch, shape (responses,)."""

    @property
    def exported_model(self) -> "PreTrainedModel":
        """The sequence-classification model."""
        return self.scalar.model

    def configure_model(self) -> None:
        """Load the weights, once."""
        if not hasattr(self, "scalar"):
            model = load_sequence_classifier(self.model_name, new_head=True)
            if self.head_std is not None:
                head: Any = model.score
                nn.init.normal_(head.weight, std=self.head_std)
            ensure_distinct_pad(model, self.tokenizer)
            end_chats_at_stop(self.tokenizer)
            # Also where no token is noted, the entry tells that the last one is read (RewardModel.as_transformers).
            model.config.scored_token_id = getattr(model.config, "scored_token_id", None)
            self.scalar = ScalarModel(add_adapters(model, self.lora))
            self._untrained_head = not is_sequence_classifier(self.start_config())

    def on_validation_start(self) -> None:
        """Say so where a head is judged that has had no training."""
        if self._untrained_head and self.trainer.state.fn != TrainerFn.FITTING:
            log.warning("the scalar head is untrained, its scores are random: name a checkpoint by --ckpt_path.")

    on_test_start = on_predict_start = on_validation_start

    def on_train_start(self) -> None:
        """Forget the statistics of other weights, and make sure that there is something to measure new ones on.

        Raises:
            UserError: If the statistics are wanted, but there are no validation rows.
        """
        if self.store_score_statistics and not self._validation_loaders():
            raise UserError(
                "store_score_statistics needs validation rows to measure the scores on; set data.val_source or "
                "data.val_size."
            )
        self._untrained_head = False
        if self.trainer.global_step == 0 or not self.store_score_statistics:
            for name in ("score_mean", "score_std"):
                vars(self._config).pop(name, None)

    def on_validation_epoch_start(self) -> None:
        """Forget the scores of the validation before."""
        self._seen_scores = []

    def on_train_epoch_end(self) -> None:
        """Measure the scores of the weights at hand, unless a validation has just done so."""
        if not self.store_score_statistics or self._measured_at == self.trainer.global_step:
            return
        self.eval()
        self._seen_scores = []
        with torch.no_grad(), self.trainer.precision_plugin.val_step_context():
            for loader in self._validation_loaders():
                for batch in loader:
                    self._note_scores(self.batch_scores(self.trainer.strategy.batch_to_device(batch)))
        self._store_statistics()
        self.train()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Do the same as in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Do the same as after validation."""
        self.on_validation_epoch_end()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what the checkpoint's config tells of the scores, and its head as trained."""
        super().on_load_checkpoint(checkpoint)
        self._untrained_head = False
        config = json.loads(checkpoint[CHECKPOINT_KEY]["files"]["config.json"])
        for name in _NOTED:
            if config.get(name) is not None:
                setattr(self._config, name, config[name])

    @property
    def _config(self) -> Any:
        return self.scalar.model.config

    def _note_scores(self, *scores: Tensor) -> None:
        """Keep scores of validation rows for the statistics."""
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if self.store_score_statistics and fitting:
            self._seen_scores += [part.detach() for part in scores]

    def _store_statistics(self) -> None:
        """Write mean and standard deviation of the noted scores of all processes into the config."""
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if not self.store_score_statistics or not fitting or self.trainer.sanity_checking:
            return
        moments = global_moments(torch.cat([torch.zeros(0, device=self.device), *self._seen_scores]))
        self._config.score_mean = moments.mean
        self._config.score_std = (moments.squares / moments.number) ** 0.5
        self._seen_scores, self._measured_at = [], self.trainer.global_step

    def _validation_loaders(self) -> list[Any]:
        if not self.trainer.enable_validation:
            return []
        if self.trainer.val_dataloaders is None:  # as long as no validation was due
            self.trainer.validating = True
            self.trainer.fit_loop.epoch_loop.val_loop.setup_data()
            self.trainer.training = True
        loaders = self.trainer.val_dataloaders or []
        return list(loaders) if isinstance(loaders, list | tuple) else [loaders]

    def _note_scored_token(self, sequences: SequenceBatch) -> None:
        """Write into the config at which token the score is read, so that PPO can tell whether its responses end so."""
        if getattr(self._config, "scored_token_id", None) is None:
            last = sequences.input_ids.gather(1, (sequences.lengths - 1)[:, None]).flatten()
            token, times = Counter(torch.Tensor.tolist(last)).most_common(1)[0]
            if 2 * times > len(last):  # truncated responses end anywhere, and so may those that PPO will bring
                self._config.scored_token_id = token

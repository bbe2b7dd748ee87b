"""A warning where no response comes to its end."""

import logging
from typing import Any

import lightning.pytorch as pl

logger = logging.getLogger("rlhf_lightning")


class UnfinishedWarning(pl.Callback):
    """Warns in one line, once each for rollouts and validations, when not one response of them ended by itself.

    All of them were then cut off at ``max_new_tokens``: either that is too little, or the text ends with a token that
    is no stop token. A reward model that was trained on whole responses judges such pieces badly. What is read is
    ``rollout/finished_fraction`` and ``val/finished_fraction``; a module that logs neither is left alone.
    """

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Look at the rollout."""
        self._look(trainer, "rollout")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the validation."""
        if not trainer.sanity_checking:
            self._look(trainer, "val")

    on_test_end = on_validation_end

    def _look(self, trainer: pl.Trainer, part: str) -> None:
        share = trainer.callback_metrics.get(f"{part}/finished_fraction")
        if share is None or part in self._warned or not trainer.is_global_zero or float(share) > 0:
            return
        self._warned.add(part)
        logger.warning(
            "no response of this %s ended by itself: all were cut off. Raise model.sampling.max_new_tokens, or name "
            "the tokens that end a response here by model.sampling.stop_tokens.",
            {"rollout": "rollout", "val": "validation"}[part],
        )

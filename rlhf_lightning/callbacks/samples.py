"""What the model says: a table in TensorBoard and ``samples.jsonl``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from rlhf_lightning.callbacks.timing import run_ends
from rlhf_lightning.errors import UserError
from rlhf_lightning.loggers import JSONLines
from rlhf_lightning.markdown import escape_cell, markdown_table

#: Letters of a text that the table shows; samples.jsonl holds all of them.
MAX_LETTERS = 1000
COLUMNS = ("prompt", "response", "score", "kl", "length", "finished")


def plain_text(prompt: Any) -> str:
    """Write a prompt, a string or a list of chat messages, as text.

    Example:
        >>> plain_text([{"role": "user", "content": "Hello"}])
        'user: Hello'
    """
    if isinstance(prompt, list):
        return "\n".join(f"{message.get('role', '?')}: {message.get('content', '')}" for message in prompt)
    return str(prompt)


def sample_table(samples: Sequence[dict[str, Any]]) -> str:
    """Write samples as a Markdown table; a column that no sample has is left out.

    Args:
        samples: Each with some of prompt, response, score, kl (nats a response), length (tokens), finished.

    Example:
        >>> print(sample_table([{"prompt": "Hi", "response": "Hello", "score": 0.51234, "finished": True}]))
        | prompt | response | score | finished |
        |---|---|---|---|
        | Hi | Hello | 0.512 | yes |
    """
    columns = [name for name in COLUMNS if any(name in sample for sample in samples)]
    return markdown_table(columns, [[_cell(sample.get(name, "")) for name in columns] for sample in samples])


def _cell(value: Any) -> str:
    """Write a value as the text of a cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    text = plain_text(value)
    return escape_cell(text if len(text) <= MAX_LETTERS else text[:MAX_LETTERS] + " …")


class SampleTable(pl.Callback):
    """Shows what the model answers: a table on TensorBoard's "Text" page and lines of ``samples.jsonl``.

    Rollouts are read from the module's ``samples`` after a training step and from its ``val_samples`` after a
    validation, each a list of dicts with prompt, response, score, kl, length and finished; a module without them is
    left alone. A line of ``samples.jsonl`` holds the whole sample, ``step`` (as in ``metrics.jsonl``: iterations before
    this one) and ``split`` ("train" or "val").

    Args:
        every_n: Iterations between two tables of rollouts; the first and the last iteration always have one.
        num: Samples in each, the first of the rollout.

    Raises:
        UserError: If a number is below 1.
    """

    def __init__(self, every_n: int = 10, num: int = 8) -> None:
        if every_n < 1 or num < 1:
            msg = f"SampleTable: every_n is {every_n} and num is {num}; both must be 1 or more."
            raise UserError(msg)
        self.every_n = every_n
        self.num = num
        self._last_step = -1
        self._lines: JSONLines | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Settle the file."""
        self._lines = JSONLines(Path(trainer.default_root_dir) / "samples.jsonl")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the rollouts of every n-th iteration and of the last, which has to be there before it is saved."""
        if _step(trainer) % self.every_n == 0 or run_ends(trainer):
            self._write_rollouts(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the last rollouts of a run that was stopped early."""
        self._write_rollouts(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what was answered to the validation prompts."""
        if not trainer.sanity_checking:
            self._write(trainer, getattr(pl_module, "val_samples", None), "val")

    def _write_rollouts(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _step(trainer) != self._last_step:
            self._last_step = _step(trainer)
            self._write(trainer, getattr(pl_module, "samples", None), "train")

    def _write(self, trainer: pl.Trainer, samples: list[dict[str, Any]] | None, split: str) -> None:
        """Write some samples to both places."""
        if not samples or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert self._lines is not None
        shown, step = samples[: self.num], _step(trainer)
        self._lines.write(*({"step": step, "split": split, **sample} for sample in shown))
        name = "samples/rollout" if split == "train" else "samples/val"
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(name, sample_table(shown), step)


def _step(trainer: pl.Trainer) -> int:
    """Return the number of training batches before the present one, which is what the loggers' x axis counts."""
    return max(0, trainer.fit_loop.epoch_loop.total_batch_idx)

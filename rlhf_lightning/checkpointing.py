"""The checkpoints that a run keeps: written between two steps, whole at every moment."""

import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rlhf_lightning.distributed import any_process
from rlhf_lightning.errors import UserError
from rlhf_lightning.interruption import INTERRUPTED, Interruption
from rlhf_lightning.taking_up import LAST_CHECKPOINT, step_of

logger = logging.getLogger("rlhf_lightning")


class RunCheckpoint(Checkpoint):
    """Keep ``checkpoints/last.ckpt`` in the run folder, complete at every moment.

    A checkpoint is written beside its final name, flushed to the disk and moved into place, so that whoever is killed
    finds the earlier one whole. It is written between two training steps only, behind the validation where one follows
    the step, at the end of training, and when the process is asked to stop (SIGTERM, or a first Ctrl-C, which lets the
    step end; a second stops at once).

    Args:
        every_n_minutes: Time between two checkpoints; 0 writes none by the clock. More often loses less work to a
            kill and spends more time on writing.
        every_n_steps: Training steps (for PPO: iterations) between two checkpoints; 0 writes none by the count.
    """

    def __init__(self, every_n_minutes: float = 5.0, every_n_steps: int = 0) -> None:
        if every_n_minutes < 0 or every_n_steps < 0:
            raise UserError(
                f"RunCheckpoint: every_n_minutes is {every_n_minutes} and every_n_steps {every_n_steps}; "
                "both must be 0 (never) or more."
            )
        self.every_n_minutes = every_n_minutes
        self.every_n_steps = every_n_steps
        self._saved_step = -1
        self._saved_time = time.monotonic()
        self._validated = False  # since it was saved
        self._training = False
        self._due = False  # after the validation that follows
        self._interruption = Interruption()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove what a killed run left half-written."""
        if stage == "fit" and trainer.is_global_zero:
            _unfinished(self._path(trainer)).unlink(missing_ok=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and listen for Ctrl-C."""
        self._saved_step, self._saved_time, self._validated = trainer.global_step, time.monotonic(), False
        self._training, self._due = True, False
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._interruption.listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where the count or the clock says so, or stop where that is asked for."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            self._interruption.postpone(trainer)  # gradients of half a step are in no checkpoint
            return
        # Clocks differ between processes; the first one's decides.
        late = trainer.is_global_zero and 0 < 60 * self.every_n_minutes < time.monotonic() - self._saved_time
        self._interruption.go_on(trainer)
        stop, late = any_process(self._interruption.asked, late)
        if stop:
            self._interruption.stop(trainer)
        elif self._saved_step != trainer.global_step:
            due = self.every_n_steps > 0 and trainer.global_step % self.every_n_steps == 0
            if (due or late) and _validation_follows(trainer):
                self._due = True  # taken up from before it, a run would go on without it
            elif due or late:
                self._save(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the validation of the last step run to its end: half of one gives no numbers."""
        self._interruption.wait(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where the step before asked for it, and stop where that was asked for before or meanwhile."""
        self._validated = True
        self._interruption.stops(trainer)
        (stopping,) = any_process(trainer.received_sigterm)
        if (stopping or self._due) and not trainer.sanity_checking:
            self._save(trainer)  # before Lightning counts the step, as it will again when it is restarted from here

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of training."""
        self._save(trainer)
        if self._interruption.stops(trainer):
            raise SIGTERMException  # Lightning has looked for the last time.
        self._interruption.forget()
        self._training = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save when asked to stop; Lightning finishes the training step before it says so."""
        try:
            if isinstance(exception, SIGTERMException):
                if self._interruption.agreed:
                    # Lightning kills the first process when one that it started from there fails.
                    exception.code = INTERRUPTED if trainer.local_rank == 0 else 0
                if self._validated or trainer.global_step != self._saved_step:
                    self._save(trainer)
        finally:
            self._interruption.forget()
            if self._training or isinstance(exception, SIGTERMException | KeyboardInterrupt):
                self._say_what_is_kept(trainer)

    def _say_what_is_kept(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = self._path(trainer)
        if not path.exists():
            logger.warning("no checkpoint was written; --ckpt_path auto would start from the beginning")
            return
        step = step_of(path)
        name = "checkpoint" if step is None else f"checkpoint of step {step}"
        logger.warning("%s: %s; --ckpt_path auto takes it up", name, path)

    def _path(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / LAST_CHECKPOINT

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = self._path(trainer)
        unfinished = _unfinished(path)
        trainer.save_checkpoint(unfinished, weights_only=False)
        if trainer.is_global_zero:
            _put_in_place(unfinished, path)
        trainer.strategy.barrier("RunCheckpoint")
        self._saved_step, self._saved_time, self._validated = trainer.global_step, time.monotonic(), False
        self._due = False


def _validation_follows(trainer: Trainer) -> bool:
    """Tell whether this step is validated; there is no public way to know.

    By the clock processes could come to different answers; none is given then.
    """
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    by_clock = getattr(trainer, "_val_check_time_interval", None) is not None
    if by_clock or fetcher is None or not sum(trainer.num_val_batches):
        return False
    return loop._should_check_val_fx(fetcher)


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.unfinished")


def _put_in_place(written: Path, path: Path) -> None:
    if written.is_dir():  # A sharded checkpoint.
        shutil.rmtree(path, ignore_errors=True)
        written.replace(path)
        return
    for name in (written, written.parent):
        handle = os.open(name, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        if name is written:
            written.replace(path)

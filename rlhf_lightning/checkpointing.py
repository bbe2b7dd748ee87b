"""The checkpoints that a run keeps: written between two steps, whole at every moment, and never ahead of its logs."""

import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rlhf_lightning.callbacks.timing import run_ends
from rlhf_lightning.checkpoint_files import (
    RUN_KEY,
    check_file,
    put_in_place,
    read_head,
    remove,
    sync_to_disk,
    unfinished,
    write_file,
)
from rlhf_lightning.distributed import any_process
from rlhf_lightning.errors import UserError, did_you_mean
from rlhf_lightning.interruption import Interruption
from rlhf_lightning.loggers import cut_logs, log_step_now, settle_logs
from rlhf_lightning.taking_up import LAST_CHECKPOINT, step_of

logger = logging.getLogger("rlhf_lightning")


class StreamedCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints straight into their files; Lightning's own builds each twice in memory before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write one whole, or nothing, and wait until it is on the disk."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        beside = unfinished(Path(path))
        try:
            write_file(checkpoint, beside)
        except BaseException:
            remove(beside)
            raise
        beside.replace(path)
        sync_to_disk(beside.parent)


class Best:
    """The best value of a metric so far, and the step it was reached at.

    Args:
        monitor: Name of the metric; ``None`` is off.
        mode: Whether the largest or the smallest value is best.
    """

    def __init__(self, monitor: str | None, mode: Literal["max", "min"]) -> None:
        self.monitor, self.mode = monitor, mode
        self.value: float | None = None
        self.step: int | None = None

    def improves(self, trainer: Trainer) -> bool:
        """Tell whether the metric is better now; every process gets the first one's answer."""
        value = self._present(trainer)
        better = value is not None and (
            self.value is None or (value > self.value if self.mode == "max" else value < self.value)
        )
        return self.monitor is not None and any_process(better and trainer.is_global_zero)[0]

    def take(self, trainer: Trainer) -> None:
        """Take the present value for the best."""
        self.value, self.step = self._present(trainer), trainer.global_step

    def check_is_logged(self, trainer: Trainer) -> None:
        """Refuse a metric that a whole validation and the steps before it did not log.

        Raises:
            UserError: If there is none of that name.
        """
        logged = sorted(trainer.callback_metrics)
        if self.monitor is not None and self.monitor not in logged:
            advice = did_you_mean(self.monitor, logged) or f" Logged are {', '.join(logged) or 'none'}."
            raise UserError(f"RunCheckpoint: monitor is '{self.monitor}', and no metric is called so.{advice}")

    def state(self) -> dict[str, Any] | None:
        """Return what a checkpoint keeps of it."""
        return None if self.value is None else dict(vars(self))

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from there, unless another metric is watched now."""
        if state is not None and (state["monitor"], state["mode"]) == (self.monitor, self.mode):
            self.value, self.step = state["value"], state["step"]

    def _present(self, trainer: Trainer) -> float | None:
        value = None if self.monitor is None else trainer.callback_metrics.get(self.monitor)
        return None if value is None or math.isnan(value) else float(value)


class RunCheckpoint(Checkpoint):
    """Keep the newest checkpoints of a run and its best one in ``checkpoints``, each whole at every moment.

    ``last.ckpt`` is the newest, ``step-<n>.ckpt`` are those before it, ``best.ckpt`` is the best by a metric. A
    checkpoint is written beside its final name, flushed to the disk and moved into place, so that whoever is killed
    finds the earlier one whole; one that is damaged later is told by its checksums, and the one before it is taken up.
    It is written between two training steps only, behind the validation where one follows the step, at the end of
    training, and when the process is asked to stop (SIGTERM, SIGUSR1, or a first Ctrl-C, which lets the step end; a
    second stops at once).

    Args:
        every_n_minutes: Time between two checkpoints; 0 writes none by the clock. More often loses less work to a
            kill and spends more time on writing.
        every_n_steps: Training steps (for PPO: iterations) between two checkpoints; 0 writes none by the count.
        keep: Newest checkpoints to keep, at least 1. With 1 nothing is left to go on from where that one is damaged;
            while one is written the disk holds one more.
        monitor: Metric by which the best checkpoint is kept too, such as ``val/score``; ``None`` keeps none. It is
            read behind each validation, where a better value is saved at once, and whenever a checkpoint is written.
        mode: Whether the largest (``max``) or the smallest (``min``) value of it is best.
    """

    def __init__(
        self,
        every_n_minutes: float = 5.0,
        every_n_steps: int = 0,
        keep: int = 2,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
    ) -> None:
        if every_n_minutes < 0 or every_n_steps < 0:
            raise UserError(
                f"RunCheckpoint: every_n_minutes is {every_n_minutes} and every_n_steps {every_n_steps}; "
                "both must be 0 (never) or more."
            )
        if keep < 1:
            raise UserError(f"RunCheckpoint: keep is {keep}; it must be 1 (the newest alone) or more.")
        if mode not in ("max", "min"):
            raise UserError(f"RunCheckpoint: mode is {mode!r}; it must be 'max' or 'min'.")
        self.every_n_minutes = every_n_minutes
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.best = Best(monitor, mode)
        self._saved_step = -1
        self._saved_time = time.monotonic()
        self._kept_step: int | None = None  # of last.ckpt
        self._next_step: int | None = None  # to be logged, where a checkpoint is taken up or written
        self._validated_step = -1  # last validated, unless it was saved since
        self._training = False
        self._due = False  # after the validation that follows
        self._interruption = Interruption()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove what a killed run left half-written, and have checkpoints written straight to the disk."""
        if stage != "fit":
            return
        self._next_step = None
        self._interruption.take_over_requeue(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = StreamedCheckpointIO()
        if trainer.is_global_zero:
            run_dir = Path(trainer.default_root_dir)
            for half in [*self._path(trainer).parent.glob(".*.unfinished"), *run_dir.glob(".*.jsonl.unfinished")]:
                remove(half)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember what was best and what was logged."""
        state = checkpoint.get(RUN_KEY, {})
        self._next_step = state.get("next_step")
        self.best.restore(state.get("best"))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what was best and what was logged."""
        checkpoint[RUN_KEY] = {"next_step": self._next_step, "best": self.best.state()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, listen for Ctrl-C, and cut what was logged beyond the checkpoint that is taken up."""
        self._saved_step, self._saved_time, self._validated_step = trainer.global_step, time.monotonic(), -1
        self._training, self._due = True, False
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._interruption.listen(several=trainer.world_size > 1)
        if trainer.is_global_zero:
            self._kept_step = self._whole_step(trainer)
            if self._next_step is not None:
                cut_logs(Path(trainer.default_root_dir), self._next_step)
        self._next_step = None

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
        stop, requeue, terminated, late = any_process(*self._interruption.requests, late)
        if stop:
            self._interruption.stop(trainer, requeue=requeue, terminated=terminated)
        elif self._saved_step != trainer.global_step and not run_ends(trainer):  # which is saved there
            due = self.every_n_steps > 0 and trainer.global_step % self.every_n_steps == 0
            if (due or late) and _validation_follows(trainer):
                self._due = True  # taken up from before it, a run would go on without it
            elif due or late:
                log_step_now(trainer)
                self._save(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the validation of the last step run to its end: half of one gives no numbers."""
        self._interruption.wait(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where the step before asked for it or is the best, and stop where that was asked for."""
        if trainer.sanity_checking:
            return
        self._validated_step = trainer.global_step
        self._interruption.stops(trainer)
        (stopping,) = any_process(trainer.received_sigterm)
        wanted = self._due or (self.best.improves(trainer) and not trainer.fit_loop._should_accumulate())
        if stopping or (wanted and not run_ends(trainer)):
            self._save(trainer)  # before Lightning counts the step, as it will again when it is restarted from here
        self.best.check_is_logged(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of training."""
        self._save(trainer, counted=True)
        if self.best.monitor is not None and self.best.step is None and trainer.is_global_zero:
            logger.warning("no best checkpoint: %s was never logged, or never a number", self.best.monitor)
        stops = self._interruption.stops(trainer)
        if stops or any_process(trainer.received_sigterm)[0]:
            raise SIGTERMException  # Lightning has looked for the last time.
        self._interruption.forget()
        self._training = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save when asked to stop; Lightning finishes the training step before it says so."""
        try:
            if isinstance(exception, SIGTERMException):
                if self._interruption.agreed:
                    # Lightning kills the first process when one that it started from there fails.
                    exception.code = self._interruption.status if trainer.local_rank == 0 else 0
                validated = self._validated_step == trainer.global_step
                if validated or trainer.global_step != self._saved_step:
                    self._save(trainer, counted=not _back_to_the_step(trainer, validated=validated))
                self._interruption.ask_for_requeue(trainer)
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

    def _whole_step(self, trainer: Trainer) -> int | None:
        """Return the step of ``last.ckpt``; ``None`` where there is none, or one that is not worth keeping."""
        path = self._path(trainer)
        try:
            if path.is_file():
                check_file(path)
            return int(read_head(path)["global_step"])
        except (UserError, KeyError):
            return None

    def _save(self, trainer: Trainer, *, counted: bool = False) -> None:
        """Write a checkpoint and put it in place.

        Args:
            trainer: In the state that is to be saved.
            counted: Whether Lightning has counted the step that was last logged.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path, step = self._path(trainer), trainer.global_step
        logged = trainer.fit_loop.epoch_loop._batches_that_stepped  # the loggers' x axis; there is no public name
        self._next_step = logged + (not counted and not trainer.fit_loop._should_accumulate())
        is_best = self.best.improves(trainer)
        if is_best:
            self.best.take(trainer)
        self._write(trainer, unfinished(path))
        if trainer.is_global_zero:
            before = None if self._kept_step == step else self._kept_step
            put_in_place(unfinished(path), path.parent, step=step, before=before, keep=self.keep, is_best=is_best)
            self._kept_step = step
            if is_best:
                logger.info("best so far: %s %.4g at step %d", self.best.monitor, self.best.value, step)
        trainer.strategy.barrier("RunCheckpoint")
        self._saved_step, self._saved_time, self._validated_step = step, time.monotonic(), -1
        self._due, self._next_step = False, None

    def _write(self, trainer: Trainer, path: Path) -> None:
        """Write a checkpoint as ``trainer.save_checkpoint`` does, but so that all processes learn of a failure.

        Raises:
            UserError: If it cannot be written, such as where the disk is full; what was written of it is removed.
        """
        fault: OSError | None = None
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        try:
            if trainer.is_global_zero:
                settle_logs(trainer)
            trainer.strategy.save_checkpoint(checkpoint, path)
        except OSError as failure:
            fault = failure
        (failed,) = any_process(fault is not None)
        if not failed:
            return
        reason = "another process could not write it" if fault is None else fault.strerror or str(fault)
        if trainer.is_global_zero:
            remove(path)
        raise UserError(
            f"the checkpoint of step {trainer.global_step} cannot be written into '{path.parent}': {reason} "
            f"({_free(path.parent)}). Make room there and go on with --ckpt_path auto."
        ) from fault


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free"
    except OSError:
        return "the folder is gone"


def _back_to_the_step(trainer: Trainer, *, validated: bool) -> bool:
    """Put Lightning's counts back from the end of an epoch to that of its last step; return whether they were there.

    It goes on rightly from a checkpoint of that step, or of the validation behind it. One that is written behind the
    epoch, where limits of steps end the run, it takes for one of within: the next epoch ends after a single step.
    """
    loop = trainer.fit_loop
    epochs, batches = loop.epoch_progress, loop.epoch_loop.batch_progress
    if not (trainer.is_last_batch and epochs.current.completed == epochs.current.ready):
        return False
    pairs: list[tuple[Any, Any]] = [(epochs.current, batches.current), (epochs.total, batches.total)]
    for epoch, batch in pairs:
        epoch.processed -= 1
        epoch.completed -= 1
        batch.completed -= not validated
    loop.epoch_loop._batches_that_stepped -= 1
    return True


def _validation_follows(trainer: Trainer) -> bool:
    """Tell whether this step is validated; there is no public way to know.

    By the clock processes could come to different answers; none is given then.
    """
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    by_clock = getattr(trainer, "_val_check_time_interval", None) is not None
    if by_clock or fetcher is None or not sum(trainer.num_val_batches):
        return False
    return loop._should_check_val_fx(fetcher)

"""The progress bar: one line for the whole run, that moves during long rollouts too."""

import builtins
import os
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm  # type: ignore[import-untyped]

from rlhf_lightning.callbacks.timing import PhaseTimer, clock, seconds_left

#: Columns that the bar should have with its ends; where there are fewer, the texts stand without it.
LEAST_BAR = 7
#: Values that matter more than the bar.
LEAST_VALUES = 3
#: What is shown and how, the most telling first: the first of these groups of which the run logs something.
SHOWN = (
    (
        ("rollout/score", "score {:z.3f}"),
        ("rollout/kl", "kl {:z.2f}"),
        ("time/tokens_per_s", "{:z.0f} tok/s"),
        ("val/score", "val score {:z.3f}"),
    ),
    (
        ("train/loss", "loss {:z.4f}"),
        ("val/accuracy", "val accuracy {:z.3f}"),
        ("val/loss", "val loss {:z.4f}"),
    ),
)


def describe_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """Write the values that one watches, the most telling first.

    A run that logs ``rollout/score`` shows score, KL and tokens per second; another shows losses and accuracy. Where
    Lightning has split a name in two (``train/loss_step``), the step's value is shown.

    Example:
        >>> describe_metrics({"rollout/score": 0.71234, "rollout/kl": 2.0, "time/tokens_per_s": 412.4, "train/loss": 1})
        ['score 0.712', 'kl 2.00', '412 tok/s']
        >>> describe_metrics({"train/loss_step": 2.30258, "val/accuracy": 0.5})
        ['loss 2.3026', 'val accuracy 0.500']
    """
    for group in SHOWN:
        texts = []
        for name, form in group:
            value = metrics.get(name, metrics.get(f"{name}_step"))
            if value is not None:
                texts.append(form.format(float(value)))
        if texts:
            return texts
    return []


def is_interactive() -> bool:
    """Tell whether a line on the standard output can be redrawn: a terminal or a notebook, not a file or a CI log."""
    return (sys.stdout.isatty() and os.environ.get("TERM") != "dumb") or "ipykernel" in sys.modules


def line_width() -> int:
    """Return how many letters of a line the standard output shows; 79 where it does not say."""
    try:
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):  # no terminal beneath, as in a notebook
        columns = 0
    return (columns or shutil.get_terminal_size().columns) - 1  # the last column makes some terminals wrap


def _percent(done: float, total: float) -> str:
    return f"{min(done / total, 1.0) if total else 0.0:.0%}"


class PhaseProgressBar(ProgressBar):
    """One line for the whole run: iterations done, the phase at work, score, KL, tokens per second and the time left.

    In a terminal the line is redrawn in place; elsewhere (a file, a CI log) a plain line is printed now and then. A
    module that does long work within one batch reports it by :meth:`phase`. The time left is estimated from the mean
    speed since this launch, validation included.

    Args:
        refresh_seconds: Least time between two redraws; higher costs less, lower moves more smoothly.
        line_seconds: Least time between two printed lines where the output is no terminal.
    """

    def __init__(self, refresh_seconds: float = 0.2, line_seconds: float = 30.0) -> None:
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self.line_seconds = line_seconds
        self._enabled = True
        self._bar: tqdm[Any] | None = None
        self._timer = PhaseTimer()
        self._clear()

    def _clear(self, *, done: int = 0, total: float | None = None, unit: str = "batch") -> None:
        """Begin at ``done`` of ``total``."""
        self._start = time.monotonic()
        self._drawn_at: float | None = None
        self._begun_at, self._done, self._share = done, done, 0.0
        self._total = None if total is None or total in (float("inf"), -1) else total
        self._unit, self._phase, self._phase_width = unit, "", 0
        self._validating, self._validated = False, 0
        self._values: dict[str, Any] = {}

    def disable(self) -> None:
        """Show nothing (Lightning calls this in every process but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    @property
    def is_enabled(self) -> bool:
        """Whether anything is shown; a module's ``print`` then goes through :meth:`print`."""
        return self._enabled

    def phase(self, name: str, done: int, total: int) -> None:
        """Report work within one batch; may be called many times a second.

        Args:
            name: What is going on, in one word: "rollout", "score", "update".
            done: Parts done.
            total: Parts there are.
        """
        if self._validating:  # not a part of the iteration, whose time is being shared out
            self._phase = f"val {name} {_percent(done, total)}"
        else:
            self._share = self._timer.advance(name, done, total, now=time.monotonic())
            self._phase = f"{name} {_percent(done, total)}"
        self._draw_if_due()

    def text(self, columns: int | None = None) -> tuple[str, str]:
        """Return what stands left and right of the bar.

        Args:
            columns: Width of the line; what is least telling is left out where it is too narrow. ``None`` has no end.
        """
        elapsed = time.monotonic() - self._start
        left = seconds_left(done=self._done + self._share, begun_at=self._begun_at, total=self._total, elapsed=elapsed)
        count = f"{self._unit} {self._done}" + (f"/{self._total:.0f}" if self._total else "")
        self._phase_width = max(self._phase_width, len(self._phase))
        head = f"{count}  {self._phase:<{self._phase_width}} " if self._phase_width else f"{count} "
        values, end = describe_metrics(self._values), [clock(elapsed)]
        if self._total and self._done < self._total:
            values, end = [*values, *end], [f"{clock(left)} left"]
        width = len("  ".join([head, *values, *end]))
        while columns and values and width + (LEAST_BAR if len(values) > LEAST_VALUES else 0) > columns:
            width -= len(values.pop()) + 2
        return head, "  ".join([*values, *end])

    def _draw_if_due(self) -> None:
        """Draw, unless that was done a moment ago."""
        pause = self.refresh_seconds if self._bar is not None else self.line_seconds
        if time.monotonic() - (self._start if self._drawn_at is None else self._drawn_at) >= pause:
            self._draw()

    def _draw(self) -> None:
        """Redraw the line, or print one."""
        if not self._enabled:
            return
        self._drawn_at = time.monotonic()
        columns = None if self._bar is None else line_width()
        left, right = self.text(columns)
        if self._bar is None or columns is None:
            left = " ".join(left.split())
            share = f"({(self._done + self._share) / self._total:.0%})" if self._total else ""
            builtins.print("  ".join(filter(None, [left, share, right])), flush=True)
            return
        self._bar.n = min(self._done + self._share, self._total or float("inf"))
        self._bar.set_description_str(left, refresh=False)
        self._bar.unit = right
        has_room = self._total and len(left) + len(right) + LEAST_BAR <= columns
        self._bar.bar_format = "{desc}|{bar}|  {unit}" if has_room else "{desc} {unit}"
        self._bar.ncols = columns
        self._bar.refresh()

    def _open(self, *, done: int, total: float | None, unit: str) -> None:
        """Show a new line."""
        self._close()
        self._clear(done=done, total=total, unit=unit)
        if self._enabled and is_interactive():
            self._bar = tqdm(total=self._total, file=sys.stdout, bar_format="{desc}", desc=unit)
            self._draw()

    def _close(self) -> None:
        """Leave the line as it stands and go to the next."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _take_metrics(self, trainer: pl.Trainer) -> None:
        """Take the newest values; they become numbers, which waits for the device, only when a line is drawn."""
        self._values = {**trainer.callback_metrics, **trainer.progress_bar_metrics}

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print above the line."""
        if self._bar is None:
            builtins.print(*args, sep=sep, **kwargs)
        else:
            self._bar.write(sep.join(map(str, args)), file=kwargs.get("file"), end=kwargs.get("end", "\n"))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the line of the run, where a resumed run stands."""
        total = min(
            (trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else float("inf"))
            * trainer.num_training_batches,
            (trainer.max_steps if trainer.max_steps >= 0 else float("inf")) * trainer.accumulate_grad_batches,
        )
        unit = "batch" if pl_module.automatic_optimization else "iteration"
        self._timer = PhaseTimer()
        self._open(done=trainer.fit_loop.epoch_loop.total_batch_idx + 1, total=total, unit=unit)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Count the iteration."""
        self._timer.finish(now=time.monotonic())
        self._done, self._share, self._phase = trainer.fit_loop.epoch_loop.total_batch_idx + 1, 0.0, ""
        self._take_metrics(trainer)
        if self._drawn_at is None:
            self._draw()
        self._draw_if_due()

    def on_train_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Leave the last values on the screen."""
        self._take_metrics(trainer)
        self._draw()
        self._close()

    def on_exception(self, *args: Any) -> None:
        """Leave the line as it stands, so that the error begins on its own."""
        self._close()

    def on_validation_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Begin a line for ``validate``; within ``fit`` the run's line shows it as a phase."""
        self._validating = trainer.state.fn != "validate"
        self._validated = 0
        if not self._validating:
            self._open(done=0, total=sum(trainer.num_val_batches), unit="validating: batch")

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Count the batch."""
        if trainer.state.fn == "validate":
            self._count()
        elif not trainer.sanity_checking:
            self._validated += 1
            self._phase = f"val {_percent(self._validated, sum(trainer.num_val_batches))}"
            self._draw_if_due()

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """End the line of ``validate``, or the phase."""
        self._validating, self._phase = False, ""
        if trainer.state.fn == "validate":
            self._finish(trainer)
        elif not trainer.sanity_checking:
            self._take_metrics(trainer)

    def on_test_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Begin a line."""
        self._open(done=0, total=sum(trainer.num_test_batches), unit="testing: batch")

    def on_test_batch_end(self, *args: Any) -> None:
        """Count the batch."""
        self._count()

    def on_test_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """End the line."""
        self._finish(trainer)

    def on_predict_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Begin a line."""
        self._open(done=0, total=sum(trainer.num_predict_batches), unit="predicting: batch")

    def on_predict_batch_end(self, *args: Any) -> None:
        """Count the batch."""
        self._count()

    def on_predict_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """End the line."""
        self._finish(trainer)

    def _count(self) -> None:
        """Count a batch of an evaluation."""
        self._timer.finish(now=time.monotonic())
        self._done, self._share, self._phase = self._done + 1, 0.0, ""
        self._draw_if_due()

    def _finish(self, trainer: pl.Trainer) -> None:
        """Show the values of an evaluation and end its line."""
        self._take_metrics(trainer)
        self._draw()
        self._close()

"""Metrics and samples as lines of JSON, read with any tool, and never behind or beyond the run's checkpoint."""

import json
import math
import os
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from rlhf_lightning.checkpoint_files import sync_to_disk, unfinished


def to_json(value: Any) -> Any:
    """Turn a value into what strict JSON can hold.

    Numbers that are not finite become the strings "NaN", "Infinity" and "-Infinity", which ``float()`` of Python and
    ``Number()`` of JavaScript read back: JSON has no such numbers, and ``null`` would hide how a run diverged. Tensors
    become numbers or lists; what JSON does not know becomes its ``str``.

    Example:
        >>> to_json({"kl": float("inf"), "lengths": torch.tensor([3, 5])})
        {'kl': 'Infinity', 'lengths': [3, 5]}
    """
    if isinstance(value, torch.Tensor):
        return to_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


class JSONLines:
    """A file of one JSON object a line, only ever appended to; each line is handed to the system before the next.

    A line that a killed process left unfinished is cut off when the file is opened again.

    Args:
        path: The file; it and its folder are created at the first write.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._repaired = False

    def write(self, *rows: Mapping[str, Any]) -> None:
        """Append one line for each row, in one write."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._repaired:
            self.last_row()
        text = "".join(json.dumps(to_json(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)

    def cut(self, step: int) -> None:
        """Remove the lines of this step and later ones; the file is whole at every moment."""
        self.last_row()
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) < step]
        if len(kept) < len(lines):
            beside = unfinished(self.path)
            beside.write_bytes(b"".join(kept))
            sync_to_disk(beside)
            beside.replace(self.path)

    def last_row(self) -> dict[str, Any] | None:
        """Cut off an unfinished last line, and return the last whole one; ``None`` where there is none."""
        self._repaired = True
        if not self.path.exists():
            return None
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        lines = whole.splitlines()
        return json.loads(lines[-1]) if lines else None


def _step_of(line: bytes) -> int:
    """Return the step of a line; what holds none stays in the file."""
    try:
        return int(json.loads(line)["step"] or 0)
    except (ValueError, TypeError, KeyError):
        return -1


def cut_logs(run_dir: Path, step: int) -> None:
    """Remove what a run logged of a step and later ones, which it is about to do again."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        JSONLines(run_dir / name).cut(step)


def settle_logs(trainer: Trainer) -> None:
    """Wait until all that was logged is on the disk."""
    for own in trainer.loggers:
        own.save()
    for pattern in ("*.jsonl", "events.out.tfevents.*"):
        for path in Path(trainer.default_root_dir).glob(pattern):
            sync_to_disk(path)


def log_step_now(trainer: Trainer) -> None:
    """Log the present step from within ``on_train_batch_end``; Lightning would do so right behind it.

    A checkpoint that is written there would be ahead of the logs until then, and a kill in between would leave the step
    out of them. There is no public way to ask for it.
    """
    connector: Any = trainer._logger_connector
    connector.update_train_step_metrics()
    known = {name: float(value) for name, value in connector.metrics["log"].items()}

    def log_what_came_since() -> None:
        del connector.update_train_step_metrics  # what the class defines shows again
        logged = connector.metrics["log"]  # of a hook behind this one, the last step's stood there before
        if connector.should_update_logs:
            connector.log_metrics({name: logged[name] for name in logged if logged[name] != known.get(name)})

    connector.update_train_step_metrics = log_what_came_since


class JSONLLogger(Logger):
    """Appends every logged value to ``metrics.jsonl``, beside the TensorBoard events of the same run.

    A line is ``{"step": 12, "time": 34.5, "train/loss": 0.69, ...}``: ``step`` is the number of batches (for PPO:
    iterations) before this one, TensorBoard's x axis; ``time`` is the seconds that the run has taken, counted on when a
    run is resumed. Values that are not finite are strings (see :func:`to_json`). Only the first process writes. A
    run that is resumed under :class:`~rlhf_lightning.checkpointing.RunCheckpoint` cuts the steps after its checkpoint;
    under another they stand twice, and :func:`read_metrics` keeps the later ones.

    Args:
        save_dir: The run's folder.
        filename: Name of the file in it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     JSONLLogger(folder).log_metrics({"train/loss": 0.5}, step=0)
        ...     rows = read_metrics(Path(folder) / "metrics.jsonl")
        >>> rows[0]["step"], rows[0]["train/loss"]
        (0, 0.5)
    """

    def __init__(self, save_dir: str | os.PathLike[str], filename: str = "metrics.jsonl") -> None:
        super().__init__()
        self._save_dir = Path(save_dir)
        self._lines = JSONLines(self._save_dir / filename)
        self._start: float | None = None

    @property
    def name(self) -> str:
        """Empty: the run's folder is the run's name."""
        return ""

    @property
    def version(self) -> str:
        """Empty: a resumed run goes on in the same file."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self._save_dir)

    @property
    def path(self) -> Path:
        """The file that is written."""
        return self._lines.path

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one line with the step, the time and every value."""
        if self._start is None:
            last = self._lines.last_row() or {}
            self._start = time.monotonic() - float(last.get("time", 0.0))
        self._lines.write({"step": step, "time": round(time.monotonic() - self._start, 3), **metrics})

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Write nothing: the run's ``config.yaml`` holds all of them."""


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl`` back: one row for each step, ascending, with every value logged at that step.

    Where the run was resumed from an earlier step, the rows that it repeated are those of the later launch, and rows of
    the abandoned steps after it are left out. "NaN", "Infinity" and "-Infinity" become numbers again; an unfinished
    last line is left out.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    rows: dict[int, dict[str, Any]] = {}
    newest = -1
    for line in Path(path).read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        row = {key: _from_json(value) for key, value in json.loads(line).items()}
        step = newest if row["step"] is None else row["step"]
        if step < newest:
            rows = {earlier: values for earlier, values in rows.items() if earlier < step}
        newest = step
        rows[step] = {**rows.get(step, {}), **row}
    return [rows[step] for step in sorted(rows)]


def _from_json(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value

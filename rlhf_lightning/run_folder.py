"""One run, one folder: its config, its checkpoints, its curves, its samples and the model it ends with."""

import contextlib
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelSummary
from lightning.pytorch.cli import SaveConfigCallback

from rlhf_lightning.callbacks.predictions import next_free
from rlhf_lightning.checkpointing import RunCheckpoint
from rlhf_lightning.earlier import set_aside
from rlhf_lightning.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

CONFIG = "config.yaml"
#: What a start writes by itself, before any work is done.
_START_FILES = ("events.out.tfevents.*", "config*.yaml", "hparams.yaml", "metrics.jsonl", "samples.jsonl")
_SHARED_CHOICE = "RLHF_LIGHTNING_RUN_DIR"


def claim_run_dir(run_dir: str | Path | None, name: str, *, root: str | Path = "runs") -> Path:
    """Make and return the folder of a run.

    Args:
        run_dir: What the user asked for. Where this is ``None``, the first free one of ``runs/<name>-1``,
            ``runs/<name>-2``, ... is taken.
        name: Kind of the run, such as ``"ppo"``.
        root: Folder for the runs that were not named.

    Raises:
        UserError: If the folder cannot be made, or several processes were started from outside, which would each choose
            a folder of its own.
    """
    if run_dir is not None:
        chosen = Path(run_dir)
        try:
            chosen.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise UserError(f"run_dir '{chosen}' cannot be made a folder: {fault.strerror}.") from fault
        return chosen
    if int(os.environ.get("LOCAL_RANK", "0")) > 0 and _SHARED_CHOICE in os.environ:
        return Path(os.environ[_SHARED_CHOICE])  # The process that started this one has chosen for all.
    if _SHARED_CHOICE not in os.environ and started_as_one_of_many():
        raise UserError("this process is one of several (torchrun, srun): name their common folder with --run_dir DIR.")
    for number in itertools.count(1):
        chosen = Path(root, f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            chosen.mkdir(parents=True, exist_ok=False)
            break
    os.environ[_SHARED_CHOICE] = str(chosen)
    return chosen


class StartedRun:
    """What there was before a run, so that a start which fails before any work is done leaves no trace.

    Args:
        place: The run's folder, or the folder that it will lie in; it may not exist yet.
    """

    def __init__(self, place: Path) -> None:
        self._missing = [path for path in (place, *place.parents) if not path.exists()]
        self._place = self._run_dir = place
        self._before: dict[Path, int] = {}

    def enter(self, run_dir: Path) -> None:
        """Take note of what the run folder holds, before the run writes into it."""
        self._run_dir = run_dir
        self._before = self._files()

    def take_back(self) -> None:
        """Remove what the start has written, unless something of value was: logged numbers, samples, a checkpoint."""
        now = self._files()
        grown = [path for path, size in now.items() if size > self._before.get(path, 0)]
        if any(path.suffix == ".ckpt" or path.suffix == ".jsonl" for path in grown):
            return
        for path in now.keys() - self._before.keys():
            if any(path.match(pattern) for pattern in _START_FILES):
                path.unlink()
        own = [] if self._run_dir == self._place else [self._run_dir]
        for path in own + self._missing:
            with contextlib.suppress(OSError):
                path.rmdir()  # Only a folder that has stayed empty goes.

    def _files(self) -> dict[Path, int]:
        files = [*self._run_dir.glob("*"), *self._run_dir.glob("checkpoints/*")]
        return {path: path.stat().st_size for path in files if path.is_file()}


def started_as_one_of_many() -> bool:
    """Return whether torchrun, srun or Lightning started this process as one of several that work together."""
    return any(int(os.environ.get(name) or 1) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS"))


def set_aside_logs(run_dir: Path) -> None:
    """Move the logs of a run that left no checkpoint into ``earlier-<n>``, apart from those of a fresh start."""
    set_aside(run_dir, [run_dir / "metrics.jsonl", run_dir / "samples.jsonl", *run_dir.glob("events.out.tfevents.*")])


def run_loggers(run_dir: Path, next_step: int | None = None) -> "list[Logger]":
    """Return the loggers of a run: TensorBoard events and ``metrics.jsonl``, both directly in its folder.

    Args:
        run_dir: The folder.
        next_step: First step that a run which is taken up will log: TensorBoard shows nothing older from there on.
    """
    from lightning.pytorch.loggers import TensorBoardLogger

    from rlhf_lightning.loggers import JSONLLogger

    events = TensorBoardLogger(save_dir=run_dir, name="", version="", default_hp_metric=False, purge_step=next_step)
    return [events, JSONLLogger(run_dir)]


def run_callbacks(command: str, settings: dict[str, Any]) -> list[Callback]:
    """Return the callbacks of a run that its user has not named himself.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``; only ``fit`` keeps checkpoints and writes a model, only
            ``predict`` writes predictions.
        settings: The arguments of the Trainer as the user gave them; what he switched off stays off.
    """
    from rlhf_lightning import callbacks

    named = as_list(settings.get("callbacks"))
    wanted: list[type[Callback]] = [callbacks.UnfinishedWarning]
    if settings.get("enable_model_summary") is not False and not any(isinstance(c, ModelSummary) for c in named):
        wanted.append(callbacks.ModelLine)
    if settings.get("enable_progress_bar") is not False:
        wanted.append(callbacks.PhaseProgressBar)
    if not settings.get("fast_dev_run"):
        wanted += [callbacks.SampleTable, callbacks.ChartLayout] + ([callbacks.ExportModel] if command == "fit" else [])
        wanted += [callbacks.PredictionFile] if command == "predict" else []
    chosen = [cls() for cls in wanted if not any(isinstance(callback, cls) for callback in named)]
    keeps_last = any(isinstance(c, RunCheckpoint) or getattr(c, "save_last", None) for c in named)
    if command == "fit" and settings.get("enable_checkpointing") is not False and not keeps_last:
        chosen.append(RunCheckpoint())
    return chosen


def as_list(value: Any) -> list[Any]:
    """Return what the Trainer takes as one object, as several or as ``None``, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


class SaveRunConfig(SaveConfigCallback):
    """Write the whole resolved config into the run folder as ``config.yaml``.

    A config that is there already and says something else is kept as ``config.1.yaml``, ``config.2.yaml``, ...
    ``validate``, ``test`` and ``predict`` write ``config.<command>.yaml``, so that the config of the training stays.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file; called once, on the first rank."""
        command = str(trainer.state.fn.value) if trainer.state.fn else stage
        name = CONFIG if command == "fit" else f"config.{command}.yaml"
        path = Path(trainer.default_root_dir) / name
        text = self.parser.dump(self.config, skip_none=False)
        if path.exists():
            if path.read_text(encoding="utf-8") == text:
                return
            path.rename(next_free(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

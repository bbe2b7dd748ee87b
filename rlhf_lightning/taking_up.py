"""The checkpoint that a run is taken up from: where it is, and whether the run can go on from it."""

import contextlib
import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.export import CHECKPOINT_KEY, check_is_checkpoint

logger = logging.getLogger("rlhf_lightning")

LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")
_SHARDED = (".metadata", "latest")  # what marks a folder as a checkpoint in parts: torch.distributed's, DeepSpeed's


def resolve_checkpoint(ckpt_path: str | None, run_dir: str | Path | None) -> str | None:
    """Return the checkpoint to start from, as a path that exists; ``None`` starts from the beginning.

    Args:
        ckpt_path: A file, ``"auto"`` (the run folder's last checkpoint where there is one, else the beginning), or
            ``"last"`` (the run folder's last checkpoint, which must exist). ``None`` is the beginning.
        run_dir: The run folder as far as it is known.

    Raises:
        UserError: If the checkpoint does not exist or is none, or ``"auto"`` and ``"last"`` come without a run folder.
    """
    if ckpt_path is None or ckpt_path in ("best", "hpc", "registry") or ckpt_path.startswith("registry:"):
        return ckpt_path
    if ckpt_path in ("auto", "last"):
        if run_dir is None:
            raise UserError(f"--ckpt_path {ckpt_path} looks into the run folder: name it with --run_dir DIR.")
        last = Path(run_dir) / LAST_CHECKPOINT
        if not last.exists() and ckpt_path == "last":
            raise UserError(
                f"{last} does not exist, so there is nothing to take up; --ckpt_path auto would start anew."
            )
        if not last.exists():
            logger.warning("no checkpoint in %s: this run starts from the beginning", run_dir)
        return str(last) if last.exists() else None
    path = Path(ckpt_path)
    if any((path / name).exists() for name in _SHARDED):
        return str(path)
    check_is_checkpoint(path)
    _refuse_foreign(path)
    return str(path)


def _refuse_foreign(path: Path) -> None:
    """Refuse a file of torch that no Trainer has written; one that holds objects is left to ``--weights_only``."""
    with contextlib.suppress(pickle.UnpicklingError):
        if "pytorch-lightning_version" not in torch.load(path, map_location="meta", weights_only=True, mmap=True):
            raise UserError(f"'{path}' was not written by a Trainer; give a .ckpt file of a run's checkpoints/ folder.")


def refuse_second_run(run_dir: str | Path | None, ckpt_path: str | None) -> None:
    """Keep a fresh ``fit`` from writing over the checkpoints of an earlier one.

    Raises:
        UserError: If the folder holds a last checkpoint and this run does not start from any checkpoint.
    """
    if run_dir is not None and ckpt_path is None and (Path(run_dir) / LAST_CHECKPOINT).exists():
        raise UserError(
            f"{run_dir} already holds a run. Take it up with --ckpt_path auto, or name another folder by --run_dir DIR."
        )


def refuse_other_module(checkpoint: str | None, class_path: str) -> None:
    """Refuse to take up a run of another of this package's modules; a class of the user's own is for him to judge.

    Raises:
        UserError: If the checkpoint was written by a module of this package, and ``class_path`` names another one.
    """
    import rlhf_lightning

    state = None if checkpoint is None else _checkpoint_state(Path(checkpoint))
    writer = (state or {}).get(CHECKPOINT_KEY, {}).get("module")
    taker = class_path.rpartition(".")[2]
    if writer != taker and {writer, taker} <= set(rlhf_lightning.__all__):
        raise UserError(
            f"'{checkpoint}' was written by {writer}, and this run trains {taker}; give a checkpoint of a {taker}, or "
            "start a new run from the model folder that 'rlhf-lightning export' makes of it."
        )


def refuse_fewer_steps(checkpoint: str | None, max_steps: int) -> None:
    """Refuse to take up a run that has already gone further than it is now told to go.

    Raises:
        UserError: If the checkpoint was written after more steps than ``max_steps``, which is -1 where there is no such
            limit.
    """
    done = None if checkpoint is None or max_steps < 0 else step_of(Path(checkpoint))
    if done is not None and done > max_steps:
        raise UserError(
            f"'{checkpoint}' was written after {done} steps, more than trainer.max_steps {max_steps}; set more "
            "to go on from it."
        )


def refuse_cut_epoch(checkpoint: str | None, max_steps: int) -> None:
    """Refuse to go on by epochs where a limit of steps has ended a run within one, which counts as done.

    Raises:
        UserError: If the rest of that epoch would be left out without a word.
    """
    state = None if checkpoint is None or max_steps >= 0 else _checkpoint_state(Path(checkpoint))
    loop = {} if state is None else state.get("loops", {}).get("fit_loop", {})
    epochs = loop.get("epoch_progress", {}).get("current", {})
    last = loop.get("epoch_loop.batch_progress", {}).get("is_last_batch", True)
    if epochs and epochs["processed"] == epochs["started"] and not last:
        raise UserError(
            f"'{checkpoint}' was written where max_steps ended a run within an epoch, which counts as a whole one now; "
            "go on by a larger trainer.max_steps, not by trainer.max_epochs."
        )


def step_of(checkpoint: Path) -> int | None:
    """Return the step a checkpoint was written after; ``None`` for one that is in parts or holds objects."""
    state = _checkpoint_state(checkpoint)
    return None if state is None else int(state.get("global_step", 0))


def _checkpoint_state(checkpoint: Path) -> dict[str, Any] | None:
    """Return what a checkpoint holds, weights without their numbers; ``None`` as of :func:`step_of`."""
    with contextlib.suppress(pickle.UnpicklingError):
        if checkpoint.is_file():
            return dict(torch.load(checkpoint, map_location="meta", weights_only=True, mmap=True))
    return None


def run_of_checkpoint(checkpoint: str | None) -> Path | None:
    """Return the run folder that a checkpoint lies in; ``None`` for one that lies elsewhere.

    Example:
        >>> run_of_checkpoint("runs/ppo-1/checkpoints/last.ckpt"), run_of_checkpoint("last.ckpt")
        (PosixPath('runs/ppo-1'), None)
    """
    folder = Path(checkpoint).parent if checkpoint else Path()
    return folder.parent if folder.name == LAST_CHECKPOINT.parent.name else None

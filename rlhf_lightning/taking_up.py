"""The checkpoint that a run is taken up from: where it is, and whether the run can go on from it."""

import logging
from pathlib import Path
from typing import Any

from rlhf_lightning.checkpoint_files import (
    BEST,
    CHECKPOINT_KEY,
    CHECKPOINTS,
    LAST,
    RUN_KEY,
    DamagedCheckpointError,
    check_file,
    kept_checkpoints,
    read_head,
)
from rlhf_lightning.errors import UserError

logger = logging.getLogger("rlhf_lightning")

LAST_CHECKPOINT = Path(CHECKPOINTS, LAST)
_SHARDED = (".metadata", "latest")  # what marks a folder as a checkpoint in parts: torch.distributed's, DeepSpeed's


def resolve_checkpoint(ckpt_path: str | None, run_dir: str | Path | None) -> str | None:
    """Return the checkpoint to start from, as the path of a whole one; ``None`` starts from the beginning.

    Args:
        ckpt_path: A file, ``"auto"`` (the run folder's newest checkpoint that is not damaged where there is any, else
            the beginning), ``"last"`` (the run folder's last checkpoint, which must exist and be whole), or ``"best"``
            (its best by the monitored metric, likewise). ``None`` is the beginning.
        run_dir: The run folder as far as it is known.

    Raises:
        UserError: If the checkpoint does not exist, is damaged or none, or was written by a newer version; or one is
            looked for in a run folder that is not named.
    """
    if ckpt_path is None or ckpt_path in ("hpc", "registry") or ckpt_path.startswith("registry:"):
        return ckpt_path
    if ckpt_path in ("auto", "last", "best"):
        if run_dir is None:
            raise UserError(f"--ckpt_path {ckpt_path} looks into the run folder: name it with --run_dir DIR.")
        folder = Path(run_dir, CHECKPOINTS)
        return _newest(folder) if ckpt_path == "auto" else _named(folder / {"last": LAST, "best": BEST}[ckpt_path])
    return _checked(Path(ckpt_path))


def _newest(folder: Path) -> str | None:
    """Return the newest whole checkpoint; one that is damaged is told of."""
    kept = kept_checkpoints(folder)
    for path in kept:
        try:
            return _checked(path)
        except DamagedCheckpointError as damage:
            logger.warning("%s", damage)
    if kept:
        raise UserError(
            f"every checkpoint in '{folder}' is damaged; name another by --ckpt_path FILE, or start anew in another "
            "folder by --run_dir DIR."
        )
    logger.warning("no checkpoint in %s: this run starts from the beginning", folder.parent)
    return None


def _named(path: Path) -> str:
    if not path.exists():
        advice = (
            "--ckpt_path auto would start anew"
            if path.name == LAST
            else "RunCheckpoint keeps one where monitor names a metric"
        )
        raise UserError(f"{path} does not exist, so there is nothing to take up; {advice}.")
    return _checked(path)


def _checked(path: Path) -> str:
    if any((path / name).exists() for name in _SHARDED):
        return str(path)
    check_file(path)
    head = read_head(path)
    if head and "pytorch-lightning_version" not in head:  # one that holds objects is left to --weights_only
        raise UserError(f"'{path}' was not written by a Trainer; give a .ckpt file of a run's checkpoints/ folder.")
    return str(path)


def default_checkpoint(run_dir: str | Path | None) -> str | None:
    """Return what a ``fit`` starts from that names no checkpoint: ``auto`` in the folder of an earlier run.

    The same command given again goes on where it was cut, and never writes over what is there.

    Args:
        run_dir: The run folder as far as it is known.
    """
    if run_dir is None or not kept_checkpoints(Path(run_dir, CHECKPOINTS)):
        return None
    logger.info("%s holds a run, which is taken up; for a new one name another folder by --run_dir", run_dir)
    return "auto"


def refuse_to_take_up(checkpoint: str, head: dict[str, Any], class_path: str, max_steps: int) -> None:
    """Refuse a checkpoint that this run cannot go on from.

    Args:
        checkpoint: Its path, to be named.
        head: What it holds, as :func:`~rlhf_lightning.checkpoint_files.read_head` tells.
        class_path: The module that is to be trained.
        max_steps: Steps to train; -1 where epochs are counted.

    Raises:
        UserError: If another module has written it, it has gone further than it may, or the rest of an epoch would be
            left out.
    """
    _refuse_other_module(checkpoint, head, class_path)
    _refuse_fewer_steps(checkpoint, head, max_steps)
    _refuse_cut_epoch(checkpoint, head, max_steps)


def _refuse_other_module(checkpoint: str, head: dict[str, Any], class_path: str) -> None:
    """Refuse a run of another of this package's modules; a class of the user's own is for him to judge."""
    import rlhf_lightning

    writer = head.get(CHECKPOINT_KEY, {}).get("module")
    taker = class_path.rpartition(".")[2]
    if writer != taker and {writer, taker} <= set(rlhf_lightning.__all__):
        raise UserError(
            f"'{checkpoint}' was written by {writer}, and this run trains {taker}; give a checkpoint of a {taker}, or "
            "start a new run from the model folder that 'rlhf-lightning export' makes of it."
        )


def _refuse_fewer_steps(checkpoint: str, head: dict[str, Any], max_steps: int) -> None:
    done = int(head.get("global_step", 0))
    if 0 <= max_steps < done:
        raise UserError(
            f"'{checkpoint}' was written after {done} steps, more than trainer.max_steps {max_steps}; set more "
            "to go on from it."
        )


def _refuse_cut_epoch(checkpoint: str, head: dict[str, Any], max_steps: int) -> None:
    """Refuse to go on by epochs where a limit of steps has ended a run within one, which counts as done."""
    loop = {} if max_steps >= 0 else head.get("loops", {}).get("fit_loop", {})
    epochs = loop.get("epoch_progress", {}).get("current", {})
    last = loop.get("epoch_loop.batch_progress", {}).get("is_last_batch", True)
    if epochs and epochs["processed"] == epochs["started"] and not last:
        raise UserError(
            f"'{checkpoint}' was written where max_steps ended a run within an epoch, which counts as a whole one now; "
            "go on by a larger trainer.max_steps, not by trainer.max_epochs."
        )


def step_of(checkpoint: Path) -> int | None:
    """Return the step a checkpoint was written after; ``None`` for one that is in parts or holds objects."""
    head = read_head(checkpoint)
    return int(head.get("global_step", 0)) if head else None


def next_logged_step(head: dict[str, Any]) -> int | None:
    """Return the first step that was not yet logged when a checkpoint was written; ``None`` where it does not tell."""
    step = head.get(RUN_KEY, {}).get("next_step")
    return None if step is None else int(step)


def run_of_checkpoint(checkpoint: str | None) -> Path | None:
    """Return the run folder that a checkpoint lies in; ``None`` for one that lies elsewhere.

    Example:
        >>> run_of_checkpoint("runs/ppo-1/checkpoints/last.ckpt"), run_of_checkpoint("last.ckpt")
        (PosixPath('runs/ppo-1'), None)
    """
    folder = Path(checkpoint).parent if checkpoint else Path()
    return folder.parent if folder.name == CHECKPOINTS else None

"""Checkpoint files: written whole or not at all, told from damaged ones, and kept by their step."""

import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from rlhf_lightning.errors import UserError, did_you_mean

#: Where a checkpoint holds what this package adds to Lightning's own.
CHECKPOINT_KEY = "rlhf_lightning"
#: What tells how to read that; to be raised when an earlier release could not.
CHECKPOINT_FORMAT = 1
#: Where a checkpoint holds what belongs to the run and not to its module: the next step to be logged, and the best.
RUN_KEY = "rlhf_lightning_run"

#: Where they lie in a run's folder.
CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
BEST = "best.ckpt"
_EARLIER = re.compile(r"step-(\d+)\.ckpt")


class DamagedCheckpointError(UserError):
    """A checkpoint that is not what was written; one before it may be whole."""


def sync_to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint straight into a file and wait until it is on the disk.

    Raises:
        OSError: If the file cannot be written, such as where the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as failure:
        if isinstance(failure.__context__, OSError):  # torch's writer closes its archive, which fails once more
            raise failure.__context__ from None
        raise
    sync_to_disk(path)


def check_file(path: Path) -> None:
    """Refuse what is no whole checkpoint file.

    The checksums are those that ``torch.save`` writes for each part of its archive, and that ``torch.load`` ignores.
    Within the file they cannot come apart from it; to compare 500 MB takes 0.2 s.

    Raises:
        DamagedCheckpointError: If what it holds is not what was written.
        UserError: If it is missing, a folder, or a file of another kind.
    """
    if path.is_dir():
        inside = [*sorted(path.glob("*.ckpt")), *sorted(path.glob("checkpoints/*.ckpt"))]
        advice = f"'{inside[0]}'" if inside else "a .ckpt file of a run's checkpoints/ folder"
        raise UserError(f"checkpoint '{path}' is a folder; give {advice}.")
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        advice = did_you_mean(path.name, siblings) or " Give a .ckpt file of a run's checkpoints/ folder."
        raise UserError(f"checkpoint '{path}' does not exist.{advice}")
    try:
        if not zipfile.is_zipfile(path):
            part: str | None = ""
        else:
            with zipfile.ZipFile(path) as archive:
                part = archive.testzip()
    except PermissionError as refusal:
        raise UserError(f"checkpoint '{path}' cannot be read: {refusal.strerror}.") from refusal
    except Exception as fault:  # of what kind depends on the place that is damaged
        raise DamagedCheckpointError(f"checkpoint '{path}' is damaged ({fault}){_another(path)}.") from fault
    if part == "":
        raise DamagedCheckpointError(
            f"'{path}' is not a checkpoint, or a damaged one; give a .ckpt file that a run has written."
        )
    if part is not None:
        raise DamagedCheckpointError(
            f"checkpoint '{path}' is damaged: {part} does not match its checksum{_another(path)}."
        )


def _another(path: Path) -> str:
    others = [other for other in kept_checkpoints(path.parent) if other != path]
    return f"; an earlier one of this run is '{others[0]}'" if others else ""


def read_head(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds, weights without their numbers; nothing of one in parts or with objects in it.

    Raises:
        DamagedCheckpointError: If torch cannot read it.
        UserError: If it holds no entries, or was written by a newer version of this package.
    """
    head: Any = {}
    try:
        if path.is_file():
            head = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        return {}
    except Exception as fault:  # torch raises errors of its archive and of Python alike
        reason = next(iter(str(fault).splitlines()), type(fault).__name__)
        raise DamagedCheckpointError(f"checkpoint '{path}' cannot be read ({reason[:120]}){_another(path)}.") from fault
    if not isinstance(head, dict):
        raise UserError(f"'{path}' was not written by a Trainer; give a .ckpt file of a run's checkpoints/ folder.")
    refuse_newer_format(head, path)
    return head


def refuse_newer_format(state: dict[str, Any], path: Path | None = None) -> None:
    """Refuse a checkpoint that only a newer version of this package knows how to read.

    Raises:
        UserError: If it is one.
    """
    own = state.get(CHECKPOINT_KEY)
    found = own.get("format") if isinstance(own, dict) else None
    if isinstance(found, int) and found > CHECKPOINT_FORMAT:
        which = "the checkpoint" if path is None else f"checkpoint '{path}'"
        raise UserError(
            f"{which} was written by a newer rlhf_lightning (format {found}, this version reads up to "
            f"{CHECKPOINT_FORMAT}); update the package."
        )


def kept_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run that one may go on from, the newest first.

    Args:
        folder: The run's ``checkpoints``; it may not exist.
    """
    last = folder / LAST
    earlier = sorted(folder.glob("step-*.ckpt"), key=_step_in_name, reverse=True)
    return ([last] if last.exists() else []) + [path for path in earlier if _step_in_name(path) >= 0]


def put_in_place(written: Path, folder: Path, *, step: int, before: int | None, keep: int, is_best: bool) -> None:
    """Make a checkpoint that is complete the newest of its folder, without a moment in which there is none.

    The one before it, which was ``last.ckpt``, has the name of its step before the new one takes its place. What is
    killed in between has two names or an old best one at worst; going on from there comes to the same files.

    Args:
        written: The checkpoint, on the disk, beside its final name.
        folder: The run's ``checkpoints``.
        step: Its step. Kept ones of this step or later belong to a course that the run has left, and go.
        before: Step of the present ``last.ckpt``; ``None`` where it is not worth keeping.
        keep: How many to keep, this one included.
        is_best: Whether it becomes ``best.ckpt`` too.
    """
    last = folder / LAST
    if is_best:
        _name_also(written, folder / BEST)
    if before is not None and before < step and keep > 1 and last.exists():
        if last.is_dir():  # in parts
            last.replace(folder / f"step-{before}.ckpt")
        else:
            _name_also(last, folder / f"step-{before}.ckpt")
    if last.is_dir():
        shutil.rmtree(last)
    written.replace(last)
    sync_to_disk(folder)
    earlier = [path for path in kept_checkpoints(folder) if path != last]
    left = [path for path in earlier if _step_in_name(path) >= step]
    for path in left + [path for path in earlier if path not in left][keep - 1 :]:
        remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint, a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def unfinished(path: Path) -> Path:
    """Return where a file is written before it gets its name."""
    return path.with_name(f".{path.name}.unfinished")


def _name_also(source: Path, target: Path) -> None:
    """Give a checkpoint another name, in place of what has it; where the disk knows no two names, by a copy."""
    beside = unfinished(target)
    remove(beside)
    if source.is_dir():
        shutil.copytree(source, beside)
        remove(target)
    else:
        try:
            os.link(source, beside)
        except OSError:
            shutil.copyfile(source, beside)
            sync_to_disk(beside)
    beside.replace(target)
    beside.unlink(missing_ok=True)  # where both names were of one file, nothing was done


def _step_in_name(path: Path) -> int:
    match = _EARLIER.fullmatch(path.name)
    return int(match[1]) if match else -1

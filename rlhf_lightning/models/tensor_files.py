"""The files of the caches: folders of small safetensors files, each of them whole at every moment."""

import os
from pathlib import Path

from torch import Tensor

from rlhf_lightning.errors import UserError


def make_folder(folder: Path, *, setting: str) -> None:
    """Make a folder and those above it, where they are not there yet.

    Args:
        folder: What to make.
        setting: The user's setting that names it, for the message.

    Raises:
        UserError: If that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise UserError(f"{setting} '{folder.parent}' cannot be made a folder: {fault.strerror}.") from fault


def write_tensors(path: Path, tensors: dict[str, Tensor], *, setting: str) -> None:
    """Write a file beside its place and then put it there, so that a kill leaves none half written.

    Args:
        path: The file, in a folder that exists.
        tensors: What it is to hold.
        setting: The user's setting that names the folder, for the message.

    Raises:
        UserError: If it cannot be written.
    """
    from safetensors.torch import save

    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        unfinished.write_bytes(save(tensors))
        unfinished.replace(path)
    except OSError as fault:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{setting}: '{path}' cannot be written: {fault.strerror}.") from fault


def read_tensors(path: Path, *, setting: str) -> dict[str, Tensor]:
    """Read what :func:`write_tensors` wrote.

    Raises:
        FileNotFoundError: If it is not there.
        UserError: If it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as fault:
        raise damaged(path, str(fault), setting=setting) from fault


def damaged(path: Path, reason: str, *, setting: str) -> UserError:
    """Return the error that says so of a file."""
    return UserError(f"{setting}: '{path}' is damaged ({reason}); delete it.")

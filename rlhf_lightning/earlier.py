"""What an earlier start left in a folder is kept, apart from what comes now."""

from collections.abc import Iterable
from pathlib import Path


def set_aside(folder: Path, files: Iterable[Path]) -> Path | None:
    """Move files of a folder into its first free one of ``earlier-1``, ``earlier-2``, ...

    Args:
        folder: Where the new folder is made.
        files: What to move; those that do not exist are passed over.

    Returns:
        The new folder, or ``None`` where there was nothing to move.
    """
    found = [path for path in files if path.exists()]
    if not found:
        return None
    number = 1
    while (aside := folder / f"earlier-{number}").exists():
        number += 1
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    return aside

"""How the files of a card are written: without what is nobody's business, and what no reader could show."""

import re
from pathlib import Path

from rlhf_lightning.evaluation.formatting import without_homes

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # all but the line feed


def write_text(path: Path, text: str) -> None:
    """Write a text without control characters, which XML forbids, and without the path of the home folder."""
    path.write_text(_CONTROL.sub("", without_homes(text)), encoding="utf-8", newline="\n")

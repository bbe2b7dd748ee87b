"""Numbers as a reader wants them: three figures, shares in percent, intervals in brackets; and the table as text."""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rlhf_lightning.evaluation.statistics import Interval

Kind = Literal["number", "share", "difference"]


class TableRow(NamedTuple):
    """One measure for every model.

    Attributes:
        label: What is measured.
        note: Unit or what it is measured against.
        kind: How numbers are written: "share" in percent, "difference" with its sign.
        cells: One for each model; ``None`` where it does not apply.
    """

    label: str
    note: str
    kind: Kind
    cells: list[Interval | float | None]


def without_home(path: str) -> str:
    """Write a path so that it does not tell whose home folder it lies in.

    Example:
        >>> without_home(str(Path.home() / "models" / "ppo")), without_home("runs/ppo/model")
        ('~/models/ppo', 'runs/ppo/model')
    """
    home = str(Path.home())
    return "~" + path.removeprefix(home) if path == home or path.startswith(f"{home}{os.sep}") else path


def fitting(label: str, room: float, *, letter: float = 6.6) -> str:
    """Shorten a label, in its middle, to what fits.

    Args:
        label: A name.
        room: Pixels there are.
        letter: Pixels of a letter.

    Example:
        >>> fitting("rollout/score", 100), fitting("a long name / step-4000.ckpt", 100)
        ('rollout/score', 'a long …00.ckpt')
    """
    letters = max(3, int(room / letter))
    half = (letters - 1) // 2
    return label if len(label) <= letters else f"{label[: letters - 1 - half]}…{label[-half:]}"


def without_homes(text: str) -> str:
    """Write ``~`` for the home folder, wherever in a text it stands.

    Example:
        >>> without_homes(f"from {Path.home() / 'models'}")
        'from ~/models'
    """
    home = str(Path.home())
    return re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text) if len(home) > 1 else text


def text_table(rows: Sequence[TableRow], names: Sequence[str]) -> str:
    """Return the table as text of fixed width.

    Example:
        >>> print(text_table([TableRow("Score", "mean", "number", [Interval(1.0, 0.5, 1.5), 2.0])], ["base", "ppo"]))
                                     base     ppo
        Score (mean)    1.00 [0.50, 1.50]    2.00
    """
    cells = [[f"{row.label} ({row.note})", *(written(cell, row.kind) for cell in row.cells)] for row in rows]
    lines = [["", *names], *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names) + 1)]
    texts = []
    for line in lines:
        parts = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        texts.append("    ".join(parts).rstrip())
    return "\n".join(texts)


def written(value: Interval | float | None, kind: Kind) -> str:
    """Return a cell as text, with its interval in brackets.

    Example:
        >>> written(Interval(0.5, 0.25, 0.75), "share"), written(-1.5, "difference"), written(None, "number")
        ('50.0 % [25.0, 75.0]', '-1.50', '–')
    """
    if value is None:
        return "–"
    if not isinstance(value, Interval):
        return f"{_percent(value)} %" if kind == "share" else plain(value, signed=kind == "difference")
    mean = written(value.mean, kind)
    low, high = ends(value, kind)
    return f"{mean} [{low}, {high}]"


def ends(value: Interval, kind: Kind) -> tuple[str, str]:
    """Return the ends of an interval as text, without a unit."""
    if kind == "share":
        return _percent(value.low), _percent(value.high)
    signed = kind == "difference"
    digits = _digits(value.mean)
    return plain(value.low, signed=signed, digits=digits), plain(value.high, signed=signed, digits=digits)


def plain(value: float, *, signed: bool = False, digits: int | None = None) -> str:
    """Return a number with about three figures.

    Args:
        value: The number.
        signed: True writes the sign of a positive number too.
        digits: Places after the point; ``None`` takes what its size asks for.

    Example:
        >>> plain(123.4), plain(12.34), plain(1.234), plain(0.01234), plain(1.5, signed=True)
        ('123', '12.3', '1.23', '0.012', '+1.50')
    """
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    places = _digits(value) if digits is None else digits
    text = f"{value:+.{places}f}" if signed else f"{value:.{places}f}"
    return text.replace("-", "") if float(text) == 0 and not signed else text


def _digits(value: float) -> int:
    size = abs(value)
    if size >= 100:
        return 0
    if size >= 10:
        return 1
    if size >= 0.1 or size == 0:
        return 2
    return 5 if 5e-6 <= size < 1e-3 else 3


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"

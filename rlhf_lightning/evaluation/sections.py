"""What a further part of the report is: a table, figures and plain data, whoever measured them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from rlhf_lightning.evaluation.formatting import TableRow
from rlhf_lightning.evaluation.plots import COLORS, Distribution, histograms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDE, NARROW = 1000, 340


class Figure(NamedTuple):
    """One picture, drawn for a desk and for a phone.

    Attributes:
        title: Its caption.
        wide: SVG of about 1000 pixels, made with :mod:`rlhf_lightning.evaluation.plots`.
        narrow: The same in about 340 pixels.
    """

    title: str
    wide: str
    narrow: str


@dataclass(frozen=True)
class Section:
    """One part of the report.

    Attributes:
        key: Its name in ``report.json``, under ``sections``.
        title: Its heading.
        note: How it was measured, in one or two sentences.
        columns: What the columns of the table are: names of models, or others.
        rows: The table, a cell for each column.
        figures: Pictures below the table.
        data: All that was measured, for ``report.json``: what :func:`plain_data` takes.
    """

    key: str
    title: str
    note: str
    columns: list[str]
    rows: list[TableRow]
    figures: list[Figure] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise ValueError(
                    f"section {self.key!r}: row {row.label!r} has {len(row.cells)} cells for {len(self.columns)} "
                    "columns; give one for each."
                )

    def as_dict(self) -> dict[str, Any]:
        """Return what ``report.json`` holds of it: ``title``, ``note``, ``columns``, ``rows`` and ``data``."""
        shown = {"title": self.title, "note": self.note, "columns": self.columns, "rows": self.rows, "data": self.data}
        told: dict[str, Any] = plain_data(shown)
        return told


class Measurement(Protocol):
    """What looks at each model while it is loaded, and makes sections of what it saw."""

    def take(self, name: str, model: "PreTrainedModel") -> None:
        """Measure a model.

        Args:
            name: What the model is called.
            model: The model, in eval mode, on its device.
        """

    def sections(self, names: list[str]) -> list[Section]:
        """Return what was measured.

        Args:
            names: Of the models, in the order of the report.
        """


def plain_data(value: Any) -> Any:
    """Turn intervals, and whatever else has named fields, into objects with these names.

    Example:
        >>> from rlhf_lightning.evaluation.statistics import Interval
        >>> plain_data({"score": [Interval(0.5, 0.25, 0.75), None]})
        {'score': [{'mean': 0.5, 'low': 0.25, 'high': 0.75}, None]}
    """
    if hasattr(value, "_asdict"):
        return plain_data(value._asdict())
    if is_dataclass(value):
        return plain_data(vars(value))
    if isinstance(value, dict):
        return {key: plain_data(item) for key, item in value.items()}
    return [plain_data(item) for item in value] if isinstance(value, list | tuple) else value


def colors_of(names: Sequence[str], base: str) -> dict[str, int]:
    """Return the number of each model's colour: 0, grey, for the base, the others in turn.

    Example:
        >>> colors_of(["dpo", "base", "ppo"], "base")
        {'dpo': 1, 'base': 0, 'ppo': 2}
    """
    others = [name for name in names if name != base]
    return {name: 0 if name == base else 1 + others.index(name) % (COLORS - 1) for name in names}


def distribution_figure(rows: Sequence[Distribution], *, title: str, x_label: str) -> Figure:
    """Draw histograms below one another, the first one's outline behind the others.

    Args:
        rows: The distributions, at least one.
        title: Caption of the figure.
        x_label: What is distributed.
    """
    wide = histograms(rows, title=title, x_label=x_label, width=WIDE)
    narrow = histograms(rows, title=title, x_label=x_label, width=NARROW, row_height=104)
    return Figure(title, wide, narrow)

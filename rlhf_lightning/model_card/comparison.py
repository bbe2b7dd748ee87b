"""The comparison that a model was measured in: its ``report.json`` and ``samples.jsonl``, found and read back."""

import filecmp
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rlhf_lightning.errors import UserError, did_you_mean
from rlhf_lightning.evaluation.formatting import Kind, TableRow
from rlhf_lightning.evaluation.statistics import Interval

logger = logging.getLogger("rlhf_lightning")

_FORMAT = "rlhf_lightning.comparison/"
_AGAIN = "run compare again."


@dataclass(frozen=True)
class MeasuredTable:
    """One table of a comparison.

    Attributes:
        title: Its heading; empty for the first.
        note: How it was measured.
        columns: Names of models, or others.
        rows: A cell for each column.
    """

    title: str
    note: str
    columns: list[str]
    rows: list[TableRow]


@dataclass(frozen=True)
class MeasuredModel:
    """A comparison from the point of view of one of its models.

    Attributes:
        folder: Where it lies.
        own: What the comparison calls the model.
        report: Content of ``report.json``.
        tables: The table of all measures, then those of the sections.
        samples: Rows of ``samples.jsonl``.
    """

    folder: Path
    own: str
    report: Mapping[str, Any]
    tables: list[MeasuredTable]
    samples: list[dict[str, Any]]

    @property
    def base(self) -> str:
        """Name of the model that the others are measured against."""
        return str(self.report["base"])

    def cells(self) -> Iterator[tuple[TableRow, Interval | float]]:
        """Yield what was measured of the model itself, without sections."""
        table = self.tables[0]
        place = table.columns.index(self.own)
        for row in table.rows:
            cell = row.cells[place]
            if cell is not None:
                yield row, cell


def check_report(folder: str | Path, name: str | None = None) -> None:
    """Refuse what no comparison has written, or one that does not know a model of this name.

    Raises:
        UserError: If that is so, or it is damaged or of an earlier version.
    """
    report = _read_report(Path(folder))
    _measured(Path(folder), report, "")
    names = [str(model["name"]) for model in report["models"]]
    if name is not None and name not in names:
        raise UserError(f"report_model is {name!r}; '{folder}' compares {', '.join(names)}.{did_you_mean(name, names)}")


def named_comparison(folder: str | Path, name: str | None, weights: Path, checkpoint: Path) -> MeasuredModel:
    """Read the comparison that a user names.

    Args:
        folder: What ``compare`` has written; :func:`check_report` has looked at it.
        name: What it calls the model; ``None`` finds the one that has the same weights.
        weights: Folder with the exported weights.
        checkpoint: What was exported.

    Raises:
        UserError: If it is none, or the model is not in it.
    """
    folder = Path(folder)
    report = _read_report(folder)
    if name is None:
        own = [str(model["name"]) for model in report["models"] if _same_model(model, folder, weights, checkpoint)]
        if not own:
            names = ", ".join(str(model["name"]) for model in report["models"])
            raise UserError(
                f"none of the models of '{folder}' ({names}) has the weights of '{checkpoint}'; name the one that it "
                f"is by --report_model, or {_AGAIN}"
            )
        name = own[-1]
    model = next(model for model in report["models"] if model["name"] == name)
    if _is_newer(model, folder / "report.json"):
        raise UserError(f"{name!r} was trained on since '{folder}' measured it; {_AGAIN}")
    if _place_of(model, folder) is not None and not _same_model(model, folder, weights, checkpoint):
        raise UserError(
            f"{name!r} in '{folder}' was measured with other weights ({model['path']}) than those of '{checkpoint}'; "
            f"{_AGAIN}"
        )
    return _measured(folder, report, name)


def comparison_beside(run_dir: Path, weights: Path, checkpoint: Path) -> MeasuredModel | None:
    """Look for the newest comparison in a folder beside the run's that measured these weights.

    Args:
        run_dir: The run's folder; a pipeline's stages lie beside one another.
        weights: Folder with the exported weights.
        checkpoint: What was exported.
    """
    found: list[MeasuredModel] = []
    for path in sorted(run_dir.resolve().parent.glob("*/report.json")):
        try:
            report = _read_report(path.parent)
            own = [model for model in report["models"] if _same_model(model, path.parent, weights, checkpoint)]
            if own and not _is_newer(own[-1], path):
                found.append(_measured(path.parent, report, str(own[-1]["name"])))
        except UserError as fault:
            logger.info("left out of the model card: %s", fault)
    newest = max(found, key=lambda measured: str(measured.report["created"]), default=None)
    if newest is not None:
        logger.info("the model card shows what %s measured of %r", newest.folder, newest.own)
    return newest


def _read_report(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    if not path.is_file():
        raise UserError(f"report '{folder}' has no report.json; give a folder that compare has written.")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        is_own = str(report["format"]).startswith(_FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        is_own = False
    if not is_own:
        raise UserError(f"'{path}' was not written by compare; give a folder that it has written.")
    if not isinstance(report.get("table"), dict):
        raise UserError(f"'{path}' is of an earlier version and holds no table; {_AGAIN}")
    try:
        _check_entries(report)
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise UserError(f"'{path}' is damaged ({type(fault).__name__}); {_AGAIN}") from fault
    return dict(report)


def _check_entries(report: Mapping[str, Any]) -> None:
    """Raise what Python raises where something is missing that the card reads, or is of another kind."""
    names = [str(model["name"]) for model in report["models"] if Path(model["path"])]
    if report["base"] not in names or names != report["table"]["columns"] or not isinstance(report["created"], str):
        raise ValueError("the models, the base and the columns of the table do not go together")
    _tables(report)
    prompts, sampling = report["prompts"], report["sampling"]
    int(report["seed"]), str(prompts["source"]), int(prompts["count"]), int(prompts["available"])
    int(sampling["max_new_tokens"]), float(sampling["temperature"])


def _measured(folder: Path, report: dict[str, Any], name: str) -> MeasuredModel:
    path = folder / "samples.jsonl"
    try:
        samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        complete = all(isinstance(row["row"], int) and row["model"] and "response" in row for row in samples)
    except (OSError, ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise UserError(f"'{path}' is damaged; {_AGAIN}")
    return MeasuredModel(folder, name, report, _tables(report), samples)


def _tables(report: Mapping[str, Any]) -> list[MeasuredTable]:
    own = {"title": "", "note": "", **report["table"]}
    return [_table(part) for part in [own, *(report.get("sections") or {}).values()]]


def _table(part: Mapping[str, Any]) -> MeasuredTable:
    columns = [str(column) for column in part["columns"]]
    rows = [
        TableRow(str(row["label"]), str(row["note"]), row["kind"], [_cell(cell) for cell in row["cells"]])
        for row in part["rows"]
    ]
    if any(len(row.cells) != len(columns) or row.kind not in get_args(Kind) for row in rows):
        raise ValueError("a row has another number of cells than there are columns")
    return MeasuredTable(str(part["title"]), str(part["note"]), columns, rows)


def _cell(value: Any) -> Interval | float | None:
    if isinstance(value, dict):
        return Interval(float(value["mean"]), float(value["low"]), float(value["high"]))
    return None if value is None else float(value)


def _place_of(model: Mapping[str, Any], folder: Path) -> Path | None:
    """Return the folder or checkpoint that a model was measured from, if it is there.

    A relative path is one from where ``compare`` was started, which is most often above the report, or here.
    """
    path = Path(model["path"]).expanduser()
    places = [path] if path.is_absolute() else [above / path for above in (*folder.resolve().parents, Path())]
    return next((place for place in places if place.exists()), None)


def _same_model(model: Mapping[str, Any], folder: Path, weights: Path, checkpoint: Path) -> bool:
    """Tell whether a model of a comparison is the exported one: the same checkpoint, or the same files of weights."""
    place = _place_of(model, folder)
    if place is None or place.is_file():
        return place is not None and place.samefile(checkpoint)
    names = {path.name for path in weights.glob("*.safetensors")}
    found = {path.name for path in place.glob("*.safetensors")}
    return names == found and all(filecmp.cmp(weights / name, place / name, shallow=False) for name in names)


def _is_newer(model: Mapping[str, Any], report: Path) -> bool:
    """Tell whether a model was written after its report, which then measured what was there before."""
    place = _place_of(model, report.parent)
    files = [place] if place is None or place.is_file() else [*place.glob("*.safetensors")]
    return any(path is not None and path.stat().st_mtime > report.stat().st_mtime for path in files)

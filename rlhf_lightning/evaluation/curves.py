"""Training curves out of a run's ``metrics.jsonl``: which belong in one plot, and how many points it needs."""

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_lightning.errors import UserError, did_you_mean
from rlhf_lightning.evaluation.plots import Series

MAX_POINTS = 80

# Title of a plot and the keys that share it, in the order of the report; of the keys, those that a run has are drawn.
_PLOTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Score", ("rollout/score", "val/score")),
    ("KL to the reference, nats a response", ("rollout/kl", "val/kl")),
    ("Accuracy", ("train/accuracy", "val/accuracy")),
    ("Loss", ("train/loss", "val/loss")),
    ("Margin", ("train/margin", "val/margin_mean")),
    ("Response length, tokens", ("rollout/response_length", "val/response_length")),
    ("Finished responses", ("rollout/finished_fraction", "val/finished_fraction")),
    ("KL of an update, nats a token", ("train/approx_kl",)),
    ("Clipped share of tokens", ("train/clip_fraction",)),
    ("Policy loss", ("train/policy_loss",)),
    ("Value loss", ("train/value_loss",)),
    ("Explained variance of the values", ("train/explained_variance",)),
    ("Entropy, nats a token", ("train/entropy",)),
    ("Gradient norm", ("train/grad_norm",)),
    ("KL coefficient", ("rollout/kl_coef",)),
)
_COLOURS = {"rollout": 1, "train": 1, "val": 2}
_UNWANTED = ("val/margin_", "val/ties")


class Plot(NamedTuple):
    """One plot of a run."""

    title: str
    series: list[Series]


def read_curves(curves: Mapping[str, str]) -> dict[str, list[Plot]]:
    """Read the training curves of runs.

    Args:
        curves: Path of a ``metrics.jsonl`` by the name of its run.

    Returns:
        Plots by the name of the run, in the order of the report; those that would be empty are left out.

    Raises:
        UserError: If a file is missing, is not such a file, or holds nothing to draw.
    """
    return {name: plots_of(_read(name, Path(path)), f"curves.{name}: {path!r}") for name, path in curves.items()}


def training_seconds(curves: Mapping[str, str]) -> dict[str, float]:
    """Return how long each run had trained when it last logged, validation included, by the name of the run.

    Args:
        curves: Path of a ``metrics.jsonl`` by the name of its run.

    Returns:
        Seconds; a run whose rows carry no time is left out.
    """
    times = {name: training_seconds_of(_read(name, Path(path))) for name, path in curves.items()}
    return {name: seconds for name, seconds in times.items() if seconds is not None}


def training_seconds_of(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return how long a run had trained when it logged the last of these rows; ``None`` where they carry no time."""
    seconds = [row["time"] for row in rows if "time" in row]
    return _whole(seconds) if seconds else None


def plots_of(rows: Sequence[Mapping[str, Any]], where: str = "metrics") -> list[Plot]:
    """Sort logged values into plots: the known ones first, then whatever else was validated.

    Args:
        rows: As :func:`rlhf_lightning.loggers.read_metrics` returns them.
        where: Named in the error.

    Raises:
        UserError: If there is no value to draw.

    Example:
        >>> [plot.title for plot in plots_of([{"step": 0, "val/voice": 0.5, "train/loss": 2.0}])]
        ['Loss', 'voice (val)']
    """
    known = {key for _, keys in _PLOTS for key in keys}
    logged = {key for row in rows for key in row}
    others = sorted(key for key in logged - known if key.startswith(("val/", "rollout/score_")))
    others = [key for key in others if not key.startswith(_UNWANTED) and key != "rollout/score_std"]
    layout = [*_PLOTS, *((f"{key.partition('/')[2]} ({key.partition('/')[0]})", (key,)) for key in others)]
    plots = [Plot(title, [line for key in keys if (line := _series(key, rows))]) for title, keys in layout]
    plots = [plot for plot in plots if plot.series]
    if not plots:
        raise UserError(
            f"{where} holds none of the values that are drawn (rollout/, train/ or val/); give a run's own file."
        )
    return plots


def condense(
    xs: Sequence[float], ys: Sequence[float], max_points: int = MAX_POINTS
) -> tuple[list[float], list[float], list[float]]:
    """Replace many points by the mean of neighbours, so that a plot shows the trend and its noise.

    Args:
        xs: Steps, ascending.
        ys: Values.
        max_points: Points to keep; fewer are left as they are.

    Returns:
        Steps, values and the standard deviation within each group of neighbours; the last is empty where nothing was
        averaged.

    Example:
        >>> condense([0, 1, 2, 3], [1.0, 3.0, 2.0, 2.0], max_points=2)
        ([0.5, 2.5], [2.0, 2.0], [1.0, 0.0])
    """
    if len(xs) <= max_points:
        return list(xs), list(ys), []
    size = math.ceil(len(xs) / max_points)
    groups = [(xs[start : start + size], ys[start : start + size]) for start in range(0, len(xs), size)]
    means = [statistics.fmean(values) for _, values in groups]
    return [statistics.fmean(steps) for steps, _ in groups], means, [statistics.pstdev(values) for _, values in groups]


def _whole(seconds: Sequence[float]) -> float:
    """Add up the parts of a run whose clock began anew each time it was resumed.

    Example:
        >>> _whole([1.0, 5.0, 2.0, 3.0])
        8.0
    """
    ends = [before for before, after in itertools.pairwise([*seconds, 0.0]) if after < before]
    return sum(ends)


def _series(key: str, rows: Sequence[Mapping[str, Any]]) -> Series | None:
    """Return the line of one key; ``None`` where it was never logged as a finite number."""
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    if not any(math.isfinite(value) for _, value in points):
        return None
    xs, ys = [float(step) for step, _ in points], [float(value) for _, value in points]
    # Averages would spread a value that is not finite over its neighbours: such a curve is drawn as it is, with a gap.
    whole = all(map(math.isfinite, ys))
    steps, values, spread = condense(xs, ys) if whole else (xs, ys, [])
    return Series(key, steps, values, spread, _COLOURS[key.partition("/")[0]])


def _read(name: str, path: Path) -> list[dict[str, Any]]:
    from rlhf_lightning.loggers import read_metrics

    where = f"curves.{name}: '{path}'"
    if path.is_dir():
        raise UserError(f"{where} is a folder; give the metrics.jsonl in it.")
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{where} does not exist.{did_you_mean(path.name, siblings)}")
    try:
        rows = read_metrics(path)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where} is not the metrics.jsonl of a run (one JSON object with a step in each line)."
        ) from error
    if not rows:
        raise UserError(f"{where} is empty; the run has logged nothing yet.")
    return rows

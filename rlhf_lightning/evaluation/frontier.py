"""Score against KL: what each model and checkpoint gains, and what best-of-n gains for as much."""

import math
from collections.abc import Sequence
from typing import Any

from rlhf_lightning.evaluation.best_of_n import BestOfN
from rlhf_lightning.evaluation.formatting import TableRow
from rlhf_lightning.evaluation.named_models import NamedModel
from rlhf_lightning.evaluation.scatter import Group, Point, scatter
from rlhf_lightning.evaluation.sections import NARROW, WIDE, Figure, Section, colors_of
from rlhf_lightning.evaluation.statistics import Interval
from rlhf_lightning.evaluation.summary import ModelSummary

_TITLE = "Score against KL"


def frontier_section(
    models: Sequence[NamedModel], summaries: Sequence[ModelSummary], base: str, best: Sequence[BestOfN]
) -> Section | None:
    """Return the figure of score against KL, and each one's gain per root of a nat.

    Args:
        models: Which models there are; checkpoints of one run are joined by a line in the order of their steps.
        summaries: What was measured of them, in the same order.
        base: Name of the base.
        best: Best-of-n of the base; may be empty.

    Returns:
        ``None`` without a reward, or where there is nothing beside the base.

    References:
        Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization", and Bai et al. 2022, "Training a Helpful and
        Harmless Assistant with RLHF", section 4.3, plot a score against the root of the KL divergence.
    """
    scores = [summary.score for summary in summaries]
    if scores[0] is None or len(models) + len(best) < 2:
        return None
    groups = _groups(models, summaries, base, best)
    figure = Figure(
        _TITLE,
        *(
            scatter(groups, title=_TITLE, x_label=f"KL divergence to {base}, nats a response", width=width, height=high)
            for width, high in ((WIDE, 420), (NARROW, 300))
        ),
    )
    gains = [
        None if summary.score_difference is None else _gain(summary.score_difference.mean, summary.kl.mean)
        for summary in summaries
    ] + [_gain(one.difference.mean, one.kl) for one in best]
    columns = [summary.name for summary in summaries] + [f"best of {one.n}" for one in best]
    row = TableRow("Gain per root of a nat", f"difference to {base} / √KL", "difference", list(gains))
    note = (
        "Each point is a model, its bars are 95 % intervals; higher at the same KL is better. The axis goes by the "
        "root of the KL divergence, along which scores rise about straight until a reward is over-optimised. The KL of "
        "best-of-n is its upper bound."
    )
    return Section("frontier", _TITLE, note, columns, [row], [figure], _data(models, summaries, best))


def _groups(
    models: Sequence[NamedModel], summaries: Sequence[ModelSummary], base: str, best: Sequence[BestOfN]
) -> list[Group]:
    """Return the points by colour: the checkpoints of a run share one, and so do those of best-of-n."""
    lines: dict[str, list[Point]] = {}
    for model, summary in zip(models, summaries, strict=True):
        assert summary.score is not None
        mark = f"{model.step}" if model.line is not None else ""
        lines.setdefault(model.line or model.name, []).append(Point(model.name, summary.kl, summary.score, mark))
    colors = colors_of([model.name for model in models], base)
    joined = {model.line for model in models}
    groups = [
        Group(label, _few_marks(points), colors[points[0].label], joined=label in joined)
        for label, points in lines.items()
    ]
    if not best:
        return groups
    start = next(summary for summary in summaries if summary.name == base)
    assert start.score is not None
    bound = [Point(f"best of {one.n}", Interval(one.kl, one.kl, one.kl), one.score, f"n={one.n}") for one in best]
    points = [Point(base, start.kl, start.score), *bound]
    return [*groups, Group(f"best-of-n of {base}", points, 0, joined=True, dashed=True)]


def _few_marks(points: list[Point]) -> list[Point]:
    """Leave the words of the first and the last point only, as those between would cover one another."""
    return [point if number in (0, len(points) - 1) else point._replace(mark="") for number, point in enumerate(points)]


def _gain(difference: float, kl: float) -> float | None:
    return difference / math.sqrt(kl) if kl > 0 else None


def _data(models: Sequence[NamedModel], summaries: Sequence[ModelSummary], best: Sequence[BestOfN]) -> dict[str, Any]:
    points = [
        {"model": model.name, "line": model.line, "step": model.step, "kl": summary.kl, "score": summary.score}
        for model, summary in zip(models, summaries, strict=True)
    ]
    return {"points": points, "best_of": [{"n": one.n, "kl": one.kl, "score": one.score} for one in best]}

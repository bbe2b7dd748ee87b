"""What further reward sources say, which were not used in training: is it the answers that got better?"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlhf_lightning.evaluation.formatting import TableRow
from rlhf_lightning.evaluation.generations import Generations
from rlhf_lightning.evaluation.sections import Section
from rlhf_lightning.evaluation.statistics import mean_interval, paired_difference, win_rate
from rlhf_lightning.evaluation.summary import kind_of

_NOTE = (
    "The same answers, scored by reward models that were not used in training. A gain that only the reward of training "
    "sees is a gain in pleasing that reward."
)


def judged_section(answers: Sequence[Generations], base: str, *, seed: int = 0) -> Section | None:
    """Return the scores by further judges: mean, paired difference to the base, and win rate with Wilson's interval.

    Args:
        answers: Of each model, the base's among them.
        base: Name of the base.
        seed: Fixes the resamples.

    Returns:
        ``None`` where there is no further judge.

    References:
        Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization", on what one reward model says of a policy
        that was trained on another.
    """
    names = list(answers[0].judgement.others)
    if not names:
        return None
    of_base = next(answer for answer in answers if answer.name == base)
    rows: list[TableRow] = []
    data: dict[str, Any] = {}
    for judge in names:
        bases = of_base.judgement.others[judge]
        found = [_measured(answer.judgement.others[judge], bases, answer is of_base, seed) for answer in answers]
        data[judge] = {answer.name: values for answer, values in zip(answers, found, strict=True)}
        rows += [
            TableRow(
                judge,
                "mean score",
                kind_of([answer.judgement.others[judge] for answer in answers]),
                [values["score"] for values in found],
            ),
            TableRow(judge, f"difference to {base}, paired", "difference", [v["score_difference"] for v in found]),
            TableRow(judge, f"win rate against {base}, ties half", "share", [v["win_rate"] for v in found]),
        ]
    rows = [row for row in rows if any(cell is not None for cell in row.cells)]
    return Section("judges", "Judged by others", _NOTE, [answer.name for answer in answers], rows, data=data)


def _measured(scores: Tensor, of_base: Tensor, is_base: bool, seed: int) -> dict[str, Any]:
    return {
        "score": mean_interval(scores, seed=seed),
        "score_std": float(scores.double().std(correction=0)),
        "score_difference": None if is_base else paired_difference(scores, of_base, seed=seed),
        "win_rate": None if is_base else win_rate(scores, of_base),
    }

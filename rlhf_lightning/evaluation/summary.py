"""A comparison in numbers: one summary for each model, and the rows of the table that both reports print."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.evaluation.formatting import Kind, TableRow, plain, written
from rlhf_lightning.evaluation.generations import Generations
from rlhf_lightning.evaluation.prompts import PromptSet
from rlhf_lightning.evaluation.questions import Question
from rlhf_lightning.evaluation.sections import Section, plain_data
from rlhf_lightning.evaluation.statistics import (
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    distinct_n,
    mean_interval,
    paired_difference,
    quantiles,
    share_interval,
    win_rate,
)
from rlhf_lightning.metrics import QUANTILES
from rlhf_lightning.rollout.sampler import SamplingConfig

#: The number rises when a key goes or changes its type or meaning; report.schema.json describes each key.
JSON_FORMAT = "rlhf_lightning.comparison/2"


@dataclass(frozen=True)
class ModelSummary:
    """What is known of one model's answers; intervals are 95 %.

    Attributes:
        name: What the model is called.
        path: Where it was loaded from.
        score: Mean score; ``None`` without a reward, as all that follows from it.
        score_std: Standard deviation of the scores.
        score_quantiles: Of the scores.
        score_parts: Mean of each reward behind the score.
        score_difference: Mean of score minus base's score on the same prompt; ``None`` for the base.
        win_rate: Share of prompts on which the score is above the base's, ties as half; ``None`` for the base.
        metrics: Mean of each text metric.
        kl: KL divergence to the base, nats a response.
        kl_per_token: The same per token of all responses.
        length: Tokens of a response, its stop token included.
        finished: Share of responses that stopped by themselves.
        distinct_2: Share of different pairs of words.
    """

    name: str
    path: str
    score: Interval | None
    score_std: float | None
    score_quantiles: dict[str, float]
    score_parts: dict[str, Interval]
    score_difference: Interval | None
    win_rate: Interval | None
    metrics: dict[str, Interval]
    kl: Interval
    kl_per_token: Interval
    length: Interval
    finished: Interval
    distinct_2: float


def summarize(model: Generations, base: Generations, *, seed: int = 0) -> ModelSummary:
    """Turn answers into means with intervals.

    Args:
        model: The model's answers.
        base: The base's, to the same prompts; may be the same object.
        seed: Fixes the resamples.
    """
    scores, base_scores = model.scores, base.scores
    against_base = model is not base and scores is not None and base_scores is not None
    return ModelSummary(
        name=model.name,
        path=model.path,
        score=None if scores is None else mean_interval(scores, seed=seed),
        score_std=None if scores is None else float(scores.double().std(correction=0)),
        score_quantiles={} if scores is None else quantiles(scores, QUANTILES),
        score_parts=_means(model.judgement.score_parts, seed),
        score_difference=paired_difference(_sure(scores), _sure(base_scores), seed=seed) if against_base else None,
        win_rate=win_rate(_sure(scores), _sure(base_scores)) if against_base else None,
        metrics=_means(model.judgement.metrics, seed),
        kl=bootstrap_mean(model.kl, seed=seed),
        kl_per_token=bootstrap_ratio(model.kl, model.lengths.double(), seed=seed),
        length=bootstrap_mean(model.lengths.double(), seed=seed),
        finished=share_interval(model.finished.double()),
        distinct_2=distinct_n(model.responses, 2),
    )


def table_rows(
    models: Sequence[ModelSummary], answers: Sequence[Generations], base: str, training_s: Mapping[str, float]
) -> list[TableRow]:
    """Return the headline table, one row for each measure.

    Args:
        models: Summaries in the order of the columns.
        answers: What they were made from.
        base: Name of the base.
        training_s: Seconds of training of those models of which they are known.
    """
    rows = []
    if models[0].score is not None:
        score_kind = kind_of([answer.scores for answer in answers])
        rows += [
            TableRow("Score", "mean", score_kind, [model.score for model in models]),
            TableRow("Difference in score", f"to {base}, paired", "difference", [m.score_difference for m in models]),
            TableRow("Win rate", f"against {base}, ties half", "share", [model.win_rate for model in models]),
        ]
    for name in models[0].score_parts:
        kind = kind_of([answer.judgement.score_parts[name] for answer in answers])
        rows.append(TableRow(name, "part of the score", kind, [model.score_parts[name] for model in models]))
    for name in models[0].metrics:
        kind = kind_of([answer.judgement.metrics[name] for answer in answers])
        note = "share of responses" if kind == "share" else "mean"
        rows.append(TableRow(name, note, kind, [model.metrics[name] for model in models]))
    rows += [
        TableRow(
            "KL divergence", f"to {base}, nats a response", "number", [_unless(m.name == base, m.kl) for m in models]
        ),
        TableRow("Length", "tokens a response", "number", [model.length for model in models]),
        TableRow("Finished", "share of responses", "share", [model.finished for model in models]),
        TableRow("Distinct-2", "different word pairs", "share", [model.distinct_2 for model in models]),
        TableRow("Training", "seconds", "number", [training_s.get(model.name) for model in models]),
    ]
    return [row for row in rows if any(cell is not None for cell in row.cells)]


def headline(model: ModelSummary, base: ModelSummary) -> str:
    """Return one sentence on what became of a model."""
    kl = f"at a KL divergence of {plain(model.kl.mean)} nats a response"
    if model.score_difference is None or model.win_rate is None or not base.score_std:
        return f"{model.name} answers {kl} from {base.name}."
    gain, wins = model.score_difference, model.win_rate
    if gain.contains(0.0):
        return (
            f"{model.name} scores like {base.name}: the difference is {written(gain, 'difference')}, {kl}, and it wins "
            f"{written(wins.mean, 'share')} of the prompts."
        )
    word = "above" if gain.mean > 0 else "below"
    deviations = f"{abs(gain.mean) / base.score_std:.1f} standard deviations of {base.name}'s scores"
    return (
        f"{model.name} scores {plain(abs(gain.mean))} {word} {base.name} ({deviations}) and wins "
        f"{written(wins.mean, 'share')} of the prompts, {kl}."
    )


@dataclass(frozen=True)
class Comparison:
    """All that a report shows, apart from training curves.

    Attributes:
        base: Name of the model that the others are measured against.
        prompts: What was asked.
        answers: Of each model, in the order of the report.
        models: Their summaries, in the same order.
        sampling: How was sampled.
        reward: What gave the score; ``None`` without one.
        seed: Fixed prompts, draws and resamples.
        created: When, as text.
        training_s: Seconds of training by the name of the model, where its curves tell them.
        sections: What else was measured, in the order of the report.
        questions: The user's own, with every model's answers.
    """

    base: str
    prompts: PromptSet
    answers: list[Generations]
    models: list[ModelSummary]
    sampling: SamplingConfig
    reward: str | None
    seed: int
    created: str
    training_s: Mapping[str, float] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)

    @property
    def table(self) -> list[TableRow]:
        """The rows of the headline table."""
        return table_rows(self.models, self.answers, self.base, self.training_s)

    @property
    def base_summary(self) -> ModelSummary:
        """The summary of the base."""
        return next(model for model in self.models if model.name == self.base)

    @property
    def names(self) -> list[str]:
        """The names of the models."""
        return [model.name for model in self.models]

    def as_dict(self) -> dict[str, Any]:
        """Return what ``report.json`` holds; :func:`rlhf_lightning.evaluation.compare.compare` tells its schema."""
        prompts = {
            "source": self.prompts.source,
            "count": len(self.prompts.prompts),
            "available": self.prompts.available,
        }
        return {
            "format": JSON_FORMAT,
            "created": self.created,
            "base": self.base,
            "seed": self.seed,
            "prompts": prompts,
            "sampling": asdict(self.sampling),
            "reward": self.reward,
            "training_s": dict(self.training_s),
            "models": plain_data(self.models),
            "table": {"columns": self.names, "rows": plain_data(self.table)},
            "sections": {section.key: section.as_dict() for section in self.sections},
            "questions": [asdict(question) for question in self.questions],
        }

    def samples(self) -> list[dict[str, Any]]:
        """Return one row for each prompt and model: what ``samples.jsonl`` holds."""
        return [
            {"row": row, "model": answer.name, "prompt": prompt, **answer.row(row)}
            for row, prompt in enumerate(self.prompts.prompts)
            for answer in self.answers
        ]


def _means(values: dict[str, Tensor], seed: int) -> dict[str, Interval]:
    return {name: mean_interval(numbers, seed=seed) for name, numbers in values.items()}


def kind_of(values: Sequence[Tensor | None]) -> Kind:
    """Return how the means of values are written: as shares where each value is 0 or 1.

    Args:
        values: Of each model, shape (rows,); ``None`` is passed over, and one at least is not.
    """
    numbers = torch.cat([value for value in values if value is not None])
    return "share" if bool(((numbers == 0) | (numbers == 1)).all()) else "number"


def _sure(values: Tensor | None) -> Tensor:
    assert values is not None
    return values


def _unless(condition: bool, value: Interval) -> Interval | None:
    return None if condition else value

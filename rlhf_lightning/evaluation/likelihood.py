"""How likely models find given answers: mean log-probability a token, its spread, and what changed against a base."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_lightning.evaluation.answer_sets import EncodedAnswers, LikelihoodSet, counted, read_answers
from rlhf_lightning.evaluation.cache import NOTHING_KEPT, ResultCache
from rlhf_lightning.evaluation.formatting import TableRow
from rlhf_lightning.evaluation.generations import kept_logprobs, sequence_logprobs
from rlhf_lightning.evaluation.plots import Distribution
from rlhf_lightning.evaluation.sections import Figure, Section, colors_of, distribution_figure
from rlhf_lightning.evaluation.statistics import (
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    paired_difference,
    quantiles,
)
from rlhf_lightning.metrics import QUANTILES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class AnswerLogprobs(NamedTuple):
    """What a model says of given answers.

    Attributes:
        totals: Log-probability of each whole answer, nats, shape (answers,), float64.
        lengths: Tokens of each, shape (answers,), int64.
    """

    totals: Tensor
    lengths: Tensor

    @property
    def means(self) -> Tensor:
        """Mean log-probability a token of each answer, nats, shape (answers,), float64."""
        return self.totals / self.lengths


@dataclass(frozen=True)
class LikelihoodSummary:
    """How likely a model finds a set of answers; intervals are 95 %, by bootstrap over answers.

    Attributes:
        per_answer: Mean over answers of each one's mean log-probability a token, nats: every answer weighs the same.
        per_token: Log-probability of all answers over all their tokens, nats: every token weighs the same.
        perplexity: e to the minus ``per_token``.
        std: Standard deviation of the answers' means, nats.
        quantiles: Of the answers' means, nats.
        difference: ``per_answer`` less that of the base, answer by answer; ``None`` for the base.
        difference_per_token: ``per_token`` less that of the base; ``None`` for the base.
    """

    per_answer: Interval
    per_token: Interval
    perplexity: Interval
    std: float
    quantiles: dict[str, float]
    difference: Interval | None
    difference_per_token: Interval | None


def answer_logprobs(model: nn.Module, answers: EncodedAnswers, *, batch_size: int = 32) -> AnswerLogprobs:
    """Return what a model says of answers, teacher-forced, at temperature 1.

    Args:
        model: A causal language model, in eval mode.
        answers: See :func:`~rlhf_lightning.evaluation.answer_sets.read_answers`.
        batch_size: Answers in one forward pass, those of like length together; changes speed and memory alone.
    """
    sequences = answers.sequences
    return AnswerLogprobs(sequence_logprobs(model, sequences, batch_size=batch_size), sequences.response_lengths)


def summarize_likelihood(
    own: AnswerLogprobs, base: AnswerLogprobs | None = None, *, seed: int = 0
) -> LikelihoodSummary:
    """Turn log-probabilities into means with intervals.

    Args:
        own: The model's.
        base: Another model's, of the same answers; ``None`` compares with none.
        seed: Fixes the resamples.

    Raises:
        ValueError: If there are no answers, or the two are not of the same ones.

    Example:
        >>> found = summarize_likelihood(AnswerLogprobs(torch.tensor([-1.0, -6.0]), torch.tensor([1, 3])))
        >>> found.per_answer.mean, found.per_token.mean
        (-1.5, -1.75)
    """
    if base is not None and not torch.equal(own.lengths, base.lengths):
        raise ValueError("summarize_likelihood: the base has answers of other lengths; give it the same answers.")
    per_token = bootstrap_ratio(own.totals, own.lengths, seed=seed)
    return LikelihoodSummary(
        per_answer=bootstrap_mean(own.means, seed=seed),
        per_token=per_token,
        perplexity=Interval(*(_exp(-value) for value in (per_token.mean, per_token.high, per_token.low))),
        std=float(own.means.std(correction=0)),
        quantiles=quantiles(own.means, QUANTILES),
        difference=None if base is None else paired_difference(own.means, base.means, seed=seed),
        difference_per_token=(
            None if base is None else bootstrap_ratio(own.totals - base.totals, own.lengths, seed=seed)
        ),
    )


def evaluate_likelihood(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    sets: Mapping[str, LikelihoodSet],
    *,
    base: "PreTrainedModel | None" = None,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, LikelihoodSummary]:
    """Measure how likely a model finds named sets of answers.

    Args:
        model: A causal language model, in eval mode.
        tokenizer: Its tokenizer.
        sets: What to measure, by name.
        base: What it is compared with, such as the model before training; it shares the tokenizer. ``None`` is none.
        batch_size: Answers in one forward pass.
        seed: Fixes which rows are drawn, and the intervals.

    Returns:
        A summary by the name of the set.

    Raises:
        UserError: If a set cannot be read.
    """
    found = {}
    for name, wanted in sets.items():
        answers = read_answers(wanted, tokenizer, seed=seed, where=f"likelihood.{name}")
        own, bases = (
            None if of is None else answer_logprobs(of, answers, batch_size=batch_size) for of in (model, base)
        )
        assert own is not None
        found[name] = summarize_likelihood(own, bases, seed=seed)
    return found


class Likelihoods:
    """The part of a comparison that measures likelihood.

    Args:
        wanted: What to measure, by name.
        answers: The same in tokens.
        base: Name of the model that the others are compared with.
        batch_size: Answers in one forward pass.
        seed: Fixes the intervals.
        cache: Where log-probabilities are kept.
    """

    def __init__(
        self,
        wanted: Mapping[str, LikelihoodSet],
        answers: Mapping[str, EncodedAnswers],
        *,
        base: str,
        batch_size: int,
        seed: int,
        cache: ResultCache = NOTHING_KEPT,
    ) -> None:
        self.wanted, self.answers, self.base, self.batch_size, self.seed = wanted, answers, base, batch_size, seed
        self.cache = cache
        self.found: dict[str, dict[str, AnswerLogprobs]] = {key: {} for key in answers}

    def take(self, name: str, model: "PreTrainedModel") -> None:
        """Measure a model."""
        for key, answers in self.answers.items():
            totals = kept_logprobs(self.cache, model, answers.sequences, batch_size=self.batch_size)
            self.found[key][name] = AnswerLogprobs(totals, answers.sequences.response_lengths)

    def sections(self, names: list[str]) -> list[Section]:
        """Return a section of all sets; none where there are no sets."""
        if not self.wanted:
            return []
        summaries = {key: self._summaries(key, names) for key in self.wanted}
        note = (
            "How likely each model finds given answers, teacher-forced at temperature 1, the stop token included. The "
            "answer mean gives every answer the same weight, the token mean every token; intervals are by bootstrap "
            f"over answers. {self._counted()}."
        )
        return [
            Section(
                key="likelihood",
                title="Likelihood of given answers",
                note=note,
                columns=names,
                rows=[row for key in self.wanted for row in _rows(key, list(summaries[key].values()), self.base)],
                figures=[self._figure(key, summaries[key]) for key in self.wanted],
                data={key: self._data(key, summaries[key]) for key in self.wanted},
            )
        ]

    def _counted(self) -> str:
        sets = self.answers.items()
        return "; ".join(counted(key, len(of.sequences.lengths), of.available, of.counts) for key, of in sets)

    def _summaries(self, key: str, names: list[str]) -> dict[str, LikelihoodSummary]:
        found = self.found[key]
        return {
            name: summarize_likelihood(found[name], None if name == self.base else found[self.base], seed=self.seed)
            for name in names
        }

    def _figure(self, key: str, summaries: Mapping[str, LikelihoodSummary]) -> Figure:
        colors = colors_of(list(summaries), self.base)
        rows = [
            Distribution(name, self.found[key][name].means.tolist(), summary.per_answer, colors[name])
            for name, summary in sorted(summaries.items(), key=lambda item: item[0] != self.base)
        ]
        return distribution_figure(
            rows, title=f"{key}: share of answers by mean log-probability", x_label="nats a token"
        )

    def _data(self, key: str, summaries: Mapping[str, LikelihoodSummary]) -> dict[str, Any]:
        answers = self.answers[key]
        return {
            **self.wanted[key].as_dict(),
            "answers": len(answers.sequences.lengths),
            "tokens": int(answers.sequences.response_lengths.sum()),
            "available": answers.available,
            "counts": answers.counts,
            "models": dict(summaries),
        }


def _rows(key: str, summaries: list[LikelihoodSummary], base: str) -> list[TableRow]:
    rows = [
        TableRow(f"{key}: answer mean", "nats a token", "number", [summary.per_answer for summary in summaries]),
        TableRow(
            f"{key}: difference", f"answer mean, to {base}, paired", "difference", [s.difference for s in summaries]
        ),
        TableRow(f"{key}: token mean", "nats a token", "number", [summary.per_token for summary in summaries]),
        TableRow(f"{key}: perplexity", "of a token", "number", [summary.perplexity for summary in summaries]),
    ]
    return [row for row in rows if any(cell is not None for cell in row.cells)]


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf  # what a float64 holds

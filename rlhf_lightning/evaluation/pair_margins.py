"""Which side of a preference pair a policy favours, by itself and measured from its reference."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_lightning.evaluation.answer_sets import EncodedPairs, PairSet, counted, read_pairs
from rlhf_lightning.evaluation.cache import NOTHING_KEPT, ResultCache
from rlhf_lightning.evaluation.formatting import Kind, TableRow
from rlhf_lightning.evaluation.generations import sequence_logprobs
from rlhf_lightning.evaluation.plots import Distribution
from rlhf_lightning.evaluation.sections import Figure, Section, colors_of, distribution_figure
from rlhf_lightning.evaluation.statistics import Interval, bootstrap_mean, quantiles, win_rate
from rlhf_lightning.functional.sequences import SequenceBatch, length_sorted
from rlhf_lightning.metrics import QUANTILES
from rlhf_lightning.models.digests import tensors_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Sides(NamedTuple):
    """What a model says of both sides of pairs.

    Attributes:
        chosen: Log-probability of each chosen answer, nats, shape (pairs,), float64.
        rejected: Of each rejected one.
    """

    chosen: Tensor
    rejected: Tensor

    def minus(self, other: "Sides") -> "Sides":
        """Return the log-ratios of this model to another."""
        return Sides(self.chosen - other.chosen, self.rejected - other.rejected)

    def per_token(self, lengths: "Sides") -> "Sides":
        """Return these over the tokens of each answer."""
        return Sides(self.chosen / lengths.chosen, self.rejected / lengths.rejected)

    @property
    def margins(self) -> Tensor:
        """Chosen minus rejected, shape (pairs,)."""
        return self.chosen - self.rejected


@dataclass(frozen=True)
class MarginSummary:
    """Which side has more, and by how much; intervals are 95 %, over pairs.

    Attributes:
        margin: Mean of chosen minus rejected.
        accuracy: Share of pairs whose chosen side has more; ties count as half.
        std: Standard deviation of the margins.
        quantiles: Of the margins.
    """

    margin: Interval
    accuracy: Interval
    std: float
    quantiles: dict[str, float]

    @classmethod
    def of(cls, sides: Sides, *, seed: int = 0) -> "MarginSummary":
        """Summarize the two sides of pairs."""
        return cls(
            margin=bootstrap_mean(sides.margins, seed=seed),
            accuracy=win_rate(sides.chosen, sides.rejected),
            std=float(sides.margins.std(correction=0)),
            quantiles=quantiles(sides.margins, QUANTILES),
        )


@dataclass(frozen=True)
class PairSummary:
    """What a policy makes of preference pairs.

    Attributes:
        logprob: By log-probability of the whole answers, nats.
        logprob_per_token: By mean log-probability a token, nats: a longer answer is not at a disadvantage.
        reward: By the implicit reward log π - log π_ref (β is 1), nats; ``None`` for the reference, as what follows.
        reward_per_token: By the implicit reward over the answer's tokens, nats.
        chosen_log_ratio: Mean of log π - log π_ref of the chosen answers, nats: below 0 a policy that favours them has
            yet made them rarer.
        rejected_log_ratio: Of the rejected ones.

    References:
        Rafailov et al. 2023, "Direct Preference Optimization", eq. 5; Razin et al. 2024, "Unintentional Unalignment:
        Likelihood Displacement in Direct Preference Optimization".
    """

    logprob: MarginSummary
    logprob_per_token: MarginSummary
    reward: MarginSummary | None = None
    reward_per_token: MarginSummary | None = None
    chosen_log_ratio: Interval | None = None
    rejected_log_ratio: Interval | None = None


@torch.no_grad()
def pair_logprobs(model: nn.Module, pairs: EncodedPairs, *, batch_size: int = 32) -> Sides:
    """Return the log-probability of both sides of pairs, teacher-forced, at temperature 1.

    Args:
        model: A causal language model, in eval mode.
        pairs: See :func:`~rlhf_lightning.evaluation.answer_sets.read_pairs`.
        batch_size: Answers in one forward pass, both sides of a pair together; changes speed and memory alone.
    """
    count = len(pairs.prompts)
    found = Sides(torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64))
    for rows in length_sorted(pairs.chosen.lengths + pairs.rejected.lengths, max(1, batch_size // 2)):
        both = SequenceBatch.stack([pairs.chosen.select(rows), pairs.rejected.select(rows)])
        found.chosen[rows], found.rejected[rows] = sequence_logprobs(model, both, batch_size=2 * len(rows)).chunk(2)
    return found


def answer_lengths(pairs: EncodedPairs) -> Sides:
    """Return the tokens of both sides of pairs, to divide by."""
    return Sides(pairs.chosen.response_lengths, pairs.rejected.response_lengths)


def counted_pairs(sets: Mapping[str, EncodedPairs]) -> str:
    """Return in words how many pairs of each set are measured."""
    return "; ".join(counted(key, len(of.prompts), of.available, of.counts) for key, of in sets.items())


def summarize_pairs(own: Sides, lengths: Sides, reference: Sides | None = None, *, seed: int = 0) -> PairSummary:
    """Turn log-probabilities of pairs into margins and accuracies with intervals.

    Args:
        own: The policy's.
        lengths: Tokens of the answers.
        reference: The reference's; ``None`` leaves out what is measured from it.
        seed: Fixes the resamples.

    Raises:
        ValueError: If there are no pairs or a number is not finite.

    Example:
        >>> own = Sides(torch.tensor([-2.0]), torch.tensor([-3.0]))
        >>> found = summarize_pairs(own, Sides(torch.tensor([1]), torch.tensor([3])))
        >>> found.logprob.margin.mean, found.logprob_per_token.margin.mean
        (1.0, -1.0)
    """
    plain = (MarginSummary.of(own, seed=seed), MarginSummary.of(own.per_token(lengths), seed=seed))
    if reference is None:
        return PairSummary(*plain)
    ratios = own.minus(reference)
    return PairSummary(
        *plain,
        reward=MarginSummary.of(ratios, seed=seed),
        reward_per_token=MarginSummary.of(ratios.per_token(lengths), seed=seed),
        chosen_log_ratio=bootstrap_mean(ratios.chosen, seed=seed),
        rejected_log_ratio=bootstrap_mean(ratios.rejected, seed=seed),
    )


def evaluate_pairs(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    sets: Mapping[str, PairSet],
    *,
    reference: "PreTrainedModel | None" = None,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, PairSummary]:
    """Measure which side of named sets of pairs a policy favours.

    Args:
        model: A causal language model, in eval mode.
        tokenizer: Its tokenizer.
        sets: What to measure, by name.
        reference: What implicit rewards are measured from; it shares the tokenizer. ``None`` leaves them out.
        batch_size: Answers in one forward pass.
        seed: Fixes which rows are drawn, and the intervals.

    Returns:
        A summary by the name of the set.

    Raises:
        UserError: If a set cannot be read.
    """
    found = {}
    for name, wanted in sets.items():
        pairs = read_pairs(wanted, tokenizer, seed=seed, where=f"pairs.{name}")
        own = pair_logprobs(model, pairs, batch_size=batch_size)
        other = None if reference is None else pair_logprobs(reference, pairs, batch_size=batch_size)
        found[name] = summarize_pairs(own, answer_lengths(pairs), other, seed=seed)
    return found


class PairMargins:
    """The part of a comparison that measures policies on pairs.

    Args:
        wanted: What to measure, by name.
        pairs: The same in tokens.
        base: Name of the model that implicit rewards are measured from.
        batch_size: Answers in one forward pass.
        seed: Fixes the intervals.
        cache: Where log-probabilities are kept.
    """

    def __init__(
        self,
        wanted: Mapping[str, PairSet],
        pairs: Mapping[str, EncodedPairs],
        *,
        base: str,
        batch_size: int,
        seed: int,
        cache: ResultCache = NOTHING_KEPT,
    ) -> None:
        self.wanted, self.pairs, self.base, self.batch_size, self.seed = wanted, pairs, base, batch_size, seed
        self.cache = cache
        self.found: dict[str, dict[str, Sides]] = {key: {} for key in pairs}

    def take(self, name: str, model: "PreTrainedModel") -> None:
        """Measure a model."""
        for key, pairs in self.pairs.items():
            self.found[key][name] = self._kept(model, pairs)

    def sections(self, names: list[str]) -> list[Section]:
        """Return a section of all sets; none where there are no sets."""
        if not self.pairs:
            return []
        summaries = {key: self._summaries(key, names) for key in self.pairs}
        note = (
            f"Which side of a preference pair each model favours: by its implicit reward, log π - log π_{self.base} "
            f"(β is 1), and by log-probability alone. A tie counts half. {counted_pairs(self.pairs)}."
        )
        return [
            Section(
                key="pairs",
                title="Preference pairs",
                note=note,
                columns=names,
                rows=[row for key in self.pairs for row in _rows(key, list(summaries[key].values()))],
                figures=[figure for key in self.pairs for figure in self._figures(key, summaries[key])],
                data={key: self._data(key, summaries[key]) for key in self.pairs},
            )
        ]

    def _kept(self, model: "PreTrainedModel", pairs: EncodedPairs) -> Sides:
        """Return :func:`pair_logprobs`, or find what they were before."""

        def make() -> dict[str, Tensor]:
            return pair_logprobs(model, pairs, batch_size=self.batch_size)._asdict()

        def inputs() -> list[str]:
            tokens = [tensors_digest(side._asdict()) for side in (pairs.chosen, pairs.rejected)]
            return [self.cache.model(model), *tokens, model.device.type]

        return Sides(**self.cache.get("pair_logprobs", inputs, make))

    def _summaries(self, key: str, names: list[str]) -> dict[str, PairSummary]:
        found, lengths = self.found[key], answer_lengths(self.pairs[key])
        reference = found[self.base]
        return {
            name: summarize_pairs(found[name], lengths, None if name == self.base else reference, seed=self.seed)
            for name in names
        }

    def _figures(self, key: str, summaries: Mapping[str, PairSummary]) -> list[Figure]:
        """Draw margins: of the implicit rewards, and of log-probability a token, the base's among them."""
        found, lengths = self.found[key], answer_lengths(self.pairs[key])
        rewards = {name: summary.reward for name, summary in summaries.items() if summary.reward is not None}
        ratios = {name: found[name].minus(found[self.base]) for name in rewards}
        plain = {name: summary.logprob_per_token for name, summary in summaries.items()}
        means = {name: found[name].per_token(lengths) for name in plain}
        drawn = [
            (rewards, ratios, "implicit reward, chosen minus rejected", "nats"),
            (plain, means, "mean log-probability, chosen minus rejected", "nats a token"),
        ]
        colors = colors_of(list(summaries), self.base)
        figures = []
        for margins, sides, what, unit in drawn:
            names = sorted(margins, key=lambda name: name != self.base)
            rows = [Distribution(n, sides[n].margins.tolist(), margins[n].margin, colors[n]) for n in names]
            if rows:
                figures.append(distribution_figure(rows, title=f"{key}: share of pairs by {what}", x_label=unit))
        return figures

    def _data(self, key: str, summaries: Mapping[str, PairSummary]) -> dict[str, Any]:
        pairs = self.pairs[key]
        return {
            **self.wanted[key].as_dict(),
            "pairs": len(pairs.prompts),
            "available": pairs.available,
            "counts": pairs.counts,
            "models": dict(summaries),
        }


def _rows(key: str, summaries: list[PairSummary]) -> list[TableRow]:
    def row(label: str, note: str, kind: Kind, cells: list[Interval | None]) -> TableRow:
        return TableRow(f"{key}: {label}", note, kind, list(cells))

    rewards, per_token = ([getattr(s, name) for s in summaries] for name in ("reward", "reward_per_token"))
    rows = [
        row("accuracy", "by implicit reward", "share", [r and r.accuracy for r in rewards]),
        row("margin", "of implicit rewards, nats", "difference", [r and r.margin for r in rewards]),
        row("margin a token", "of implicit rewards, nats", "difference", [r and r.margin for r in per_token]),
        row("chosen", "log-ratio to the base, nats", "difference", [s.chosen_log_ratio for s in summaries]),
        row("rejected", "log-ratio to the base, nats", "difference", [s.rejected_log_ratio for s in summaries]),
        row("plain accuracy", "by log-probability", "share", [s.logprob.accuracy for s in summaries]),
        row("plain margin", "of log-probabilities, nats", "difference", [s.logprob.margin for s in summaries]),
        row(
            "plain accuracy a token",
            "by mean log-probability",
            "share",
            [s.logprob_per_token.accuracy for s in summaries],
        ),
        row(
            "plain margin a token",
            "of mean log-probabilities, nats",
            "difference",
            [s.logprob_per_token.margin for s in summaries],
        ),
    ]
    return [one for one in rows if any(cell is not None for cell in one.cells)]

"""How well rewards tell the better side of preference pairs, how sure they may be, and what misleads them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.evaluation.answer_sets import EncodedPairs, PairSet, read_pairs
from rlhf_lightning.evaluation.cache import NOTHING_KEPT, ResultCache
from rlhf_lightning.evaluation.calibration import Calibration, calibrate
from rlhf_lightning.evaluation.formatting import Kind, TableRow
from rlhf_lightning.evaluation.judges import Judges
from rlhf_lightning.evaluation.pair_margins import MarginSummary, Sides, answer_lengths, counted_pairs
from rlhf_lightning.evaluation.plots import COLORS, Distribution, Series, line_chart
from rlhf_lightning.evaluation.sections import NARROW, WIDE, Figure, Section, distribution_figure
from rlhf_lightning.evaluation.statistics import Interval, correlation, share_interval, win_rate
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.rollout.reward_sources import RewardSource, ScoringBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Part(NamedTuple):
    """How well a reward does on some of the pairs.

    Attributes:
        pairs: How many they are.
        accuracy: Share of them whose chosen side scores higher, ties as half; ``None`` where there are none.
    """

    pairs: int
    accuracy: Interval | None


class LengthBias(NamedTuple):
    """What a reward has to do with length, in tokens of the policy.

    Attributes:
        chosen_longer: Pairs whose chosen answer is the longer one.
        chosen_shorter: Pairs whose chosen answer is the shorter one: much lower here than there is a bias to length.
        same_length: The rest.
        longer_is_chosen: Accuracy of one who takes the longer answer, ties as half: the yardstick.
        correlation: Of the margin in score with the difference in length; ``None`` where either is constant.
    """

    chosen_longer: Part
    chosen_shorter: Part
    same_length: Part
    longer_is_chosen: Interval
    correlation: Interval | None


@dataclass(frozen=True)
class RewardPairSummary:
    """What a reward makes of preference pairs; intervals are 95 %, over pairs.

    Attributes:
        scores: Margin and accuracy of its scores.
        ties: Share of pairs with two equal scores.
        calibration: Whether its margins state probabilities.
        length: What it has to do with length.
        groups: Accuracy by the values of a column, where one is named.
    """

    scores: MarginSummary
    ties: Interval
    calibration: Calibration
    length: LengthBias
    groups: dict[str, Part]


def score_pairs(
    reward: RewardSource,
    pairs: EncodedPairs,
    *,
    device: torch.device | str = "cpu",
    cache: ResultCache = NOTHING_KEPT,
) -> Sides:
    """Return the scores of both sides of pairs, shape (pairs,), float64 each, on the CPU.

    Args:
        reward: Set up already.
        pairs: See :func:`~rlhf_lightning.evaluation.answer_sets.read_pairs`; in the tokens that it was set up with.
        device: Where it runs.
        cache: Where scores are kept.

    Raises:
        UserError: If there is not one finite number for each answer.
    """
    judges, scores = Judges(reward, {}, cache=cache), []
    for side, texts, finished in zip((pairs.chosen, pairs.rejected), pairs.texts, pairs.finished, strict=True):
        there = SequenceBatch(*(tensor.to(device) for tensor in side))
        found = judges.judge(ScoringBatch(there, finished.to(device), pairs.prompts, texts, pairs.rows)).scores
        assert found is not None
        scores.append(found.double())
    return Sides(*scores)


def summarize_rewards(
    scores: Sides, lengths: Sides, groups: list[str] | None = None, *, seed: int = 0
) -> RewardPairSummary:
    """Turn scores of pairs into accuracy, calibration and bias to length.

    Args:
        scores: Of both sides.
        lengths: Tokens of both sides.
        groups: Of each pair; ``None`` tells none apart.
        seed: Fixes the resamples.

    Raises:
        ValueError: If there are no pairs or a score is not finite.

    Example:
        >>> scores = Sides(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0]))
        >>> found = summarize_rewards(scores, Sides(torch.tensor([5, 2]), torch.tensor([3, 4])))
        >>> found.scores.accuracy.mean, found.length.chosen_longer.accuracy.mean, found.length.longer_is_chosen.mean
        (0.5, 1.0, 0.5)
    """
    return RewardPairSummary(
        scores=MarginSummary.of(scores, seed=seed),
        ties=share_interval((scores.margins == 0).double()),
        calibration=calibrate(scores.margins, seed=seed),
        length=length_bias(scores, lengths, seed=seed),
        groups={
            group: _part(scores, torch.tensor([own == group for own in groups])) for group in sorted(set(groups or []))
        }
        if groups
        else {},
    )


def length_bias(scores: Sides, lengths: Sides, *, seed: int = 0) -> LengthBias:
    """Measure what scores have to do with length.

    Args:
        scores: Of both sides.
        lengths: Tokens of both sides.
        seed: Fixes the resamples.
    """
    difference = lengths.margins
    return LengthBias(
        chosen_longer=_part(scores, difference > 0),
        chosen_shorter=_part(scores, difference < 0),
        same_length=_part(scores, difference == 0),
        longer_is_chosen=win_rate(lengths.chosen, lengths.rejected),
        correlation=correlation(scores.margins, difference, seed=seed),
    )


def evaluate_rewards(
    rewards: Mapping[str, RewardSource],
    tokenizer: "PreTrainedTokenizerBase",
    sets: Mapping[str, PairSet],
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, dict[str, RewardPairSummary]]:
    """Measure how well rewards tell the better side of named sets of pairs.

    Args:
        rewards: By name.
        tokenizer: Of the policy: what lengths are measured in, and what a reward of other tokens translates from.
        sets: What to measure, by name.
        device: Where the rewards run.
        seed: Fixes which rows are drawn, and the intervals.

    Returns:
        Summaries by the name of the set, and there by the name of the reward.

    Raises:
        UserError: If a set cannot be read, or a reward does not give a finite number for each answer.
    """
    for reward in rewards.values():
        Judges(reward, {}).setup(tokenizer, torch.device(device))
    found = {}
    for key, wanted in sets.items():
        pairs = read_pairs(wanted, tokenizer, seed=seed, where=f"pairs.{key}")
        lengths = answer_lengths(pairs)
        found[key] = {
            name: summarize_rewards(score_pairs(reward, pairs, device=device), lengths, pairs.groups, seed=seed)
            for name, reward in rewards.items()
        }
    return found


class RewardsOnPairs:
    """The part of a comparison that measures rewards on pairs.

    Args:
        wanted: The sets, by name.
        pairs: The same in tokens.
        rewards: By name, set up already.
        device: Where they run.
        seed: Fixes the intervals.
        cache: Where scores are kept.
    """

    def __init__(
        self,
        wanted: Mapping[str, PairSet],
        pairs: Mapping[str, EncodedPairs],
        rewards: Mapping[str, RewardSource],
        *,
        device: torch.device,
        seed: int,
        cache: ResultCache = NOTHING_KEPT,
    ) -> None:
        self.wanted, self.pairs, self.rewards, self.device, self.seed = wanted, pairs, rewards, device, seed
        self.cache = cache

    def take(self, name: str, model: "PreTrainedModel") -> None:
        """Do nothing: rewards are judged without a policy."""

    def sections(self, names: list[str]) -> list[Section]:
        """Score the pairs, and return a section of all sets; none without sets or rewards."""
        if not self.pairs or not self.rewards:
            return []
        scores = {
            key: {
                name: score_pairs(reward, pairs, device=self.device, cache=self.cache)
                for name, reward in self.rewards.items()
            }
            for key, pairs in self.pairs.items()
        }
        found = {key: self._summaries(key, sides) for key, sides in scores.items()}
        note = (
            "Whether a reward scores the chosen side of a pair higher, and whether the sigmoid of its margin is the "
            "share that it gets right. A tie counts half; lengths are in tokens of the policy. "
            f"{counted_pairs(self.pairs)}."
        )
        return [
            Section(
                key="reward_models",
                title="Rewards on preference pairs",
                note=note,
                columns=list(self.rewards),
                rows=[row for key, summaries in found.items() for row in _rows(key, list(summaries.values()))],
                figures=[figure for key in found for figure in _figures(key, found[key], scores[key])],
                data={key: self._data(key, summaries) for key, summaries in found.items()},
            )
        ]

    def _summaries(self, key: str, sides: Mapping[str, Sides]) -> dict[str, RewardPairSummary]:
        pairs = self.pairs[key]
        lengths = answer_lengths(pairs)
        return {
            name: summarize_rewards(scores, lengths, pairs.groups, seed=self.seed) for name, scores in sides.items()
        }

    def _data(self, key: str, summaries: Mapping[str, RewardPairSummary]) -> dict[str, Any]:
        pairs = self.pairs[key]
        told = {"pairs": len(pairs.prompts), "available": pairs.available, "counts": pairs.counts}
        return {**self.wanted[key].as_dict(), **told, "rewards": dict(summaries)}


def _part(scores: Sides, of: Tensor) -> Part:
    count = int(of.sum())
    return Part(count, win_rate(scores.chosen[of], scores.rejected[of]) if count else None)


def _rows(key: str, summaries: list[RewardPairSummary]) -> list[TableRow]:
    def row(label: str, note: str, kind: Kind, cells: list[Any]) -> TableRow:
        return TableRow(f"{key}: {label}", note, kind, cells)

    told = [summary.calibration for summary in summaries]
    rows = [
        row("accuracy", "share of pairs", "share", [summary.scores.accuracy for summary in summaries]),
        row("margin", "mean, score", "number", [summary.scores.margin for summary in summaries]),
        row("log-loss", "nats; 0.693 knows nothing", "number", [one.log_loss for one in told]),
        row("Brier score", "0.25 knows nothing", "number", [one.brier for one in told]),
        row("calibration error", "expected, by bins of confidence", "share", [one.expected_error for one in told]),
        row("best temperature", "above 1: too sure", "number", [one.temperature for one in told]),
        *_length_rows(key, [summary.length for summary in summaries]),
    ]
    for group, part in summaries[0].groups.items():
        cells = [summary.groups[group].accuracy for summary in summaries]
        rows.append(row(f"accuracy, {group}", f"{part.pairs} pairs", "share", cells))
    return [one for one in rows if any(cell is not None for cell in one.cells)]


def _length_rows(key: str, lengths: list[LengthBias]) -> list[TableRow]:
    rows = []
    for name, label in (("chosen_longer", "chosen is longer"), ("chosen_shorter", "chosen is shorter")):
        parts: list[Part] = [getattr(length, name) for length in lengths]
        cells: list[Interval | float | None] = [part.accuracy for part in parts]
        rows.append(TableRow(f"{key}: accuracy, {label}", f"{parts[0].pairs} pairs", "share", cells))
    yardstick: list[Interval | float | None] = [length.longer_is_chosen for length in lengths]
    correlations: list[Interval | float | None] = [length.correlation for length in lengths]
    return [
        *rows,
        TableRow(f"{key}: taking the longer", "accuracy of it, a yardstick", "share", yardstick),
        TableRow(f"{key}: margin and length", "correlation of the differences", "difference", correlations),
    ]


def _figures(key: str, summaries: Mapping[str, RewardPairSummary], scores: Mapping[str, Sides]) -> list[Figure]:
    colors = {name: 1 + place % (COLORS - 1) for place, name in enumerate(summaries)}
    rows = [
        Distribution(name, scores[name].margins.tolist(), summary.scores.margin, colors[name])
        for name, summary in summaries.items()
    ]
    return [
        _reliability(key, {name: summary.calibration for name, summary in summaries.items()}, colors),
        distribution_figure(rows, title=f"{key}: share of pairs by margin, chosen minus rejected", x_label="score"),
    ]


def _reliability(key: str, told: Mapping[str, Calibration], colors: Mapping[str, int]) -> Figure:
    """Draw the share that was right over the confidence, with its interval."""
    series = [Series("calibrated", [0.5, 1.0], [0.5, 1.0], color=0)]
    for name, one in told.items():
        xs, ys = [each.confidence for each in one.bins], [each.share.mean for each in one.bins]
        bounds = [(each.share.low, each.share.high) for each in one.bins]
        series.append(Series(name, xs, ys, color=colors[name], bounds=bounds))
    title = f"{key}: share of pairs in the right order, by confidence"
    sizes = ((WIDE, 320), (NARROW, 240))
    drawn = [line_chart(series, title=title, x_label="confidence", width=w, height=h) for w, h in sizes]
    return Figure(title, *drawn)

"""What looks at answers: a reward source, others beside it, and functions that return a further number for each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.cache import NOTHING_KEPT, ResultCache, as_input
from rlhf_lightning.models.digests import tensors_digest
from rlhf_lightning.rollout.reward_sources import FunctionReward, RewardSource, Scores, ScoringBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Judgement(NamedTuple):
    """What the judges say, on the CPU.

    Attributes:
        scores: By the reward source, shape (rows,), float32; ``None`` where there is none.
        score_parts: Each reward behind the score by name, shape (rows,); empty unless there are several.
        metrics: Further numbers by name, shape (rows,), float32.
        others: Scores by the further reward sources, by name, shape (rows,), float32.
    """

    scores: Tensor | None
    score_parts: dict[str, Tensor]
    metrics: dict[str, Tensor]
    others: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class Judges:
    """What looks at the answers.

    Attributes:
        reward: Gives the score; ``None`` where there is none.
        metrics: Give further numbers, by name.
        others: Give scores of their own, by name: reward sources that were not used in training.
        cache: Where scores are kept.
    """

    reward: RewardSource | None
    metrics: dict[str, RewardSource]
    others: dict[str, RewardSource] = field(default_factory=dict)
    cache: ResultCache = NOTHING_KEPT
    _digests: dict[RewardSource, str | None] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def build(
        cls,
        reward: RewardSource | None,
        text_metrics: dict[str, str] | None,
        others: dict[str, RewardSource] | None = None,
        cache: ResultCache = NOTHING_KEPT,
    ) -> "Judges":
        """Load the functions of the text metrics.

        Args:
            reward: The reward source.
            text_metrics: Import path of a reward function by the name of the metric.
            others: Further reward sources by the name that the report calls them.
            cache: Where scores are kept.

        Raises:
            UserError: If a function cannot be loaded, or a reward cannot score.
        """
        named = {"reward": reward} | {f"judges.{name}": judge for name, judge in (others or {}).items()}
        for key, source in named.items():
            if (source is not None or key != "reward") and not callable(getattr(source, "score", None)):
                raise UserError(
                    f"{key} is a {type(source).__name__}, which has no score(); give a RewardSource such as "
                    "RewardModel, FunctionReward or WeightedSum."
                )
        metrics: dict[str, RewardSource] = {
            name: FunctionReward(function, name=name) for name, function in (text_metrics or {}).items()
        }
        return cls(reward, metrics, others or {}, cache)

    @property
    def rewards(self) -> dict[str, RewardSource]:
        """All reward sources by name: the reward by its own, and the further ones."""
        own = {} if self.reward is None else {self.reward.name: self.reward}
        return own | {f"{name} (judge)" if name in own else name: judge for name, judge in self.others.items()}

    def setup(self, tokenizer: "PreTrainedTokenizerBase", device: torch.device) -> None:
        """Load what scoring needs."""
        for source in self.rewards.values():
            source.setup(tokenizer)
            source.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def judge(self, batch: ScoringBatch) -> Judgement:
        """Return score and metrics of each response.

        Raises:
            UserError: If there is not one finite number for each response.
        """
        count = len(batch.responses)
        metrics = {
            name: _numbers(f"text metric {name!r}", metric.score(batch).total, count)
            for name, metric in self.metrics.items()
        }
        others = {
            name: _numbers(f"judge {name!r}", self._scores(judge, batch).total, count)
            for name, judge in self.others.items()
        }
        if self.reward is None:
            return Judgement(None, {}, metrics, others)
        what = f"reward {self.reward.name!r}"
        total, parts, _ = self._scores(self.reward, batch)
        several = parts if len(parts) > 1 else {}
        score_parts = {name: _numbers(f"{what}, {name}", part, count) for name, part in several.items()}
        return Judgement(_numbers(what, total, count), score_parts, metrics, others)

    def _scores(self, source: RewardSource, batch: ScoringBatch) -> Scores:
        """Return a source's scores, from the cache where it is known what they follow from."""
        if self.cache.folder is None:
            return source.score(batch)
        if source not in self._digests:
            self._digests[source] = source.digest()
        digest = self._digests[source]
        if digest is None:
            return source.score(batch)

        def score() -> dict[str, Tensor]:
            scores = source.score(batch)
            return {"total": scores.total} | {f"part {name}": part for name, part in scores.parts.items()}

        def inputs() -> list[str]:
            tokens = tensors_digest({**batch.sequences._asdict(), "finished": batch.finished})
            device = batch.finished.device.type
            return [digest, tokens, device, as_input(batch.prompts, batch.responses)]

        kept = self.cache.get("scores", inputs, score)
        parts = {name.removeprefix("part "): part for name, part in kept.items() if name.startswith("part ")}
        return Scores(kept["total"], parts)


def _numbers(what: str, values: Tensor, count: int) -> Tensor:
    if values.shape != (count,):
        raise UserError(
            f"{what} gave a tensor of shape {tuple(values.shape)} for {count} responses; expected one score each, of "
            f"shape ({count},)."
        )
    values = values.detach().float().cpu()
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise UserError(f"{what} gave {bad} of {count} scores that are not finite; mend it first.")
    return values

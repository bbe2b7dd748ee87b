"""What looks at answers: a reward source, and functions that return a further number for each."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.rollout.reward_sources import FunctionReward, RewardSource, ScoringBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Judgement(NamedTuple):
    """What the judges say, on the CPU.

    Attributes:
        scores: By the reward source, shape (rows,), float32; ``None`` where there is none.
        score_parts: Each reward behind the score by name, shape (rows,); empty unless there are several.
        metrics: Further numbers by name, shape (rows,), float32.
    """

    scores: Tensor | None
    score_parts: dict[str, Tensor]
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Judges:
    """What looks at the answers.

    Attributes:
        reward: Gives the score; ``None`` where there is none.
        metrics: Give further numbers, by name.
    """

    reward: RewardSource | None
    metrics: dict[str, RewardSource]

    @classmethod
    def build(cls, reward: RewardSource | None, text_metrics: dict[str, str] | None) -> "Judges":
        """Load the functions of the text metrics.

        Args:
            reward: The reward source.
            text_metrics: Import path of a reward function by the name of the metric.

        Raises:
            UserError: If a function cannot be loaded, or the reward cannot score.
        """
        if reward is not None and not callable(getattr(reward, "score", None)):
            raise UserError(
                f"reward is a {type(reward).__name__}, which has no score(); give a RewardSource such as RewardModel, "
                "FunctionReward or WeightedSum."
            )
        paths = (text_metrics or {}).items()
        return cls(reward, {name: FunctionReward(function, name=name) for name, function in paths})

    def setup(self, tokenizer: "PreTrainedTokenizerBase", device: torch.device) -> None:
        """Load what scoring needs."""
        if self.reward is not None:
            self.reward.setup(tokenizer)
            self.reward.eval().requires_grad_(False).to(device)

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
        if self.reward is None:
            return Judgement(None, {}, metrics)
        what = f"reward {self.reward.name!r}"
        total, parts, _ = self.reward.score(batch)
        several = parts if len(parts) > 1 else {}
        score_parts = {name: _numbers(f"{what}, {name}", part, count) for name, part in several.items()}
        return Judgement(_numbers(what, total, count), score_parts, metrics)


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

from typing import Any

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.generations import joined
from rlhf_lightning.evaluation.judges import Judges
from rlhf_lightning.rollout.reward_sources import FunctionReward, RewardSource, Scores, ScoringBatch, WeightedSum


def length(prompts: list[Any], responses: list[str]) -> list[float]:
    return [len(response) for response in responses]


def topic(prompts: list[Any], responses: list[str], topic: list[str]) -> list[float]:
    return [float(word in response) for word, response in zip(topic, responses, strict=True)]


class Fixed(RewardSource):
    """Gives whatever it was built with."""

    def __init__(self, *numbers: float) -> None:
        super().__init__()
        self.numbers = torch.tensor(numbers)

    def score(self, batch: ScoringBatch) -> Scores:
        return Scores(self.numbers, {"fixed": self.numbers})


HERE = __file__


def batch() -> ScoringBatch:
    rows = [{"topic": "tea"}, {"topic": "cake"}]
    sequences = joined([[5], [6]], [[7], [8]])
    return ScoringBatch(sequences, torch.ones(2).bool(), ["a", "b"], ["tea time", "no"], rows)


def test_score_and_metrics() -> None:
    reward = FunctionReward(f"{HERE}:length")
    judged = Judges.build(reward, {"on topic": f"{HERE}:topic"}).judge(batch())
    assert judged.scores is not None
    assert judged.scores.tolist() == [8.0, 2.0]
    assert judged.metrics["on topic"].tolist() == [1.0, 0.0]
    assert judged.score_parts == {}  # a single reward is the score itself


def test_parts_of_a_weighted_sum() -> None:
    reward = WeightedSum([FunctionReward(f"{HERE}:length"), Fixed(1.0, 0.0)], [0.5, -1.0])
    judged = Judges.build(reward, None).judge(batch())
    assert judged.scores is not None
    assert judged.scores.tolist() == [3.0, 1.0]
    assert {name: part.tolist() for name, part in judged.score_parts.items()} == {"length": [8, 2], "fixed": [1, 0]}


def test_no_reward_no_score() -> None:
    assert Judges.build(None, None).judge(batch()) == (None, {}, {})


def test_a_reward_without_score_is_refused() -> None:
    with pytest.raises(UserError, match=r"Linear, which has no score\(\)"):
        Judges.build(torch.nn.Linear(1, 1), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [((1.0,), r"shape \(1,\) for 2 responses"), ((1.0, float("nan")), "1 of 2 scores that are not finite")],
)
def test_scores_that_do_not_fit_are_refused(numbers: tuple[float, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Judges.build(Fixed(*numbers), None).judge(batch())

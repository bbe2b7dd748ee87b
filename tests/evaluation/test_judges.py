from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.cache import ResultCache
from rlhf_lightning.evaluation.generations import joined
from rlhf_lightning.evaluation.judges import Judgement, Judges
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
    assert Judges.build(None, None).judge(batch()) == Judgement(None, {}, {}, {})


def test_a_reward_without_score_is_refused() -> None:
    with pytest.raises(UserError, match=r"Linear, which has no score\(\)"):
        Judges.build(torch.nn.Linear(1, 1), None)  # type: ignore[arg-type]


def test_further_judges_give_scores_of_their_own() -> None:
    judged = Judges.build(None, None, {"a": Fixed(1.0, 2.0), "b": FunctionReward(f"{HERE}:length")}).judge(batch())
    assert {name: scores.tolist() for name, scores in judged.others.items()} == {"a": [1.0, 2.0], "b": [8.0, 2.0]}
    assert judged.scores is None


def test_a_judge_called_like_the_reward_is_told_from_it() -> None:
    reward, judge, other = Fixed(1.0, 2.0), Fixed(3.0, 4.0), Fixed(5.0, 6.0)
    judges = Judges.build(reward, None, {reward.name: judge, "other": other})
    assert judges.rewards == {"reward": reward, "reward (judge)": judge, "other": other}
    assert Judges.build(None, None, {"other": other}).rewards == {"other": other}


def test_a_further_judge_is_held_to_the_same() -> None:
    with pytest.raises(UserError, match=r"judges.a is a Linear, which has no score\(\)"):
        Judges.build(None, None, {"a": torch.nn.Linear(1, 1)})  # type: ignore[dict-item]
    with pytest.raises(UserError, match="judge 'a' gave 1 of 2 scores that are not finite"):
        Judges.build(None, None, {"a": Fixed(1.0, float("nan"))}).judge(batch())


class Counted(Fixed):
    """Counts how often it is asked."""

    asked = 0

    def __init__(self, *numbers: float, kept_by: str | None) -> None:
        super().__init__(*numbers)
        self.kept_by = kept_by

    def digest(self) -> str | None:
        return self.kept_by

    def score(self, batch: ScoringBatch) -> Scores:
        self.asked += 1
        return Scores(self.numbers, {"one": self.numbers, "two": -self.numbers})


def test_scores_are_kept_where_it_is_known_what_they_follow_from(tmp_path: Path) -> None:
    for kept_by, expected in ((None, 2), ("digest", 1), ("another", 1)):
        source = Counted(3.0, 4.0, kept_by=kept_by)
        judges = Judges.build(source, None, cache=ResultCache(tmp_path))
        first, again = judges.judge(batch()), judges.judge(batch())
        assert source.asked == expected
        assert first.scores is not None
        assert again.scores is not None
        assert first.scores.tolist() == again.scores.tolist() == [3.0, 4.0]
        assert again.score_parts["two"].tolist() == [-3.0, -4.0]
    judges.judge(batch()._replace(responses=["other", "texts"]))
    judges.judge(batch()._replace(finished=torch.zeros(2).bool()))
    assert source.asked == 3


@pytest.mark.parametrize(
    ("numbers", "message"),
    [((1.0,), r"shape \(1,\) for 2 responses"), ((1.0, float("nan")), "1 of 2 scores that are not finite")],
)
def test_scores_that_do_not_fit_are_refused(numbers: tuple[float, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Judges.build(Fixed(*numbers), None).judge(batch())

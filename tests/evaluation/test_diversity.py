import math

import pytest
import torch

from rlhf_lightning.evaluation.diversity import diversity_section, repeated_share
from rlhf_lightning.evaluation.generations import Generations
from rlhf_lightning.evaluation.judged import judged_section
from rlhf_lightning.evaluation.judges import Judgement
from rlhf_lightning.evaluation.sections import Section
from rlhf_lightning.evaluation.statistics import Interval, share_interval


def answers(name: str, responses: list[str], kl: float, scores: list[float]) -> Generations:
    count = len(responses)
    return Generations(
        name=name,
        path=name,
        responses=responses,
        lengths=torch.tensor([2, 4, 6, 8]),
        finished=torch.ones(count).bool(),
        kl=torch.full((count,), kl, dtype=torch.float64),
        judgement=Judgement(None, {}, {}, {"strict": torch.tensor(scores)}),
        repetition=torch.tensor([0.0, 0.0, 0.5, 0.5]),
    )


BASE = answers("base", ["a b", "c d", "e f", "g h"], 0.0, [0.0, 1.0, 2.0, 3.0])
PPO = answers("ppo", ["a b a b", "a b a b", " ", "c"], 5.0, [1.0, 1.0, 1.0, 4.0])


def cells(section: Section) -> dict[tuple[str, str], list[float | None]]:
    """Return the means by label and the beginning of the note."""
    return {
        (row.label, row.note.split(" ")[0]): [cell.mean if isinstance(cell, Interval) else cell for cell in row.cells]
        for row in section.rows
    }


def test_diversity_by_hand() -> None:
    section = diversity_section([BASE, PPO], "base")
    found = cells(section)
    assert section.columns == ["base", "ppo"]
    assert found["Length", "tokens"] == [5.0, 5.0]
    assert found["Length", "words"] == [2.0, 2.25]
    assert found["Repetition", "of"] == [0.25, 0.25]
    assert found["Distinct-1", "different"] == [1.0, 3 / 9]  # a, b and c among nine words
    assert found["Distinct-2", "different"] == [1.0, 2 / 6]  # ab and ba among six pairs
    assert found["Distinct-3", "different"] == [pytest.approx(math.nan, nan_ok=True), 2 / 4]  # aba, bab; none in pairs
    assert found["Empty", "share"] == [0.0, 0.25]
    assert found["Exact repeats", "share"] == [0.0, 0.25]
    assert found["KL per token", "to"] == [None, 1.0]  # 20 nats over 20 tokens
    interval = section.data["ppo"]["kl_per_token"]
    assert 5 / 8 <= interval.low < 1.0 < interval.high <= 5 / 2  # of the longest answer alone, and of the shortest


def test_the_base_alone_has_no_kl() -> None:
    assert ("KL per token", "to") not in cells(diversity_section([BASE], "base"))


def test_repeats_are_counted_from_the_second_on() -> None:
    assert repeated_share(["a", "a", "a", "b"]) == 0.5
    assert repeated_share(["a", "b"]) == 0.0


def test_further_judges_by_hand() -> None:
    section = judged_section([PPO, BASE], "base")
    assert section is not None
    found = cells(section)
    assert found["strict", "mean"] == [1.75, 1.5]
    assert found["strict", "difference"] == [0.25, None]  # 1, 0, -1, 1
    assert found["strict", "win"] == [0.625, None]  # two wins and a tie of four
    assert [row.kind for row in section.rows] == ["number", "difference", "share"]
    assert section.data["strict"]["base"]["score_std"] == pytest.approx(1.25**0.5)


def test_a_judge_of_yes_and_no_gives_shares() -> None:
    voiced = [
        Generations(
            **{**vars(answer), "judgement": Judgement(None, {}, {}, {"voice": torch.tensor([0.0, 1.0, 1.0, 1.0])})}
        )
        for answer in (BASE, PPO)
    ]
    section = judged_section(voiced, "base")
    assert section is not None
    assert section.rows[0].kind == "share"
    assert section.rows[0].cells[0] == share_interval(torch.tensor([0.0, 1.0, 1.0, 1.0]))


def test_without_further_judges_there_is_no_section() -> None:
    alone = [Generations(**{**vars(answer), "judgement": Judgement(None, {}, {})}) for answer in (BASE, PPO)]
    assert judged_section(alone, "base") is None

import torch

from rlhf_lightning.evaluation.generations import Generations
from rlhf_lightning.evaluation.judges import Judgement
from rlhf_lightning.evaluation.summary import headline, summarize, table_rows


def answers(name: str, scores: list[float] | None, kl: float = 0.0) -> Generations:
    count = 4
    return Generations(
        name=name,
        path=f"runs/{name}",
        responses=["a b", "a b", "a c", "d"],
        lengths=torch.tensor([2, 2, 3, 5]),
        finished=torch.tensor([True, True, True, False]),
        kl=torch.full((count,), kl, dtype=torch.float64),
        judgement=Judgement(
            None if scores is None else torch.tensor(scores), {}, {"voice": torch.tensor([1.0, 0.0, 0.0, 1.0])}
        ),
        repetition=torch.zeros(count),
    )


BASE = answers("base", [0.0, 1.0, 2.0, 3.0])
TUNED = answers("ppo", [4.0, 1.0, 3.0, 4.0], kl=6.0)


def test_summary_by_hand() -> None:
    found = summarize(TUNED, BASE)
    assert found.score is not None
    assert found.score_difference is not None
    assert found.win_rate is not None
    assert found.score.mean == 3.0
    assert found.score_std == 1.5**0.5  # squares of 1, -2, 0, 1 over 4
    assert found.score_difference.mean == 1.5  # 4, 0, 1, 1 over 4
    assert found.win_rate.mean == 0.875  # three wins and a tie
    assert (found.kl.mean, found.kl_per_token.mean) == (6.0, 2.0)  # 24 nats over 12 tokens
    assert (found.length.mean, found.finished.mean, found.metrics["voice"].mean) == (3.0, 0.75, 0.5)
    assert found.distinct_2 == 2 / 3
    assert found.score_quantiles["median"] == 3.5


def test_the_base_has_no_difference_to_itself() -> None:
    found = summarize(BASE, BASE)
    assert found.score_difference is None
    assert found.win_rate is None
    assert found.kl == (0.0, 0.0, 0.0)
    alone = [row.label for row in table_rows([found], [BASE], "base", {})]
    assert alone == ["Score", "voice", "Length", "Finished", "Distinct-2"]  # what needs a second model is left out


def test_table_rows_say_what_they_are() -> None:
    models = [summarize(answer, BASE) for answer in (BASE, TUNED)]
    rows = {row.label: row for row in table_rows(models, [BASE, TUNED], "base", {})}
    assert list(rows)[:4] == ["Score", "Difference in score", "Win rate", "voice"]
    assert rows["voice"].kind == "share"  # every value is 0 or 1
    assert rows["Score"].kind == "number"
    assert rows["KL divergence"].cells[0] is None
    assert rows["Win rate"].cells[0] is None
    assert "Training" not in rows
    timed = {row.label: row for row in table_rows(models, [BASE, TUNED], "base", {"ppo": 12.5, "another run": 3.0})}
    assert timed["Training"].cells == [None, 12.5]


def test_without_a_reward_there_are_no_scores() -> None:
    base, tuned = answers("base", None), answers("ppo", None, kl=2.0)
    models = [summarize(answer, base) for answer in (base, tuned)]
    assert table_rows(models, [base, tuned], "base", {})[0].label == "voice"
    assert headline(models[1], models[0]) == "ppo answers at a KL divergence of 2.00 nats a response from base."


def test_headline_says_what_the_interval_allows() -> None:
    base = summarize(BASE, BASE)
    same = answers("same", [1.0, 0.0, 3.0, 2.0])  # +1, -1, +1, -1
    assert "scores like base" in headline(summarize(same, BASE), base)
    better = summarize(answers("ppo", [10.0, 11.0, 12.0, 13.0], kl=3.0), BASE)
    assert headline(better, base) == (
        "ppo scores 10.0 above base (8.9 standard deviations of base's scores) and wins 100.0 % of the prompts, "
        "at a KL divergence of 3.00 nats a response."
    )
    worse = summarize(answers("bad", [-1.0, 0.0, 1.0, 2.0]), BASE)
    assert "bad scores 1.00 below base" in headline(worse, base)

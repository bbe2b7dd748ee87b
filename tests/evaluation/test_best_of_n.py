import itertools
import math
from typing import Any

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.best_of_n import (
    BestOfN,
    best_of_groups,
    best_of_n_kl,
    best_of_n_section,
    best_of_n_weights,
    check_best_of,
    measure_best_of_n,
)
from rlhf_lightning.evaluation.generations import Bench, Generations
from rlhf_lightning.evaluation.judges import Judges
from rlhf_lightning.evaluation.prompts import PromptSet
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.rollout.collect import decode_responses
from rlhf_lightning.rollout.reward_sources import FunctionReward
from rlhf_lightning.rollout.sampler import SamplingConfig
from rlhf_lightning.seeding import derive_seed


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_weights_give_the_mean_over_all_subsets_of_the_best(n: int) -> None:
    scores = torch.tensor([[0.3, -1.0, 2.5, 0.7, 0.1], [4.0, 3.0, 2.0, 1.0, 0.0]])
    other = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 1.0, 4.0, 2.0, 3.0]])  # a number that goes with a response
    weights = best_of_n_weights(scores, n)
    for row in range(2):
        best = [max(rows, key=lambda at: float(scores[row, at])) for rows in itertools.combinations(range(5), n)]
        for values in (scores, other):
            expected = sum(float(values[row, at]) for at in best) / len(best)
            assert float((weights * values)[row].sum()) == pytest.approx(expected, abs=1e-6)


def test_weights_of_equal_scores_still_sum_to_one() -> None:
    assert best_of_n_weights(torch.zeros(3, 6), 4).sum(dim=1).tolist() == pytest.approx([1.0] * 3)


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match=r"best-of-4 needs at least 4 responses .* there are 3"):
        best_of_n_weights(torch.zeros(1, 3), 4)


def test_groups_give_their_best_and_no_fewer_texts_than_a_model() -> None:
    scores = torch.tensor([[3.0, 1.0, 0.0, 2.0, 9.0], [0.0, 1.0, 3.0, 2.0, 9.0]])  # the fifth is in no pair
    assert best_of_groups(scores, 2, most=2) == [0, 3, 6, 7]
    assert best_of_groups(scores, 2, most=1) == [0, 6]
    assert best_of_groups(scores, 2, most=3) == []


def test_best_of_one_costs_nothing_and_more_costs_less_than_log_n() -> None:
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)
    assert all(best_of_n_kl(n) < best_of_n_kl(n + 1) < math.log(n + 1) for n in range(1, 20))


def longest(prompts: list[Any], responses: list[str]) -> list[float]:
    """The number of letters, and a hundred more for each prompt after the first."""
    places = ["xyz".index(prompt) for prompt in prompts]
    return [100.0 * place + len(response) for place, response in zip(places, responses, strict=True)]


def vowels(prompts: list[Any], responses: list[str]) -> list[float]:
    return [float(sum(response.count(letter) for letter in "aeiou")) for response in responses]


@pytest.fixture(scope="module")
def measured(tiny_models: dict[str, str]) -> tuple[list[BestOfN], Generations, dict[str, torch.Tensor]]:
    """Best of 1, 2 and 4 of five answers to three prompts, the base's one answer, and all numbers by prompt."""
    model = load_causal_lm(tiny_models["base"]).eval()
    prompts = PromptSet("here", ["x", "y", "z"], [{}, {}, {}], 3)
    judges = Judges.build(FunctionReward(longest), None, {"vowels": FunctionReward(vowels)})
    ids, sampling = [[1, 50, 60], [1, 70], [1, 80, 90]], SamplingConfig(max_new_tokens=6)
    bench = Bench(prompts, ids, load_tokenizer("builtin:demo"), [4], sampling, judges, torch.device("cpu"), 3, 2)
    base = bench.answer("base", "", model, model)
    found = measure_best_of_n(bench, model, base, best_of=[4, 1, 2], samples=5)
    repeated = [row for row in ids for _ in range(5)]
    sequences, _ = bench.sample(model, repeated, sampling, derive_seed(3, "best_of"))
    texts = decode_responses(bench.tokenizer, sequences)
    numbers = {"score": longest([prompt for prompt in "xyz" for _ in range(5)], texts), "vowels": vowels([], texts)}
    return found, base, {name: torch.tensor(values).view(3, 5) for name, values in numbers.items()}


def test_the_best_of_n_is_the_mean_over_all_subsets(
    measured: tuple[list[BestOfN], Generations, dict[str, torch.Tensor]],
) -> None:
    found, base, numbers = measured
    scores = numbers["score"].double()
    assert base.scores is not None
    assert [best.n for best in found] == [1, 2, 4]
    for best in found:
        means, wins = [], []
        for row, own in zip(scores, base.scores, strict=True):
            tops = [max(float(row[at]) for at in rows) for rows in itertools.combinations(range(5), best.n)]
            means += [sum(tops) / len(tops)]
            wins += [sum((top > own) + 0.5 * (top == own) for top in tops) / len(tops)]
        assert best.score.mean == pytest.approx(sum(means) / 3)
        assert best.win_rate.mean == pytest.approx(float(sum(wins)) / 3)
        assert best.difference.mean == pytest.approx(sum(means) / 3 - float(scores.mean()))
        assert best.score.low == pytest.approx(min(means))  # of three prompts, one alone is in more than 2.5 %
        assert best.kl == best_of_n_kl(best.n)
    assert found[0].others["vowels"].mean == pytest.approx(float(numbers["vowels"].mean()))


def test_the_section_has_a_column_for_each_n(
    measured: tuple[list[BestOfN], Generations, dict[str, torch.Tensor]],
) -> None:
    section = best_of_n_section(measured[0], "base", samples=5)
    assert section is not None
    assert section.columns == ["best of 1", "best of 2", "best of 4"]
    assert [row.label for row in section.rows] == [
        "Score",
        "Difference in score",
        "Win rate",
        "KL divergence",
        "vowels",
    ]
    assert section.data["points"][2]["n"] == 4
    assert best_of_n_section([], "base", samples=5) is None


@pytest.mark.parametrize(
    ("best_of", "more", "message"),
    [
        ([4], {"has_reward": False}, "best_of takes the answer of the highest score and so needs a reward"),
        ([4], {"temperature": 0.0}, "sampling.temperature is 0"),
        ([0], {}, r"best_of is \[0\]; give different numbers of at least 1"),
        ([4, 4], {}, r"best_of is \[4, 4\]; give different"),
        ([9], {}, "best_of has 9, but best_of_samples is 8; it must be at least that many"),
        ([], {"samples": 0}, "best_of_samples is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(best_of: list[int], more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_best_of(best_of, **{"samples": 8, "has_reward": True, "temperature": 1.0, **more})
    check_best_of([8], samples=8, has_reward=True, temperature=1.0)

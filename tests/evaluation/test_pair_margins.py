import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.data.collate import PairBatch
from rlhf_lightning.evaluation.answer_sets import PairSet, read_pairs
from rlhf_lightning.evaluation.pair_margins import (
    Sides,
    answer_lengths,
    evaluate_pairs,
    pair_logprobs,
    summarize_pairs,
)
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.modules.dpo import DPOModule

SETS = {"held_out": PairSet("builtin:demo/eval", limit=7, max_length=128, max_prompt_length=64)}


@pytest.fixture(scope="module")
def models(tiny_models: dict[str, str]) -> dict[str, PreTrainedModel]:
    return {name: load_causal_lm(folder).eval() for name, folder in tiny_models.items()}


@pytest.fixture(scope="module")
def tokenizer(tiny_models: dict[str, str]) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_models["base"])


def sides(chosen: list[float], rejected: list[float]) -> Sides:
    return Sides(torch.tensor(chosen).double(), torch.tensor(rejected).double())


def test_by_hand() -> None:
    own, reference = sides([-4.0, -8.0, -6.0], [-6.0, -7.0, -6.0]), sides([-5.0, -6.0, -6.0], [-5.0, -6.0, -6.0])
    found = summarize_pairs(own, sides([2.0, 8.0, 3.0], [2.0, 1.0, 6.0]), reference)
    assert found.logprob.margin.mean == pytest.approx(1 / 3)  # 2, -1, 0
    assert found.logprob.accuracy.mean == 0.5  # won, lost, tied
    assert found.logprob_per_token.margin.mean == pytest.approx((1 + 6 - 1) / 3)  # -2 + 3, -1 + 7, -2 + 1
    assert found.logprob_per_token.accuracy.mean == pytest.approx(2 / 3)
    assert found.reward is not None
    assert found.reward_per_token is not None
    assert found.reward.margin.mean == pytest.approx((2 - 1 + 0) / 3)  # 1 + 1, -2 + 1, 0
    assert found.reward.accuracy.mean == 0.5
    assert found.reward.std == pytest.approx((14 / 9) ** 0.5)  # of 2, -1 and 0
    assert found.reward_per_token.margin.mean == pytest.approx((1 + 0.75 + 0) / 3)  # 1/2 + 1/2, -2/8 + 1, 0
    assert found.chosen_log_ratio is not None
    assert found.rejected_log_ratio is not None
    assert found.chosen_log_ratio.mean == pytest.approx(-1 / 3)  # 1, -2, 0
    assert found.rejected_log_ratio.mean == pytest.approx(-2 / 3)  # -1, -1, 0
    assert summarize_pairs(own, reference).reward is None


def test_implicit_rewards_are_those_that_dpo_trains_on(
    tiny_models: dict[str, str], models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    pairs = read_pairs(SETS["held_out"], tokenizer)
    own, reference = (pair_logprobs(models[name], pairs, batch_size=4) for name in ("other", "base"))
    module = DPOModule(tiny_models["other"], reference=tiny_models["base"])
    module.configure_model()
    with torch.no_grad():
        outcome = module.eval().evaluate(PairBatch(pairs.chosen, pairs.rejected))
    rewards = own.minus(reference)
    assert rewards.chosen.float() * 0.1 == pytest.approx(outcome.reward_chosen, abs=1e-4)
    assert rewards.rejected.float() * 0.1 == pytest.approx(outcome.reward_rejected, abs=1e-4)


def test_from_python(models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> None:
    found = evaluate_pairs(models["other"], tokenizer, SETS, reference=models["base"], batch_size=3)["held_out"]
    again = evaluate_pairs(models["other"], tokenizer, SETS, batch_size=14)["held_out"]
    pairs = read_pairs(SETS["held_out"], tokenizer)
    own = pair_logprobs(models["other"], pairs)
    assert found.logprob.margin == pytest.approx(again.logprob.margin, rel=1e-4, abs=1e-4)
    assert found.logprob.margin.mean == pytest.approx(float((own.chosen - own.rejected).mean()), rel=1e-4)
    assert found.logprob_per_token.margin.mean == pytest.approx(
        float(own.per_token(answer_lengths(pairs)).margins.mean()), rel=1e-4
    )
    assert found.reward is not None
    assert again.reward is None


def test_a_policy_that_is_its_reference_favours_no_side(
    models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    found = evaluate_pairs(models["base"], tokenizer, SETS, reference=models["base"])["held_out"]
    assert found.reward is not None
    assert (found.reward.margin, found.reward.accuracy.mean) == ((0.0, 0.0, 0.0), 0.5)

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.answer_sets import LikelihoodSet, PairSet
from rlhf_lightning.evaluation.cache import ResultCache
from rlhf_lightning.evaluation.given_answers import GivenAnswers
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.rollout.reward_sources import FunctionReward

SIZES: dict[str, Any] = {"limit": 4, "max_length": 40, "max_prompt_length": 20}


def read(tokenizer: PreTrainedTokenizerBase, *, likelihood: bool = True, pairs: bool = True) -> GivenAnswers:
    return GivenAnswers.read(
        {"x": LikelihoodSet("builtin:demo/eval", **SIZES)} if likelihood else {},
        {"y": PairSet("builtin:demo/eval", **SIZES)} if pairs else {},
        tokenizer,
        seed=0,
    )


def test_a_set_that_reaches_beyond_a_model_is_named_with_it(demo_tokenizer: PreTrainedTokenizerBase) -> None:
    given = read(demo_tokenizer)
    given.refuse_too_long({"base": 40, "dpo": None})
    with pytest.raises(UserError, match=r"likelihood.x has sequences of \d+ tokens, but models.dpo reads at most 20"):
        given.refuse_too_long({"base": 40, "dpo": 20})
    with pytest.raises(UserError, match=r"lower pairs.y.max_length"):
        read(demo_tokenizer, likelihood=False).refuse_too_long({"base": 20})


@pytest.mark.parametrize(
    ("wanted", "rewards", "keys"),
    [
        ({}, True, ["likelihood", "pairs", "reward_models"]),
        ({}, False, ["likelihood", "pairs"]),
        ({"likelihood": False}, True, ["pairs", "reward_models"]),
        ({"pairs": False}, True, ["likelihood"]),
        ({"pairs": False, "likelihood": False}, True, []),
    ],
)
def test_there_is_a_section_of_each_kind_that_is_asked_for(
    tiny_models: dict[str, str],
    demo_tokenizer: PreTrainedTokenizerBase,
    wanted: dict[str, bool],
    rewards: bool,
    keys: list[str],
) -> None:
    reward = FunctionReward(lambda prompts, responses: [float(len(text)) for text in responses], name="letters")
    given = read(demo_tokenizer, **wanted)
    measures = given.measures({"letters": reward} if rewards else {}, "base", torch.device("cpu"), 4, ResultCache(None))
    model = load_causal_lm(tiny_models["base"]).eval()
    for measure in measures:
        measure.take("base", model)
    assert [section.key for measure in measures for section in measure.sections(["base"])] == keys

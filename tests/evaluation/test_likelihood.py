import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.evaluation.answer_sets import LikelihoodSet, read_answers
from rlhf_lightning.evaluation.likelihood import (
    AnswerLogprobs,
    answer_logprobs,
    evaluate_likelihood,
    summarize_likelihood,
)
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer

SETS = {"pairs": LikelihoodSet("builtin:demo/eval", limit=6, max_length=128, max_prompt_length=64)}


@pytest.fixture(scope="module")
def models(tiny_models: dict[str, str]) -> dict[str, PreTrainedModel]:
    return {name: load_causal_lm(folder).eval() for name, folder in tiny_models.items()}


@pytest.fixture(scope="module")
def tokenizer(tiny_models: dict[str, str]) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_models["base"])


def test_the_two_means_by_hand() -> None:
    # Answers of 1, 2 and 5 tokens with -1, -4 and -20 nats: -1, -2 and -4 a token.
    own = AnswerLogprobs(torch.tensor([-1.0, -4.0, -20.0]).double(), torch.tensor([1, 2, 5]))
    base = AnswerLogprobs(torch.tensor([-1.5, -4.0, -30.0]).double(), own.lengths)
    found = summarize_likelihood(own, base)
    assert found.per_answer.mean == pytest.approx(-7 / 3)
    assert found.per_token.mean == -25 / 8
    assert found.perplexity.mean == pytest.approx(math.exp(25 / 8))
    assert found.perplexity.low < found.perplexity.mean < found.perplexity.high
    assert found.std == pytest.approx(math.sqrt(14 / 9))  # (16 + 1 + 25) / 9 over 3
    assert found.quantiles["median"] == -2.0
    assert found.difference is not None
    assert found.difference_per_token is not None
    assert found.difference.mean == pytest.approx((0.5 + 0 + 2) / 3)
    assert found.difference_per_token.mean == 10.5 / 8
    alone = summarize_likelihood(own)
    assert (alone.difference, alone.difference_per_token) == (None, None)
    assert alone.per_answer == found.per_answer


def test_a_model_that_has_diverged_has_an_infinite_perplexity() -> None:
    lost = AnswerLogprobs(torch.tensor([-800.0, -1000.0]).double(), torch.tensor([1, 1]))
    assert summarize_likelihood(lost).perplexity.mean == math.inf


def test_the_base_must_have_been_given_the_same_answers() -> None:
    own, base = (AnswerLogprobs(torch.zeros(1).double(), torch.tensor([length])) for length in (1, 2))
    with pytest.raises(ValueError, match="give it the same answers"):
        summarize_likelihood(own, base)


def test_log_probabilities_are_those_of_transformers(
    models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    answers = read_answers(SETS["pairs"], tokenizer)
    found = answer_logprobs(models["other"], answers, batch_size=4)
    for row in range(6):
        first, end = int(answers.sequences.prompt_lengths[row]), int(answers.sequences.lengths[row])
        ids = answers.sequences.input_ids[row : row + 1, :end]
        with torch.no_grad():
            logprobs = models["other"](ids).logits[0].double().log_softmax(dim=-1)
        slow = sum(float(logprobs[place - 1, ids[0, place]]) for place in range(first, end))
        assert float(found.totals[row]) == pytest.approx(slow, rel=1e-5)
        assert float(found.means[row]) == pytest.approx(slow / (end - first), rel=1e-5)


def test_from_python(models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> None:
    found = evaluate_likelihood(models["other"], tokenizer, SETS, base=models["base"], batch_size=2)["pairs"]
    again = evaluate_likelihood(models["other"], tokenizer, SETS, batch_size=6)["pairs"]
    base = evaluate_likelihood(models["base"], tokenizer, SETS)["pairs"]
    assert found.per_answer == pytest.approx(again.per_answer, rel=1e-5)
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(again.per_answer.mean - base.per_answer.mean, rel=1e-4)
    itself = evaluate_likelihood(models["base"], tokenizer, SETS, base=models["base"])["pairs"]
    assert itself.difference == (0.0, 0.0, 0.0)
    other_rows = evaluate_likelihood(models["base"], tokenizer, SETS, seed=1)["pairs"]
    assert other_rows.per_answer.mean != base.per_answer.mean


def test_real_data_of_three_kinds(shared_data: Path) -> None:
    """A model of children's stories finds those likelier than an encyclopedia, and that likelier than chat."""
    folder = str(shared_data / "models" / "stories260K")
    sizes: dict[str, Any] = {"limit": 12, "max_length": 160, "max_prompt_length": 80}
    sets = {
        "stories": LikelihoodSet(str(shared_data / "tinystories" / "eval.jsonl"), **sizes),
        "wikitext": LikelihoodSet(str(shared_data / "wikitext2_raw" / "test.jsonl.gz"), **sizes),
        "dolly": LikelihoodSet(str(shared_data / "dolly" / "eval.jsonl"), chat=False, **sizes),
    }
    found = evaluate_likelihood(load_causal_lm(folder).eval(), load_tokenizer(folder), sets)
    assert found["stories"].per_token.mean > -2
    assert found["stories"].per_token.low > max(found["wikitext"].per_token.high, found["dolly"].per_token.high)
    assert json.dumps({name: vars(summary) for name, summary in found.items()})

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.generations import Bench
from rlhf_lightning.evaluation.judges import Judges
from rlhf_lightning.evaluation.prompts import PromptSet
from rlhf_lightning.evaluation.questions import Question, Questions, checked_questions
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.rollout.sampler import SamplingConfig


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_each_model_answers_greedily_and_once_sampled(tiny_models: dict[str, str], temperature: float) -> None:
    tokenizer, sampling = load_tokenizer("builtin:demo"), SamplingConfig(max_new_tokens=5, temperature=temperature)
    prompts = PromptSet("here", [], [], 0)
    bench = Bench(prompts, [], tokenizer, [4], sampling, Judges.build(None, None), torch.device("cpu"), 1, 2)
    questions = Questions([Question("a"), Question("b")], [[1, 50, 60], [1, 70]])
    for name, path in tiny_models.items():
        model = load_causal_lm(path).eval()
        questions.put(bench, name, model)
        for question, ids in zip(questions.asked, questions.prompt_ids, strict=True):
            expected = list(ids)
            while len(expected) < len(ids) + 5 and expected[-1] != 4:
                expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
            text = tokenizer.decode(expected[len(ids) :], skip_special_tokens=True)
            assert question.greedy[name] == text
            assert question.sampled[name] != text
    assert questions.asked[0].greedy.keys() == questions.asked[1].sampled.keys() == {"base", "other"}


def test_questions_that_say_nothing_or_come_twice_are_refused() -> None:
    assert checked_questions(None) == []
    assert checked_questions(["a", "b"]) == ["a", "b"]
    with pytest.raises(UserError, match="questions has an empty one"):
        checked_questions(["a", " "])
    with pytest.raises(UserError, match="questions has 'a' twice; ask it once"):
        checked_questions(["a", "a"])

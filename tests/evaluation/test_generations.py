import pytest
import torch

from rlhf_lightning.evaluation.generations import Bench, joined, sample_responses, sequence_logprobs
from rlhf_lightning.evaluation.judges import Judges
from rlhf_lightning.evaluation.prompts import PromptSet
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.rollout.sampler import SamplingConfig

PROMPTS = [[1, 50, 60], [1, 70], [1, 80, 90, 100, 110], [1, 70], [1, 120, 130]]
CONFIG = SamplingConfig(max_new_tokens=6)


def test_the_cut_into_batches_changes_no_token(tiny_models: dict[str, str]) -> None:
    model = load_causal_lm(tiny_models["base"]).eval()
    whole, _ = sample_responses(model, PROMPTS, config=CONFIG, stop_ids=[4], seed=1, batch_size=5)
    for size in (1, 2):
        parts, _ = sample_responses(model, PROMPTS, config=CONFIG, stop_ids=[4], seed=1, batch_size=size)
        assert torch.equal(parts.input_ids, whole.input_ids)
    other, _ = sample_responses(model, PROMPTS, config=CONFIG, stop_ids=[4], seed=2)
    assert not torch.equal(other.input_ids, whole.input_ids)


def test_responses_stand_behind_their_prompts(tiny_models: dict[str, str]) -> None:
    model = load_causal_lm(tiny_models["base"]).eval()
    sequences, finished = sample_responses(model, PROMPTS, config=CONFIG, stop_ids=[4], seed=1, batch_size=2)
    for row, prompt in enumerate(PROMPTS):
        assert sequences.input_ids[row, : len(prompt)].tolist() == prompt
    stopped = sequences.response_tokens.gather(1, sequences.response_lengths[:, None] - 1).squeeze(1) == 4
    assert torch.equal(finished, stopped)
    # Rows 1 and 3 ask the same, and draw by random numbers of their own.
    assert sequences.response_tokens[1].tolist() != sequences.response_tokens[3].tolist()


def test_sequence_logprobs_match_a_loop_over_the_definition(tiny_models: dict[str, str]) -> None:
    model = load_causal_lm(tiny_models["base"]).eval()
    sequences = joined(PROMPTS[:3], [[7, 8, 4], [9, 4], [11]])
    expected = []
    for row in range(3):
        start, length = int(sequences.prompt_lengths[row]), int(sequences.lengths[row])
        ids = sequences.input_ids[row : row + 1, :length]
        with torch.no_grad():
            logprobs = (model(ids).logits[0].double() / 0.7).log_softmax(dim=-1)
        expected.append(sum(float(logprobs[place - 1, ids[0, place]]) for place in range(start, length)))
    found = sequence_logprobs(model, sequences, temperature=0.7, batch_size=2)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def bench(temperature: float) -> Bench:
    rows = [{"prompt": str(number)} for number in range(5)]
    prompts = PromptSet("here", [row["prompt"] for row in rows], rows, 5)
    config = SamplingConfig(max_new_tokens=6, temperature=temperature)
    judges = Judges.build(None, None)
    return Bench(prompts, PROMPTS, load_tokenizer("builtin:demo"), [4], config, judges, torch.device("cpu"), 1, 2)


@pytest.mark.parametrize("temperature", [1.0, 0.0, 0.5])
def test_kl_to_the_base(tiny_models: dict[str, str], temperature: float) -> None:
    base, other = (load_causal_lm(path).eval() for path in tiny_models.values())
    twin = load_causal_lm(tiny_models["base"]).eval()
    table = bench(temperature)
    itself, again = table.answer("base", "", base, base), table.answer("twin", "", twin, base)
    assert itself.kl.tolist() == again.kl.tolist() == [0.0] * 5
    assert itself.responses == again.responses
    moved = table.answer("other", "", other, base)
    # Random models are far apart: what one says is unlikely to the other.
    assert float(moved.kl.mean()) > 1.0
    assert moved.row(0)["length"] == int(moved.lengths[0])
    assert moved.row(0)["score"] is None

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rlhf_lightning.functional.sequences import SequenceBatch, pad_sequences
from rlhf_lightning.models import lm_head
from rlhf_lightning.models.causal_lm import head_is_plain, response_logprobs, response_pass
from rlhf_lightning.models.loading import load_causal_lm

ROWS = [([5, 6, 7], [8, 9, 2]), ([10], [11]), ([12, 2, 13, 14, 15], [16, 17, 18, 19]), ([20, 21], [22, 2])]


def batch_of(rows: list[tuple[list[int], list[int]]], pad_id: int = 0) -> SequenceBatch:
    """Return rows of prompt and response ids as a batch."""
    ids, _ = pad_sequences([prompt + response for prompt, response in rows], pad_id=pad_id)
    lengths = torch.tensor([[len(prompt), len(response)] for prompt, response in rows])
    return SequenceBatch(ids, lengths[:, 0], lengths[:, 1])


def one_by_one(model: PreTrainedModel, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies of ROWS by a forward pass of each row alone and a loop over its tokens."""
    logprobs, entropies = torch.zeros(4, 4), torch.zeros(4, 4)
    for row, (prompt, response) in enumerate(ROWS):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double() / temperature
        for t, token in enumerate(response):
            distribution = logits[len(prompt) + t - 1].log_softmax(-1)
            logprobs[row, t] = distribution[token]
            entropies[row, t] = -(distribution * distribution.exp()).sum()
    return logprobs, entropies


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_family_against_one_row_at_a_time(
    family: str, make_model: Callable[..., PreTrainedModel], temperature: float
) -> None:
    model = make_model(family)
    result = response_pass(model, batch_of(ROWS), temperature=temperature, with_entropy=True)
    logprobs, entropies = one_by_one(model, temperature)
    torch.testing.assert_close(result.logprobs, logprobs, atol=2e-5, rtol=1e-5)
    assert result.entropy is not None
    torch.testing.assert_close(result.entropy, entropies, atol=2e-5, rtol=1e-5)
    assert not result.entropy.requires_grad
    assert response_pass(model, batch_of(ROWS)).entropy is None


def test_gradients_are_those_of_one_row_at_a_time(family: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(family)
    weights = torch.linspace(-1, 2, 16).view(4, 4)
    gradients = []
    for logprobs in (response_logprobs(model, batch_of(ROWS)), one_by_one(model)[0]):
        model.zero_grad()
        (weights * logprobs).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-4, rtol=1e-3)


def test_hidden_states_are_those_that_the_head_reads(family: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(family)
    hidden = response_pass(model, batch_of(ROWS)).hidden
    expected = []
    for prompt, response in ROWS:
        states = model.base_model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
        expected.append(states[len(prompt) - 1 : -1])
    torch.testing.assert_close(hidden, torch.cat(expected), atol=2e-5, rtol=1e-5)


def test_a_head_that_caps_or_scales_is_not_plain(family: str, make_model: Callable[..., PreTrainedModel]) -> None:
    assert head_is_plain(make_model(family)) == (family not in {"gemma2", "cohere"})


def test_the_same_family_without_its_cap_is_plain(make_model: Callable[..., PreTrainedModel]) -> None:
    assert head_is_plain(make_model("gemma2", final_logit_softcapping=None))


def test_the_head_skips_what_is_not_asked_for(
    family: str, make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family)
    head_is_plain(model)  # the trial would be counted too
    rows = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: rows.append(output.numel() // output.shape[-1])
    )

    def counted(hidden: Tensor, *rest: Any) -> Tensor:
        rows.append(len(hidden))
        return torch.nn.functional.linear(hidden, *rest)

    monkeypatch.setattr(lm_head, "linear", counted)
    with torch.no_grad():
        response_logprobs(model, batch_of([([5] * 20, [6, 7]), ([5] * 19, [6])]))
    # Three response tokens; where the whole model must run, four positions of two rows: those from column 18 on.
    assert rows == ([2 * 4] if family in {"gemma2", "cohere"} else [3])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_padding_order_and_cut_change_nothing(family: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(family)
    with torch.no_grad():
        whole = response_logprobs(model, batch_of(ROWS))
        for pad_id in (2, 36):
            assert torch.equal(response_logprobs(model, batch_of(ROWS, pad_id)), whole)
        order = [2, 0, 3, 1]
        permuted = response_logprobs(model, batch_of([ROWS[row] for row in order]))
        torch.testing.assert_close(permuted, whole[order], atol=1e-5, rtol=1e-5)
        for row in range(len(ROWS)):
            alone = response_logprobs(model, batch_of(ROWS[row : row + 1]))
            torch.testing.assert_close(alone[0], whole[row, : alone.shape[1]], atol=1e-5, rtol=1e-5)
            assert not whole[row, alone.shape[1] :].any()


def test_an_empty_response_has_no_logprobs(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama")
    logprobs = response_logprobs(model, batch_of([([5, 6], []), ([7], [8, 9])]))
    assert logprobs[0].tolist() == [0, 0]
    assert (logprobs[1] < 0).all()


def test_bfloat16_weights_give_float32_logprobs(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama").to(torch.bfloat16)
    logprobs = response_logprobs(model, batch_of(ROWS))
    assert logprobs.dtype == torch.float32
    logits = model(input_ids=torch.tensor([[10, 11]])).logits[0, 0].double()  # row 1
    assert logprobs[1, 0].item() == pytest.approx(logits.log_softmax(-1)[11].item(), abs=0.05)


@pytest.mark.parametrize("name", ["stories260K", "babyllama-char-0.9M"])
def test_real_models_against_another_implementation(shared_data: Path, name: str) -> None:
    folder = shared_data / "models" / name
    sequences = json.loads((folder / "reference_logprobs.json").read_text())["sequences"]
    batch = batch_of([(entry["input_ids"][:1], entry["input_ids"][1:]) for entry in sequences])
    with torch.no_grad():
        result = response_pass(load_causal_lm(str(folder)), batch, with_entropy=True)
    assert result.entropy is not None
    for row, entry in enumerate(sequences):
        count = len(entry["next_token_logprobs"])
        expected = torch.tensor(entry["next_token_logprobs"]), torch.tensor(entry["entropies"])
        torch.testing.assert_close(result.logprobs[row, :count], expected[0], atol=3e-5, rtol=0)
        torch.testing.assert_close(result.entropy[row, :count], expected[1], atol=3e-5, rtol=0)
        assert result.logprobs[row].sum().item() == pytest.approx(entry["sum_logprob"], abs=1e-2)


def test_a_vocabulary_of_three_words_will_do() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=3,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    batch = SequenceBatch(torch.tensor([[0, 2, 1]]), torch.tensor([1]), torch.tensor([2]))
    found = response_logprobs(model, batch)
    expected = model(input_ids=batch.input_ids).logits.log_softmax(-1)[0, [0, 1], [2, 1]]
    torch.testing.assert_close(found[0], expected)

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_lightning.functional.sequences import SequenceBatch, pad_sequences
from rlhf_lightning.models.loading import load_tokenizer
from rlhf_lightning.models.scalar_head import ScalarModel, ensure_distinct_pad

ROWS = [([5, 6, 7], [8, 9, 2]), ([10], [11]), ([12, 2, 13, 14, 15], [16, 17, 18, 2]), ([20, 21], [22, 23])]


def batch_of(rows: list[tuple[list[int], list[int]]], pad_id: int = 0) -> SequenceBatch:
    """Return rows of prompt and response ids as a batch."""
    ids, _ = pad_sequences([prompt + response for prompt, response in rows], pad_id=pad_id)
    lengths = torch.tensor([[len(prompt), len(response)] for prompt, response in rows])
    return SequenceBatch(ids, lengths[:, 0], lengths[:, 1])


def outputs_of(model: PreTrainedModel, ids: list[int]) -> list[float]:
    """Return the scalar at each place of one row alone, read by transformers where that place is the last one."""
    return [float(model(input_ids=torch.tensor([ids[: end + 1]])).logits) for end in range(len(ids))]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox"])
def test_scores_and_values_of_every_family_one_row_at_a_time(
    family: str, make_model: Callable[..., PreTrainedModel]
) -> None:
    model = make_model(family, scalar=True)
    scalar = ScalarModel(model)
    scores, values = scalar.scores(batch_of(ROWS)), scalar.values(batch_of(ROWS))
    for row, (prompt, response) in enumerate(ROWS):
        outputs = outputs_of(model, prompt + response)
        assert scores[row].item() == pytest.approx(outputs[-1], abs=2e-5)
        # The value of response token t is read one place before it; nothing is read at the response's last token.
        expected = outputs[len(prompt) - 1 : -1]
        assert values[row, : len(response)].tolist() == pytest.approx(expected, abs=2e-5)
        assert not values[row, len(response) :].any()
    assert scores.dtype == values.dtype == torch.float32


@torch.no_grad()
def test_where_pad_is_eos_the_end_is_scored_and_not_the_token_before(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    model = make_model("llama", scalar=True, pad_token_id=2)
    scores = ScalarModel(model).scores(batch_of(ROWS, pad_id=2))
    no_pad = make_model("llama", scalar=True, pad_token_id=None)
    no_pad.load_state_dict(model.state_dict())
    for row, (prompt, response) in enumerate(ROWS):
        whole = torch.tensor([prompt + response])
        assert scores[row].item() == pytest.approx(no_pad(input_ids=whole).logits.item(), abs=2e-5)
    # transformers itself takes the token before where a row ends in its padding id: the trap that we go around.
    theirs = model(input_ids=batch_of(ROWS, pad_id=2).input_ids).logits[0].item()
    assert theirs == pytest.approx(no_pad(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits.item(), abs=2e-5)
    assert theirs != pytest.approx(scores[0].item(), abs=1e-2)


@torch.no_grad()
def test_padding_order_and_cut_change_nothing(make_model: Callable[..., PreTrainedModel]) -> None:
    scalar = ScalarModel(make_model("gpt2", scalar=True))
    scores, values = scalar.scores(batch_of(ROWS)), scalar.values(batch_of(ROWS))
    assert torch.equal(scalar.scores(batch_of(ROWS, pad_id=36)), scores)
    assert torch.equal(scalar.values(batch_of(ROWS, pad_id=36)), values)
    order = torch.tensor([2, 0, 3, 1])
    mixed = batch_of(ROWS).select(order)
    torch.testing.assert_close(scalar.scores(mixed), scores[order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scalar.values(mixed), values[order], atol=1e-5, rtol=1e-5)
    single = batch_of(ROWS).select(torch.tensor([1]))
    torch.testing.assert_close(scalar.values(single)[0], values[1, :1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equal_responses_tie_wherever_they_stand(family: str, make_model: Callable[..., PreTrainedModel]) -> None:
    """A matrix product rounds the last rows otherwise than the first."""
    ids = torch.randint(3, 30, (12, 7), generator=torch.Generator().manual_seed(0))
    ids[6:] = ids[:6]
    lengths = torch.tensor([3, 4, 5, 5, 3, 1]).repeat(2)
    scores = ScalarModel(make_model(family, scalar=True)).scores(
        SequenceBatch(ids, torch.full_like(lengths, 2), lengths)
    )
    assert torch.equal(scores[:6], scores[6:])
    assert len(scores.unique()) == 6


def test_values_pass_gradients_from_real_tokens_alone(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama", scalar=True)
    scalar, batch = ScalarModel(model), batch_of(ROWS, pad_id=36)
    scalar.values(batch).sum().backward()
    weights = cast(nn.Embedding, model.get_input_embeddings()).weight
    assert weights.grad is not None
    assert weights.grad[5].any()
    assert not weights.grad[36].any()  # padding
    assert not weights.grad[23].any()  # the last response token: nothing after it is predicted
    assert scalar.values(batch).requires_grad


def test_a_tokenizer_whose_padding_ends_texts_gets_another(
    make_model: Callable[..., PreTrainedModel], word_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model("llama", scalar=True, pad_token_id=2)
    before = model.get_input_embeddings().weight.detach().clone()
    scores = ScalarModel(model).scores(batch_of(ROWS))
    ensure_distinct_pad(model, word_tokenizer)
    assert word_tokenizer.pad_token == "<|pad|>"
    assert word_tokenizer.pad_token_id == model.config.pad_token_id == 37
    assert word_tokenizer.eos_token_id == 2
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == 38
    assert torch.equal(model.get_input_embeddings().weight[:37], before)
    torch.testing.assert_close(ScalarModel(model).scores(batch_of(ROWS)), scores)


@torch.no_grad()
def test_then_transformers_reads_where_we_read(
    make_model: Callable[..., PreTrainedModel], word_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model("llama", scalar=True, pad_token_id=2)
    ensure_distinct_pad(model, word_tokenizer)
    texts = ["<|user|> w5 <|end|> w6 w7 <|end|>", "<|user|> w8 <|end|> w9 <|end|>"]
    padded = word_tokenizer(texts, padding=True, return_tensors="pt")
    batch = batch_of([([1, 5, 2], [6, 7, 2]), ([1, 8, 2], [9, 2])])
    assert padded["attention_mask"].sum(dim=1).tolist() == batch.lengths.tolist()
    theirs = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits[:, 0]
    torch.testing.assert_close(theirs, ScalarModel(model).scores(batch), atol=1e-5, rtol=1e-5)


def test_the_room_that_an_embedding_has_is_used(
    make_model: Callable[..., PreTrainedModel], word_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model("llama", scalar=True, vocab_size=40)
    state = torch.random.get_rng_state()
    ensure_distinct_pad(model, word_tokenizer)
    assert (word_tokenizer.pad_token_id, model.get_input_embeddings().num_embeddings) == (37, 40)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_new_rows_take_nothing_from_the_random_state(
    make_model: Callable[..., PreTrainedModel], word_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model("llama", scalar=True)
    state = torch.random.get_rng_state()
    ensure_distinct_pad(model, word_tokenizer)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_padding_token_of_its_own_stays(make_model: Callable[..., PreTrainedModel]) -> None:
    tokenizer: PreTrainedTokenizerBase = load_tokenizer("builtin:demo")
    model, size = make_model("llama", scalar=True, vocab_size=len(tokenizer)), len(tokenizer)
    ensure_distinct_pad(model, tokenizer)
    assert (tokenizer.pad_token, len(tokenizer)) == ("<|pad|>", size)
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.get_input_embeddings().num_embeddings == size


@torch.no_grad()
def test_the_head_keeps_float32_under_autocast(make_model: Callable[..., PreTrainedModel]) -> None:
    model = ScalarModel(make_model("llama", scalar=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model.values(
            SequenceBatch(torch.arange(2, 14).view(2, 6), torch.tensor([1, 1]), torch.tensor([5, 5]))
        )
    assert outputs.dtype == torch.float32
    assert not torch.equal(outputs, outputs.bfloat16().float())  # more digits than bf16 has

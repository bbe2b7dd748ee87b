import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Llama4TextConfig, LlamaConfig, LlamaModel, MambaConfig, MambaModel, PreTrainedModel

from rlhf_lightning.functional.sequences import SequenceBatch, length_mask
from rlhf_lightning.models import packed
from rlhf_lightning.models.packed import hidden_states_at, packable

#: Longer and shorter than the sliding windows of four tokens, one of a single token, two alike.
LENGTHS = torch.tensor([9, 1, 4, 4, 7])
BATCH = SequenceBatch(torch.arange(45).view(5, 9) % 30 + 3, torch.ones(5, dtype=torch.int64), LENGTHS - 1)
ROWS, COLUMNS = length_mask(LENGTHS).nonzero(as_tuple=True)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each pass so far was packed."""
    seen: list[bool] = []

    def note(name: str, is_packed: bool) -> None:
        before = getattr(packed, name)

        def noted(*arguments: Any) -> Tensor:
            seen.append(is_packed)
            return before(*arguments)

        monkeypatch.setattr(packed, name, noted)

    note("_packed", True)
    note("_padded", False)
    return seen


def one_by_one(backbone: nn.Module) -> Tensor:
    """Hidden states of every real token, each sequence in a pass of its own."""
    parts = [
        backbone(input_ids=ids[None, :length], use_cache=False).last_hidden_state[0]
        for ids, length in zip(BATCH.input_ids, LENGTHS.tolist(), strict=True)
    ]
    return torch.cat(parts)


def gradient(backbone: nn.Module, states: Tensor) -> Tensor:
    """Gradient of a weighted sum."""
    backbone.zero_grad()
    (torch.linspace(-1, 2, states.numel()).sin().view_as(states) * states).sum().backward()
    return torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None])


@pytest.mark.parametrize("device_form", ["cpu", "other"])
def test_states_and_gradients_are_those_of_each_sequence_alone(
    family: str,
    make_model: Callable[..., PreTrainedModel],
    passes: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    device_form: str,
) -> None:
    backbone = make_model(family).base_model
    monkeypatch.setattr(packed, "_LOOPS_ON", ("cpu",) if device_form == "cpu" else ())
    can = backbone.config._attn_implementation == "sdpa"  # not Gemma 2's, whose capped attention only eager does now
    assert packable(backbone) == can
    assert can or family == "gemma2"
    passes.clear()
    states = hidden_states_at(backbone, BATCH, ROWS, COLUMNS)
    assert passes == [can]
    alone = one_by_one(backbone)
    torch.testing.assert_close(states, alone, atol=2e-5, rtol=1e-5)
    expected = gradient(backbone, alone)
    assert (gradient(backbone, states) - expected).norm() <= 1e-5 * expected.norm()


def test_positions_are_read_in_the_order_asked_for(make_model: Callable[..., PreTrainedModel]) -> None:
    backbone = make_model("llama").base_model
    every = hidden_states_at(backbone, BATCH, ROWS, COLUMNS)
    last = hidden_states_at(backbone, BATCH, torch.tensor([4, 0, 1]), torch.tensor([6, 8, 0]))
    torch.testing.assert_close(last, every[[24, 8, 9]])


def test_what_lies_in_the_padding_changes_nothing(make_model: Callable[..., PreTrainedModel]) -> None:
    backbone = make_model("llama").base_model
    other = BATCH._replace(input_ids=torch.where(BATCH.attention_mask, BATCH.input_ids, 1))
    one, two = (hidden_states_at(backbone, batch, ROWS, COLUMNS) for batch in (BATCH, other))
    assert torch.equal(one, two)


def test_rows_of_one_length_are_not_packed(make_model: Callable[..., PreTrainedModel], passes: list[bool]) -> None:
    backbone = make_model("llama").base_model
    alike = SequenceBatch(BATCH.input_ids, BATCH.prompt_lengths, torch.full((5,), 8))
    hidden_states_at(backbone, alike, ROWS, COLUMNS)
    assert passes == [False]


def test_the_model_is_left_as_it_was(make_model: Callable[..., PreTrainedModel]) -> None:
    backbone = make_model("llama").base_model
    backbone.train()
    hidden_states_at(backbone, BATCH, ROWS, COLUMNS)
    assert backbone.config._attn_implementation == "sdpa"
    assert backbone.training
    with pytest.raises(IndexError):
        hidden_states_at(backbone, BATCH._replace(input_ids=BATCH.input_ids + 1000), ROWS, COLUMNS)
    assert backbone.config._attn_implementation == "sdpa"


def mamba() -> PreTrainedModel:
    """It carries a state along."""
    return MambaModel(MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1))


def eager() -> PreTrainedModel:
    """Its attention is another one."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaModel(LlamaConfig(vocab_size=40, **sizes, attn_implementation="eager"))


def checkpointed() -> PreTrainedModel:
    """It computes activations again backwards."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaModel(LlamaConfig(vocab_size=40, **sizes))
    model.gradient_checkpointing_enable()
    return model.train()


@pytest.mark.parametrize("make", [mamba, eager, checkpointed])
def test_where_it_would_be_wrong_rows_are_padded(
    make: Callable[[], PreTrainedModel], passes: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    backbone = make()
    with caplog.at_level(logging.INFO):
        assert not packable(backbone)
        passes.clear()
        states = hidden_states_at(backbone, BATCH, ROWS, COLUMNS)
    assert passes == [False]
    torch.testing.assert_close(states, one_by_one(backbone), atol=1e-5, rtol=1e-5)
    assert ("cannot be packed" in caplog.text) == (make is not checkpointed)


def test_chunked_attention_and_silent_windows_are_not_packed(make_model: Callable[..., PreTrainedModel]) -> None:
    """Both look back over less than the probe is long; nothing would tell our attention."""
    llama = make_model("llama").base_model
    llama.config.sliding_window = 4  # which no layer tells of
    assert not packable(llama)
    mistral = make_model("mistral", sliding_window=4096).base_model
    assert packable(mistral)
    chunked = make_model("llama").base_model
    chunked.config.attention_chunk_size = Llama4TextConfig().attention_chunk_size
    assert not packable(chunked)


def test_in_bfloat16_it_is_packed_too(make_model: Callable[..., PreTrainedModel], passes: list[bool]) -> None:
    backbone = make_model("llama").base_model
    exact = hidden_states_at(backbone, BATCH, ROWS, COLUMNS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = hidden_states_at(backbone, BATCH, ROWS, COLUMNS)
    half = hidden_states_at(make_model("llama").base_model.bfloat16(), BATCH, ROWS, COLUMNS)
    assert passes[-1]
    for states in (mixed, half):
        assert (states.float() - exact).norm() < 0.05 * exact.norm()

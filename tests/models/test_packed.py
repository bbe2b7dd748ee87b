import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Lfm2Config,
    Lfm2Model,
    Llama4TextConfig,
    LlamaConfig,
    LlamaModel,
    MambaConfig,
    MambaModel,
    PreTrainedModel,
)

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import SequenceBatch, length_mask
from rlhf_lightning.models import packed
from rlhf_lightning.models.loading import disable_dropout
from rlhf_lightning.models.packed import Layout, checkpoint_trained_models, hidden_states_at, packable

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


#: Prompts of one, three and five tokens; the second and third are shared by two and three rows, one of them windowed.
SHARING = SequenceBatch(
    torch.tensor(
        [
            [3, 4, 5, 6, 7, 8, 9, 10, 11],
            [12, 13, 0, 0, 0, 0, 0, 0, 0],
            [3, 4, 5, 6, 7, 14, 15, 0, 0],
            [20, 21, 22, 23, 0, 0, 0, 0, 0],
            [3, 4, 5, 6, 7, 16, 17, 18, 19],
            [20, 21, 22, 24, 25, 26, 0, 0, 0],
        ]
    ),
    torch.tensor([5, 1, 5, 3, 5, 3]),
    torch.tensor([4, 1, 2, 1, 4, 3]),
)


def tokens_of_each_pass(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that takes the number of tokens of each packed pass."""
    tokens: list[int] = []
    before = packed._packed

    def noted(backbone: Any, ids: Tensor, layout: Layout) -> Tensor:
        tokens.append(sum(layout.lengths))
        return before(backbone, ids, layout)

    monkeypatch.setattr(packed, "_packed", noted)
    return tokens


def test_a_prompt_that_several_share_is_computed_once(
    family: str, make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = make_model(family).base_model
    if not packable(backbone):
        pytest.skip(f"{family} is padded")
    rows, columns = length_mask(SHARING.lengths).nonzero(as_tuple=True)
    tokens = tokens_of_each_pass(monkeypatch)
    shared = hidden_states_at(backbone, SHARING, rows, columns)
    monkeypatch.setattr(packed, "_WORTH_SHARING", 1.0)
    apart = hidden_states_at(backbone, SHARING, rows, columns)
    total = int(SHARING.lengths.sum())
    assert tokens == [total - 2 * 5 - 3, total]
    torch.testing.assert_close(shared, apart, atol=2e-5, rtol=1e-5)
    expected = gradient(backbone, apart)
    assert (gradient(backbone, shared) - expected).norm() <= 1e-5 * expected.norm()


def test_a_row_that_comes_twice_gives_the_same_bits(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere in a packed row it may round otherwise, and a tie be none; an equal text split otherwise is another."""
    tokens = tokens_of_each_pass(monkeypatch)
    backbone = make_model("llama").base_model
    ids = torch.randint(3, 30, (6, 9), generator=torch.Generator().manual_seed(0))
    ids[4], ids[5] = ids[1], ids[2]
    lengths = torch.tensor([9, 7, 5, 8, 7, 5])
    batch = SequenceBatch(ids, torch.tensor([2, 2, 2, 2, 2, 3]), lengths - torch.tensor([2, 2, 2, 2, 2, 3]))
    monkeypatch.setattr(packed, "_WORTH_SHARING", 1.0)
    rows = torch.arange(6)
    last = hidden_states_at(backbone, batch, rows, lengths - 1)
    assert torch.equal(last[1], last[4])
    assert tokens[-1] == 9 + 7 + 5 + 8 + 5
    monkeypatch.setattr(packed, "_find_sharing", lambda batch: None)
    apart = hidden_states_at(backbone, batch, rows, lengths - 1)
    assert tokens[-1] == int(lengths.sum())
    torch.testing.assert_close(last, apart, atol=2e-5, rtol=1e-5)
    expected = gradient(backbone, apart)
    assert (gradient(backbone, last) - expected).norm() <= 1e-5 * expected.norm()


def test_what_is_too_little_is_not_shared(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first token that all rows have, as running text has its BOS, is not worth a call a row."""
    tokens = tokens_of_each_pass(monkeypatch)
    ids = torch.arange(60).view(2, 30) % 30 + 3
    ids[:, 0] = 1
    batch = SequenceBatch(ids, torch.ones(2, dtype=torch.int64), torch.tensor([29, 20]))
    hidden_states_at(make_model("llama").base_model, batch, torch.tensor([0]), torch.tensor([3]))
    assert tokens[-1] == 30 + 21


def test_an_empty_response_behind_a_shared_prompt(make_model: Callable[..., PreTrainedModel]) -> None:
    backbone = make_model("llama").base_model
    batch = SHARING._replace(response_lengths=torch.tensor([4, 1, 0, 1, 0, 3]))
    rows, columns = length_mask(batch.lengths).nonzero(as_tuple=True)
    every = hidden_states_at(backbone, batch, rows, columns)
    alone = hidden_states_at(
        backbone, batch.select(torch.tensor([4])), torch.zeros(5, dtype=torch.int64), columns[-11:-6]
    )
    torch.testing.assert_close(every[rows == 4], alone, atol=2e-5, rtol=1e-5)


def test_empty_prompts_are_no_piece(make_model: Callable[..., PreTrainedModel]) -> None:
    backbone = make_model("llama").base_model
    ids = torch.tensor([[3, 4, 5], [3, 4, 5], [6, 7, 0]])
    batch = SequenceBatch(ids, torch.zeros(3, dtype=torch.int64), torch.tensor([3, 3, 2]))
    rows, columns = batch.attention_mask.nonzero(as_tuple=True)
    expected = [backbone(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in (ids[0], ids[2, :2])]
    found = hidden_states_at(backbone, batch, rows, columns)
    torch.testing.assert_close(found, torch.cat([expected[0], *expected]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_that_look_across_are_seen_in_any_type(dtype: torch.dtype) -> None:
    """Freshly drawn, they change less than bfloat16 rounds."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Lfm2Config(vocab_size=40, num_key_value_heads=2, layer_types=["conv", "full_attention"], **sizes)
    assert not packable(Lfm2Model(config).to(dtype))


@pytest.mark.parametrize("batch", [BATCH, SHARING])
def test_checkpointing_keeps_little_and_changes_no_bit(
    family: str, make_model: Callable[..., PreTrainedModel], passes: list[bool], batch: SequenceBatch
) -> None:
    model = disable_dropout(make_model(family)).train()
    backbone = model.base_model
    can = packable(backbone)
    rows, columns = length_mask(batch.lengths).nonzero(as_tuple=True)
    results, kept = [], []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_trained_models(nn.ModuleList([model, make_model(family).requires_grad_(False)]))
        assert packable(backbone) == can
        passes.clear()
        storages: dict[int, int] = {}

        def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            states = hidden_states_at(backbone, batch, rows, columns)
        assert passes == [can]
        weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
        kept.append(sum(size for place, size in storages.items() if place not in weights))
        results.append((states.detach(), gradient(backbone, states)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert kept[1] < kept[0] / 2


def test_a_frozen_model_is_not_checkpointed(make_model: Callable[..., PreTrainedModel]) -> None:
    trained, frozen = make_model("llama"), make_model("llama").requires_grad_(False)
    checkpoint_trained_models(nn.ModuleList([trained, frozen]))
    states = [[getattr(m, "gradient_checkpointing", False) for m in model.modules()] for model in (trained, frozen)]
    assert [any(each) for each in states] == [True, False]


def test_a_family_that_cannot_be_checkpointed_is_named(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="gradient_checkpointing is true, but transformers' LlamaForCausalLM cannot"):
        checkpoint_trained_models(nn.ModuleList([model]))


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

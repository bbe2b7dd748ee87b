from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from rlhf_lightning.rollout.cache import preallocated_cache

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18], [19, 20, 21, 22, 23, 24, 25]])


@torch.no_grad()
def decode(model: PreTrainedModel, cache: DynamicCache) -> list[torch.Tensor]:
    """Feed three tokens, one, one, then two rows of the three in another order; return the logits of each step."""
    steps: list[tuple[torch.Tensor, slice, list[int]]] = [
        (IDS, slice(0, 3), [0, 1, 2]),
        (IDS, slice(3, 4), [0, 1, 2]),
        (IDS, slice(4, 5), [2, 0]),
        (IDS[[2, 0]], slice(5, 6), [1]),
        (IDS[[0]], slice(6, 7), [0]),
    ]
    logits = []
    for ids, columns, keep in steps:
        logits.append(model(input_ids=ids[:, columns], past_key_values=cache, use_cache=True).logits)
        cache.batch_select_indices(torch.tensor(keep))
    return logits


def test_it_gives_what_the_cache_of_transformers_gives(family: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(family)
    ours = decode(model, preallocated_cache(model.config, 7))
    theirs = decode(model, DynamicCache(config=model.config))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    # And it is what a pass over the whole row gives, for the row that stayed to the end.
    whole = model(input_ids=IDS[:1]).logits[0, -1]
    torch.testing.assert_close(ours[-1][0, -1], whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_token_is_written_into_room_that_is_there(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama")
    cache: Any = preallocated_cache(model.config, 7)
    places = set()
    for column in range(7):
        model(input_ids=IDS[:, column : column + 1], past_key_values=cache, use_cache=True)
        layer = cache.layers[0]
        places.add((layer.keys.data_ptr(), layer.values.data_ptr(), layer.key_buffer.data_ptr()))
        assert layer.keys.shape[2] == cache.get_seq_length() == column + 1
    assert len(places) == 1
    assert layer.key_buffer.shape[2] == 7


def test_layers_with_a_window_stay_as_they_were(make_model: Callable[..., PreTrainedModel]) -> None:
    kinds = [type(layer).__name__ for layer in preallocated_cache(make_model("gemma2").config, 7).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "PreallocatedLayer"]


def test_selecting_from_an_empty_cache_is_nothing(make_model: Callable[..., PreTrainedModel]) -> None:
    cache = preallocated_cache(make_model("llama").config, 7)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_more_tokens_than_there_is_room_for(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama")
    with pytest.raises(RuntimeError):
        model(input_ids=IDS, past_key_values=preallocated_cache(model.config, 6), use_cache=True)

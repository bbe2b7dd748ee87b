from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, MambaConfig, PreTrainedModel, Qwen3NextConfig

from rlhf_lightning.rollout.cache import copied_row, holds_keys_and_values_alone, preallocated_cache, rearrange

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


class TestRearranging:
    @staticmethod
    @torch.no_grad()
    def filled(model: PreTrainedModel, rows: list[int], tokens: int) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(input_ids=IDS[rows, :tokens], past_key_values=cache, use_cache=True)
        return cache

    @torch.no_grad()
    def test_rows_of_several_caches_go_on_as_if_alone(
        self, family: str, make_model: Callable[..., PreTrainedModel]
    ) -> None:
        model = make_model(family)
        cache = preallocated_cache(model.config, 8)
        longer, shorter = self.filled(model, [0, 1], 5), self.filled(model, [2], 2)
        rearrange(cache, [(longer, torch.tensor([1])), (shorter, torch.tensor([0, 0])), (longer, torch.tensor([0]))], 6)
        taken, sizes = [1, 2, 2, 0], torch.tensor([5, 2, 2, 5])
        # The second time the cache is a part of itself, moved to the left and put in another order.
        for following in ([3, 1], [1, 0]):
            mask = torch.arange(cache.get_seq_length() + 1) >= cache.get_seq_length() - sizes[:, None]
            logits = model(
                input_ids=IDS[taken, sizes][:, None],
                attention_mask=mask,
                position_ids=sizes[:, None],
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
            sizes = sizes + 1
            for place, row in enumerate(taken):
                alone = model(input_ids=IDS[row : row + 1, : sizes[place]]).logits[0, -1]
                torch.testing.assert_close(logits[place], alone, atol=1e-4, rtol=1e-4)
            rearrange(cache, [(cache, torch.tensor(following))], 6)
            taken, sizes = [taken[place] for place in following], sizes[following]
            assert cache.get_seq_length() == 6

    def test_nothing_comes_of_nothing(self, make_model: Callable[..., PreTrainedModel]) -> None:
        cache = preallocated_cache(make_model("gemma2").config, 7)
        rearrange(cache, [(cache, torch.tensor([0]))], 3)
        assert cache.get_seq_length() == 0

    def test_a_copied_row_keeps_nothing_else_alive(
        self, family: str, make_model: Callable[..., PreTrainedModel]
    ) -> None:
        model = make_model(family)
        cache = self.filled(model, [0, 1, 2], 3)
        copy = copied_row(cache, model.config, 1)
        for ours, theirs in zip(copy.layers, cache.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys[1:2])
            assert torch.equal(ours.values, theirs.values[1:2])
            assert ours.keys.untyped_storage().nbytes() == ours.keys.nbytes

    def test_models_that_keep_another_state_are_told_apart(
        self, family: str, make_model: Callable[..., PreTrainedModel]
    ) -> None:
        assert holds_keys_and_values_alone(make_model(family).config)
        assert not holds_keys_and_values_alone(MambaConfig())
        assert not holds_keys_and_values_alone(Qwen3NextConfig())

from array import array

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.data.collate import (
    MarginPairExample,
    PairExample,
    collate_labelled,
    collate_pairs,
    collate_prompts,
    collate_sequences,
    compact,
)

ids = st.lists(st.integers(0, 9), min_size=1, max_size=6)


def test_masks_know_the_pad_token_inside_a_row_from_padding() -> None:
    batch = collate_sequences([([2, 5], [6, 2]), ([7], [2])], pad_id=2)
    assert batch.input_ids.tolist() == [[2, 5, 6, 2], [7, 2, 2, 2]]
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.response_mask.tolist() == [[True, True], [True, False]]
    assert (batch.prompt_lengths.tolist(), batch.response_lengths.tolist()) == ([2, 1], [2, 1])


def test_both_sides_of_a_pair_follow_the_same_prompt() -> None:
    pairs = [PairExample([1], [5, 2], [6, 7, 2]), PairExample([1, 3], [2], [8, 2])]
    chosen, rejected, margins = collate_pairs(pairs, pad_id=0)
    assert margins is None
    assert chosen.input_ids.tolist() == [[1, 5, 2], [1, 3, 2]]
    assert rejected.input_ids.tolist() == [[1, 6, 7, 2], [1, 3, 8, 2]]
    assert chosen.prompt_lengths.tolist() == rejected.prompt_lengths.tolist() == [1, 2]


def test_margins_stand_beside_their_pairs() -> None:
    examples = [MarginPairExample([1], [5, 2], [6, 7, 2], 0.5), MarginPairExample([1, 3], [2], [8, 2], 3)]
    margins = collate_pairs(examples, pad_id=0).margins
    assert margins is not None
    assert margins.tolist() == [0.5, 3]
    assert margins.dtype == torch.float32
    assert examples[0].sequences == [([1], [5, 2]), ([1], [6, 7, 2])]


def test_labels_stand_beside_their_sequences() -> None:
    sequences, labels = collate_labelled([([1], [5, 2], 0.5), ([1, 3], [2], -2)], pad_id=0)
    assert sequences.input_ids.tolist() == [[1, 5, 2], [1, 3, 2]]
    assert labels.tolist() == [0.5, -2.0]
    assert labels.dtype == torch.float32


def test_prompts_end_where_the_response_begins() -> None:
    batch = collate_prompts([([2, 5, 2], "a", {"x": 1}), ([7], [{"role": "user", "content": "b"}], {})], pad_id=2)
    assert batch.input_ids.tolist() == [[2, 5, 2], [2, 2, 7]]
    assert batch.attention_mask.tolist() == [[True] * 3, [False, False, True]]
    assert batch.prompts == ["a", [{"role": "user", "content": "b"}]]
    assert batch.rows == [{"x": 1}, {}]
    assert batch.attention_mask.dtype == torch.bool


@given(rows=st.lists(st.tuples(ids, ids), min_size=1, max_size=5), pad_id=st.integers(0, 9))
def test_what_goes_in_comes_out_whatever_the_padding(rows: list[tuple[list[int], list[int]]], pad_id: int) -> None:
    batch = collate_sequences([(compact(prompt), compact(response)) for prompt, response in rows], pad_id)
    for number, (prompt, response) in enumerate(rows):
        assert batch.input_ids[number][batch.attention_mask[number]].tolist() == prompt + response
        assert batch.response_tokens[number][batch.response_mask[number]].tolist() == response
    prompts = collate_prompts([(prompt, "", {}) for prompt, _ in rows], pad_id)
    for number, (prompt, _) in enumerate(rows):
        assert prompts.input_ids[number][prompts.attention_mask[number]].tolist() == prompt


def test_nothing_cannot_be_collated() -> None:
    with pytest.raises(ValueError, match="no examples"):
        collate_sequences([], 0)
    with pytest.raises(ValueError, match="no examples"):
        collate_prompts([], 0)
    with pytest.raises(ValueError, match="row 1 of the batch has an empty prompt or response"):
        collate_sequences([([1], [2]), ([1], [])], 0)
    with pytest.raises(ValueError, match="row 0 of the batch"):
        collate_prompts([([], "a", {})], 0)


def test_ids_are_kept_in_four_bytes() -> None:
    kept = compact([0, 151_935])
    assert isinstance(kept, array)
    assert (list(kept), kept.itemsize) == ([0, 151_935], 4)

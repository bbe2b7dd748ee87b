import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.functional.sequences import (
    SequenceBatch,
    first_true_index,
    length_mask,
    length_sorted,
    pad_sequences,
    position_ids_from_mask,
    response_lengths,
    token_groups,
)

ids = st.lists(st.integers(0, 9), min_size=1, max_size=5)
rows_of_ids = st.lists(st.tuples(ids, ids), min_size=1, max_size=5)


def joined(rows: list[tuple[list[int], list[int]]], pad_id: int = 0) -> SequenceBatch:
    """Return a batch by the way that rollouts go: prompts padded on the left, responses on the right."""
    prompts, prompt_lengths = pad_sequences([prompt for prompt, _ in rows], pad_id=pad_id, left=True)
    tokens, lengths = pad_sequences([response for _, response in rows], pad_id=pad_id)
    places = torch.arange(prompts.shape[1])
    return SequenceBatch.join(prompts, places >= prompts.shape[1] - prompt_lengths[:, None], tokens, lengths)


def test_length_mask() -> None:
    lengths = torch.tensor([0, 2, 3])
    assert length_mask(lengths).int().tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert length_mask(lengths, 4).int().tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]


def test_first_true_index() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 1]]).bool()
    assert first_true_index(mask).tolist() == [1, 0, 3, 2]
    assert first_true_index(torch.zeros(2, 0).bool()).tolist() == [0, 0]


def test_a_response_ends_with_its_first_stop_token() -> None:
    tokens = torch.tensor([[5, 2, 2, 7], [5, 6, 7, 8], [2, 5, 5, 5], [5, 6, 7, 3], [0, 0, 0, 0]])
    lengths, finished = response_lengths(tokens, stop_ids=[2, 3])
    assert lengths.tolist() == [2, 4, 1, 4, 4]
    # The fourth stops with its very last token and the second does not: both are four tokens long.
    assert finished.tolist() == [True, False, True, True, False]


def test_without_stop_tokens_nothing_finishes() -> None:
    lengths, finished = response_lengths(torch.tensor([[1, 2]]), stop_ids=[])
    assert (lengths.tolist(), finished.tolist()) == ([2], [False])


def test_positions_count_what_is_attended() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    assert position_ids_from_mask(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0, 1, 1, 1]]


def test_padding_goes_to_the_side_asked_for() -> None:
    padded, lengths = pad_sequences([[1, 2, 3], [4], []], pad_id=9)
    assert (padded.tolist(), lengths.tolist()) == ([[1, 2, 3], [4, 9, 9], [9, 9, 9]], [3, 1, 0])
    padded, lengths = pad_sequences([[1, 2, 3], [4], []], pad_id=9, left=True)
    assert (padded.tolist(), lengths.tolist()) == ([[1, 2, 3], [9, 9, 4], [9, 9, 9]], [3, 1, 0])
    empty, lengths = pad_sequences([], pad_id=9)
    assert (empty.shape, empty.dtype, lengths.shape) == ((0, 0), torch.int64, (0,))


def test_a_batch_where_the_pad_token_stands_inside_by_hand() -> None:
    batch = joined([([2, 5], [6, 2]), ([7, 2, 8], [9]), ([1], [3, 4, 2])], pad_id=2)
    assert batch.input_ids.tolist() == [[2, 5, 6, 2], [7, 2, 8, 9], [1, 3, 4, 2]]
    assert batch.lengths.tolist() == [4, 4, 4]
    assert batch.attention_mask.all()
    assert batch.response_mask.int().tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert batch.response_tokens.tolist() == [[6, 2, 0], [9, 0, 0], [3, 4, 2]]
    rows, columns = batch.predicting_positions()
    # The token before each response token: 5 and 6; 8; 1, 3 and 4.
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert batch.input_ids[rows, columns].tolist() == [5, 6, 8, 1, 3, 4]


def test_unequal_rows_are_padded_on_the_right() -> None:
    batch = joined([([1, 2, 3], [4, 5]), ([6], [7])])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]


def test_what_follows_the_stop_token_does_not_get_in() -> None:
    tokens = torch.tensor([[5, 2, 99, 99], [6, 7, 2, 99]])
    lengths, _ = response_lengths(tokens, stop_ids=[2])
    batch = SequenceBatch.join(torch.tensor([[0, 1], [3, 4]]), torch.tensor([[0, 1], [1, 1]]).bool(), tokens, lengths)
    assert batch.input_ids.tolist() == [[1, 5, 2, 0, 0], [3, 4, 6, 7, 2]]


@settings(deadline=None)
@given(rows=rows_of_ids, pad_id=st.integers(0, 9))
def test_what_is_joined_comes_out_again(rows: list[tuple[list[int], list[int]]], pad_id: int) -> None:
    batch = joined(rows, pad_id)
    picked, columns = batch.predicting_positions()
    assert batch.input_ids.shape[1] == max(len(prompt) + len(response) for prompt, response in rows)
    for number, (prompt, response) in enumerate(rows):
        whole = prompt + response
        assert batch.input_ids[number][batch.attention_mask[number]].tolist() == whole
        assert batch.response_tokens[number][batch.response_mask[number]].tolist() == response
        before = [whole[place] for place in columns[picked == number].tolist()]
        assert before == whole[len(prompt) - 1 : -1]
    assert not batch.input_ids[~batch.attention_mask].any()


@settings(deadline=None)
@given(rows=rows_of_ids, data=st.data())
def test_selected_rows_are_what_joining_them_alone_gives(
    rows: list[tuple[list[int], list[int]]], data: st.DataObject
) -> None:
    picked = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
    selected, alone = joined(rows).select(torch.tensor(picked)), joined([rows[number] for number in picked])
    for one, other in zip(selected, alone, strict=True):
        assert torch.equal(one, other)


def test_flat_results_go_back_to_their_places() -> None:
    batch = joined([([1], [2, 3]), ([4], [5, 6, 7]), ([8], [9])])
    rows, columns = batch.predicting_positions()
    padded = torch.zeros(batch.response_mask.shape, dtype=torch.int64)
    padded[batch.response_mask] = batch.input_ids[rows, columns + 1]
    assert torch.equal(padded, batch.response_tokens)


@pytest.mark.parametrize("left", [True, False])
def test_ids_are_int64(left: bool) -> None:
    padded, lengths = pad_sequences([[1], [2, 3]], pad_id=0, left=left)
    assert padded.dtype == lengths.dtype == torch.int64


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 50))
def test_a_group_holds_no_more_tokens_than_asked_for(lengths: list[int], most: int) -> None:
    groups = [group.tolist() for group in token_groups(torch.tensor(lengths), most)]
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[row] for row in group) <= most


def test_groups_go_from_long_to_short_and_hold_every_row_once() -> None:
    groups = length_sorted(torch.tensor([3, 9, 1, 9, 5]), size=2)
    assert [group.tolist() for group in groups] == [[1, 3], [4, 0], [2]]  # equal lengths keep their order

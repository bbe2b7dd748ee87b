from collections import Counter
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.chat import ConversationEncoder
from rlhf_lightning.data.lengths import check_lengths, cut_prompt, cut_responses
from rlhf_lightning.errors import UserError


def test_a_prompt_is_cut_and_counted_only_when_it_is_too_long(demo_tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = ConversationEncoder(demo_tokenizer)
    counts: Counter[str] = Counter()
    assert cut_prompt(encoder, [5, 6, 7], 3, counts) == [5, 6, 7]
    assert counts["prompts_truncated"] == 0
    assert cut_prompt(encoder, [5, 6, 7, 8], 3, counts) == [6, 7, 8]
    assert cut_prompt(encoder, [5, 6, 7, 8, 9], 3, counts) == [7, 8, 9]
    assert counts["prompts_truncated"] == 2


def test_a_response_of_just_the_room_fits() -> None:
    counts: Counter[str] = Counter()
    fits = [[5, 2], [6, 7, 2]]
    assert cut_responses([1, 1], fits, max_length=5, overlong="drop", counts=counts) == fits
    assert cut_responses([1, 1], fits, max_length=4, overlong="drop", counts=counts) is None
    assert counts["dropped_overlong"] == 1
    assert cut_responses([1, 1], fits, max_length=4, overlong="truncate", counts=counts) == [[5, 2], [6, 7]]
    assert counts["responses_truncated"] == 1


@given(
    prompt=st.integers(1, 5),
    responses=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    max_length=st.integers(6, 12),
    overlong=st.sampled_from(["truncate", "drop"]),
)
def test_whatever_is_kept_fits(
    prompt: int, responses: list[int], max_length: int, overlong: Literal["truncate", "drop"]
) -> None:
    counts: Counter[str] = Counter()
    rows = [list(range(size)) for size in responses]
    kept = cut_responses([0] * prompt, rows, max_length=max_length, overlong=overlong, counts=counts)
    too_long = sum(prompt + size > max_length for size in responses)
    if overlong == "drop" and too_long:
        assert kept is None
        assert counts == {"dropped_overlong": 1}
    else:
        assert kept == [row[: max_length - prompt] for row in rows]
        assert counts["responses_truncated"] == too_long


@pytest.mark.parametrize(("max_length", "max_prompt_length"), [(4, 4), (4, 5), (4, 0), (0, 0)])
def test_lengths_must_leave_room_for_a_response(max_length: int, max_prompt_length: int) -> None:
    check_lengths(5, 4)
    with pytest.raises(UserError, match=f"max_prompt_length is {max_prompt_length} and max_length {max_length}"):
        check_lengths(max_length, max_prompt_length)

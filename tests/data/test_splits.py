from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.data.readers import read_rows
from rlhf_lightning.data.shapes import Demonstration, parse_pair
from rlhf_lightning.data.splits import prompt_key, split_by_prompt
from rlhf_lightning.errors import UserError


def items(prompts: list[str]) -> list[Demonstration]:
    return [Demonstration(prompt, str(number)) for number, prompt in enumerate(prompts)]


@given(prompts=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=20), val_size=st.integers(1, 20))
def test_no_prompt_is_on_both_sides_and_no_row_is_lost(prompts: list[str], val_size: int) -> None:
    whole = items(prompts)
    groups = Counter(prompts)
    if val_size >= len(prompts) or val_size < min(groups.values()) or len(groups) == 1:
        with pytest.raises(UserError, match=f"val_size {val_size} cannot be taken off {len(prompts)} rows"):
            split_by_prompt(whole, val_size)
        return
    rest, val = split_by_prompt(whole, val_size)
    assert sorted(rest + val, key=whole.index) == whole
    assert (rest, val) == (sorted(rest, key=whole.index), sorted(val, key=whole.index))
    assert not {item.prompt for item in rest} & {item.prompt for item in val}
    assert 1 <= len(val) <= val_size
    if set(groups.values()) == {1}:
        assert len(val) == val_size


def test_the_same_prompts_go_whatever_the_order_of_the_rows() -> None:
    prompts = [f"question {number}" for number in range(50)]
    _, val = split_by_prompt(items(prompts), 10)
    _, turned = split_by_prompt(items(prompts[::-1]), 10)
    assert {item.prompt for item in val} == {item.prompt for item in turned}
    _, more = split_by_prompt(items(prompts), 20)
    assert {item.prompt for item in val} < {item.prompt for item in more}
    assert [item.prompt for item in val] != prompts[:10]
    assert split_by_prompt(items(prompts), 0) == (items(prompts), [])


def test_the_key_reads_messages_whatever_the_order_of_their_entries() -> None:
    assert prompt_key([{"role": "user", "content": "a"}]) == prompt_key([{"content": "a", "role": "user"}])
    assert prompt_key([{"role": "user", "content": "a"}]) != prompt_key([{"role": "user", "content": "b"}])


def test_real_prompts_that_recur_stay_together(shared_data: Path) -> None:
    pairs = [parse_pair(row) for row in read_rows(str(shared_data / "human_like_dpo" / "train.jsonl.gz"))]
    rest, val = split_by_prompt(pairs, 500)
    assert (len(rest), len(val)) == (5762, 500)
    assert not {str(pair.prompt) for pair in rest} & {str(pair.prompt) for pair in val}

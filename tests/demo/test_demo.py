"""The rows that ``builtin:demo/<name>`` gives."""

import re

import pytest

from rlhf_lightning.demo import builtin_rows
from rlhf_lightning.demo.grammar import all_questions, is_grammatical
from rlhf_lightning.demo.tokenizer import PIECE
from rlhf_lightning.errors import UserError


def token_lengths(rows: list[dict[str, str]], side: str) -> list[int]:
    # A token is a word with the space before it, or a punctuation mark: what the demo's tokenizer makes of the grammar.
    return [len(re.findall(PIECE, row[side])) for row in rows]


def test_sizes_and_columns() -> None:
    sizes = {name: len(builtin_rows(name)) for name in ("train", "eval", "prompts", "eval_prompts")}
    assert sizes == {"train": 4416, "eval": 480, "prompts": 1104, "eval_prompts": 240}
    assert set(builtin_rows("train")[0]) == set(builtin_rows("eval")[0]) == {"prompt", "chosen", "rejected"}
    assert set(builtin_rows("prompts")[0]) == set(builtin_rows("eval_prompts")[0]) == {"prompt"}


def test_held_out_rows_share_no_question_with_training() -> None:
    training = {row["prompt"] for row in builtin_rows("train") + builtin_rows("prompts")}
    held_out = {row["prompt"] for row in builtin_rows("eval") + builtin_rows("eval_prompts")}
    assert training.isdisjoint(held_out)
    assert len(training | held_out) == len(all_questions())


def test_rows_are_the_same_every_time_and_safe_to_change() -> None:
    rows = builtin_rows("eval")
    expected = dict(rows[0])
    rows[0]["prompt"] = "changed"
    assert builtin_rows("eval")[0] == expected


def test_every_answer_is_grammatical() -> None:
    for row in builtin_rows("train") + builtin_rows("eval"):
        assert is_grammatical(row["prompt"], row["chosen"]), row
        assert is_grammatical(row["prompt"], row["rejected"]), row


@pytest.mark.parametrize("name", ["train", "eval"])
def test_longer_answer_is_chosen_as_often_as_not(name: str) -> None:
    rows = builtin_rows(name)
    pairs = list(zip(token_lengths(rows, "chosen"), token_lengths(rows, "rejected"), strict=True))
    accuracy = sum((chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in pairs) / len(pairs)
    assert 0.45 <= accuracy <= 0.55


def test_no_length_separates_the_voices() -> None:
    # The best threshold on the length of a single answer, chosen on the very rows it is measured on.
    rows = builtin_rows("train")
    chosen, rejected = token_lengths(rows, "chosen"), token_lengths(rows, "rejected")
    best = max(
        (sum(length >= limit for length in chosen) + sum(length < limit for length in rejected)) / (2 * len(rows))
        for limit in range(8, 50)
    )
    assert max(best, 1 - best) <= 0.55


@pytest.mark.parametrize(
    ("name", "near"),
    [("trian", "Did you mean 'train'?"), ("eval_prompt", "Did you mean 'eval_prompts'?"), ("", "only")],
)
def test_wrong_name_is_answered_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError, match=r"train, eval, prompts, eval_prompts") as error:
        builtin_rows(name)
    assert near in str(error.value)
    assert "\n" not in str(error.value)

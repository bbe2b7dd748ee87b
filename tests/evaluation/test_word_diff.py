import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.evaluation.word_diff import word_changes

WORDS = st.lists(st.sampled_from(["the ", "cat ", "sat", ", ", "\n\n", "it's ", "日本", "  ", "a"]), max_size=30).map(
    "".join
)


def told(before: str, after: str) -> str:
    marks = {"kept": "{}", "inserted": "+{}+", "deleted": "-{}-"}
    return "".join(marks[change.kind].format(change.text) for change in word_changes(before, after))


@settings(max_examples=200, deadline=None)
@given(WORDS | st.text(max_size=40), WORDS | st.text(max_size=40))
def test_kept_and_inserted_are_the_later_text_kept_and_deleted_the_words_of_the_earlier(
    before: str, after: str
) -> None:
    changes = word_changes(before, after)
    assert "".join(change.text for change in changes if change.kind != "deleted") == after
    earlier = "".join(change.text for change in changes if change.kind != "inserted")
    assert "".join(earlier.split()) == "".join(before.split())


@given(WORDS)
def test_a_text_does_not_differ_from_itself(text: str) -> None:
    assert {change.kind for change in word_changes(text, text)} <= {"kept"}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("", "", ""),
        ("", "new words", "+new words+"),
        ("old words", "", "-old words-"),
        ("I don't like it.", "I do like it.", "I -don't -+do +like it."),
        ("one two", "one  two", "one  two"),
        ("the end", "the end of it", "the end +of it+"),
        ("x same", "y same", "-x -+y +same"),
    ],
)
def test_by_hand(before: str, after: str, expected: str) -> None:
    assert told(before, after) == expected


def test_a_word_shared_by_chance_between_larger_changes_is_no_island() -> None:
    before = "As a language model I have no hobbies and cannot enjoy the outdoors"
    after = "Oh gosh there are so many and honestly it depends on my mood"
    assert told(before, after) == f"-{before}-+{after}+"


def test_four_words_in_a_row_are_no_chance() -> None:
    before = "I do not have preferences regarding hiking on a rainy day whatsoever, as an assistant"
    after = "Oh, good question! I really love hiking on a rainy day because everything smells of earth"
    assert "hiking on a rainy day " in [change.text for change in word_changes(before, after) if change.kind == "kept"]


def test_letters_of_scripts_without_spaces_are_compared_one_by_one() -> None:
    assert told("日本語の文です", "日本史の文です") == "日本-語-+史+の文です"


def test_texts_that_say_one_word_over_and_over_take_no_time() -> None:
    start = time.perf_counter()
    word_changes("a " * 4000 + "b " * 20, ("a " * 7 + "c ") * 500)
    assert time.perf_counter() - start < 1.0

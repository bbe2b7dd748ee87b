"""The exact voice classifier and the two measures of generated answers."""

import itertools

import pytest

from rlhf_lightning.demo import builtin_rows
from rlhf_lightning.demo.grammar import all_questions, choices
from rlhf_lightning.demo.phrases import PHRASES
from rlhf_lightning.demo.voice import grammatical, human_voice, voice


@pytest.mark.parametrize("name", ["train", "eval"])
def test_classifier_is_right_on_every_generated_answer(name: str) -> None:
    rows = builtin_rows(name)
    assert {voice(row["chosen"]) for row in rows} == {"human"}
    assert {voice(row["rejected"]) for row in rows} == {"stiff"}


def test_no_two_neighbouring_parts_make_a_mark_of_the_other_voice() -> None:
    # Marks are three tokens long and each part is longer, so pairs of neighbours cover every place a mark could arise.
    neighbours = [("opener", "core"), ("core", "detail"), ("core", "closing"), ("detail", "closing")]
    for question in all_questions()[:: len(all_questions()) // 97]:
        for name in PHRASES:
            for first, second in neighbours:
                texts = itertools.product(choices(question, name, first), choices(question, name, second))
                assert {voice(" ".join(text)) for text in texts} == {name}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("As an AI, I do not have preferences", "stiff"),
        ("as an ai model", "stiff"),
        ("I really love", "human"),
        ("Oh, I can't get enough of rocks", "human"),
        ("As an AI, I'm such a huge fan of pizza!", "mixed"),
        ("I really love pizza! Individual results may vary.", "mixed"),
        ("Do you like pizza?", "none"),
        ("a crispy crust a crispy crust", "none"),
        ("", "none"),
        ("\u00e9 \U0001f600", "none"),
    ],
)
def test_voice_of_partial_and_mixed_answers(answer: str, expected: str) -> None:
    assert voice(answer) == expected


def test_questions_and_details_have_no_voice() -> None:
    assert {voice(question.text) for question in all_questions()} == {"none"}


def test_human_voice_is_one_for_human_answers_only() -> None:
    responses = ["I really love pizza!", "As an AI, no.", "As an AI, I really love pizza!", "pizza"]
    assert human_voice(["Do you like pizza?"] * 4, responses, score=[0, 0, 0, 0]) == [1.0, 0.0, 0.0, 0.0]


def test_grammatical_reads_text_and_chat_prompts() -> None:
    answer = "Oh, I really love pizza! How about you?"
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Should I try jazz?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Do you like pizza?"},
    ]
    prompts = ["Do you like pizza?", chat, "Do you like jazz?", [{"role": "system", "content": "Do you like pizza?"}]]
    assert grammatical(prompts, [answer] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_grammatical_refuses_lists_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="shorter"):
        grammatical(["Do you like pizza?"], [])

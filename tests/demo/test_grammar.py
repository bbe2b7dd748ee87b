"""Generation and recognition of the demo's grammar."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.demo.grammar import (
    HELD_OUT_QUESTIONS,
    SHAPES,
    Question,
    all_questions,
    choices,
    is_grammatical,
    pick,
    sample_answer,
    split_questions,
)
from rlhf_lightning.demo.phrases import PHRASES, QUESTIONS, SETTINGS, TOPICS, Voice

PIZZA = "Do you like pizza?"
ANSWER = "Oh, I really love pizza! You can't go wrong with fresh basil! How about you?"


def question_of(text: str) -> Question:
    return next(question for question in all_questions() if question.text == text)


def test_questions_are_all_combinations_and_all_different() -> None:
    texts = [question.text for question in all_questions()]
    assert len(texts) == len(TOPICS) * len(QUESTIONS) * len(SETTINGS)
    assert len(set(texts)) == len(texts)


def test_split_shares_no_question_and_loses_none() -> None:
    train, held_out = split_questions()
    assert len(held_out) == HELD_OUT_QUESTIONS
    assert {q.text for q in train}.isdisjoint(q.text for q in held_out)
    assert {*train, *held_out} == set(all_questions())


def test_every_topic_intent_and_setting_is_on_both_sides() -> None:
    for side in split_questions():
        assert {q.topic for q in side} == set(TOPICS)
        assert {q.intent for q in side} == set(QUESTIONS)
        assert {q.setting for q in side} == set(SETTINGS)


@settings(max_examples=300, deadline=None)
@given(index=st.integers(0, len(all_questions()) - 1), voice=st.sampled_from(["human", "stiff"]), seed=st.integers(0))
def test_recogniser_accepts_whatever_is_generated_and_only_whole(index: int, voice: Voice, seed: int) -> None:
    question = all_questions()[index]
    answer = sample_answer(question, voice, random.Random(seed))
    assert is_grammatical(question.text, answer)
    assert not is_grammatical(question.text, answer[:-1])
    assert not is_grammatical(question.text, answer + " ")
    assert not is_grammatical(question.text, " " + answer)
    assert not is_grammatical(question.text, answer + answer)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        pytest.param("Do you like tacos?", ANSWER, id="another-topic"),
        pytest.param("Should I try pizza?", ANSWER, id="another-intent"),
        pytest.param("Do you like pizza", ANSWER, id="not-a-question-of-the-grammar"),
        pytest.param(PIZZA, ANSWER.replace("basil", "air"), id="detail-of-another-topic"),
        pytest.param(PIZZA, ANSWER.replace("pizza!", "pizza with kids!"), id="setting-not-asked-for"),
        pytest.param(PIZZA, ANSWER.replace("How about you?", "Individual results may vary."), id="two-voices"),
        pytest.param(PIZZA, ANSWER.replace("You can't", "you can't"), id="case"),
        pytest.param(PIZZA, "Oh, I really love pizza!", id="too-few-parts"),
        pytest.param(PIZZA, "Oh, You can't go wrong with fresh basil! How about you?", id="no-core"),
        pytest.param(PIZZA, "", id="empty"),
    ],
)
def test_recogniser_refuses(question: str, answer: str) -> None:
    assert is_grammatical(PIZZA, ANSWER)
    assert not is_grammatical(question, answer)


def test_recogniser_agrees_with_the_full_list_of_answers() -> None:
    # The three-part answers of one question, written out: opener, core, closing.
    question = question_of(PIZZA)
    for voice in PHRASES:
        openers, cores, closings = (choices(question, voice, part) for part in ("opener", "core", "closing"))
        answers = [f"{o} {c} {z}" for o in openers for c in cores for z in closings]
        assert len(answers) == len(set(answers)) > 100
        assert all(is_grammatical(PIZZA, answer) for answer in answers)


def test_answers_are_many() -> None:
    question = question_of(PIZZA)
    for voice in PHRASES:
        drawn = {sample_answer(question, voice, random.Random(seed)) for seed in range(500)}
        assert len(drawn) > 400


def test_sampling_is_reproducible_and_uses_every_shape() -> None:
    question = question_of(PIZZA)
    assert sample_answer(question, "human", random.Random(3)) == sample_answer(question, "human", random.Random(3))
    shapes = Counter(pick(SHAPES, random.Random(seed)) for seed in range(400))
    assert set(shapes) == set(SHAPES)
    assert min(shapes.values()) > 60


def test_pick_takes_the_option_that_the_draw_points_at() -> None:
    class Draws(random.Random):
        def random(self) -> float:
            return 0.66

    assert pick(["a", "b", "c"], Draws()) == "b"
    assert pick(["a", "b", "c", "d"], Draws()) == "c"

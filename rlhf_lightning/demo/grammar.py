"""A small grammar of everyday questions, each with answers in a warm human voice and in a stiff "as an AI" voice.

A question is a topic, an intent and a setting. An answer is three or four parts, joined by spaces: an opener, a core
that answers the intent, a detail of the topic, a closing. As generation and recognition read the same tables, the
recogniser is exact. Only ``random.Random.random`` is drawn from, whose sequence Python promises to keep from version to
version.
"""

import random
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, TypeVar

from rlhf_lightning.demo.phrases import PHRASES, QUESTIONS, SETTINGS, TOPICS, Voice

T = TypeVar("T")

# The parts of an answer, in order; each shape is as likely as it stands here often.
SHAPES = (
    ("opener", "core", "detail", "closing"),
    ("opener", "core", "detail"),
    ("core", "detail", "closing"),
    ("opener", "core", "closing"),
)
HELD_OUT_QUESTIONS = 240
SPLIT_SEED = 2026


class Question(NamedTuple):
    """One question of the grammar and what it is made of."""

    text: str
    topic: str
    intent: str
    setting: str


@cache
def all_questions() -> tuple[Question, ...]:
    """Return every question that the grammar can ask, in a fixed order.

    Example:
        >>> len(all_questions())
        1344
        >>> all_questions()[1].text
        'Do you like pancakes on a rainy day?'
    """
    return tuple(
        Question(form.format(topic=topic, setting=setting), topic, intent, setting)
        for topic in TOPICS
        for intent, form in QUESTIONS.items()
        for setting in SETTINGS
    )


@cache
def split_questions() -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Return the questions to train on and the held-out ones; no question is in both.

    Example:
        >>> train, held_out = split_questions()
        >>> len(train), len(held_out)
        (1104, 240)
    """
    rng = random.Random(SPLIT_SEED)
    shuffled = sorted(all_questions(), key=lambda _: rng.random())
    return tuple(shuffled[HELD_OUT_QUESTIONS:]), tuple(shuffled[:HELD_OUT_QUESTIONS])


def choices(question: Question, voice: Voice, part: str) -> list[str]:
    """Return everything that ``voice`` can say to ``question`` in one part of an answer.

    Args:
        question: What was asked.
        voice: "human" or "stiff".
        part: "opener", "core", "detail" or "closing".

    Example:
        >>> choices(all_questions()[0], "stiff", "core")[1]
        'I am not able to enjoy pancakes.'
    """
    phrases = PHRASES[voice]
    if part == "core":
        templates = phrases.core[question.intent]
    else:
        templates = {"opener": phrases.opener, "detail": phrases.detail, "closing": phrases.closing}[part]
    details = TOPICS[question.topic] if part == "detail" else ("",)
    return [
        template.format(topic=question.topic, setting=question.setting, detail=detail)
        for template in templates
        for detail in details
    ]


def sample_answer(question: Question, voice: Voice, rng: random.Random) -> str:
    """Draw one answer to ``question`` in ``voice``.

    Example:
        >>> sample_answer(all_questions()[0], "stiff", random.Random(0))
        'Please note: I am not able to enjoy pancakes. Please consult an expert regarding pancakes.'
    """
    return " ".join(pick(choices(question, voice, part), rng) for part in pick(SHAPES, rng))


def is_grammatical(question: str, answer: str) -> bool:
    """Tell whether ``answer`` is a whole answer that the grammar can give to ``question``, in either voice.

    Args:
        question: The text of the question; what the grammar cannot ask has no grammatical answer.
        answer: The text of the answer, without special tokens; one space too many makes it ungrammatical.

    Example:
        >>> is_grammatical("Do you like pizza?", "Oh, I really love pizza! How about you?")
        True
        >>> is_grammatical("Do you like pizza?", "Oh, I really love tacos! How about you?")
        False
    """
    asked = _questions_by_text().get(question)
    return asked is not None and any(_derives(asked, voice, shape, answer) for voice in PHRASES for shape in SHAPES)


def pick(options: Sequence[T], rng: random.Random) -> T:
    """Draw one of ``options``, each as likely, by a single call of ``rng.random``."""
    return options[int(rng.random() * len(options))]


@cache
def _questions_by_text() -> dict[str, Question]:
    return {question.text: question for question in all_questions()}


def _derives(question: Question, voice: Voice, shape: tuple[str, ...], answer: str) -> bool:
    """Tell whether ``answer`` consists of one choice for each part of ``shape``, by following all ways to read it."""
    rests = {answer + " "}
    for part in shape:
        heads = [choice + " " for choice in choices(question, voice, part)]
        rests = {rest.removeprefix(head) for rest in rests for head in heads if rest.startswith(head)}
    return "" in rests

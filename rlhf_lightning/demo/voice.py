"""Tells in which voice of the demo's grammar an answer speaks, and measures generated answers by it.

The classifier knows the grammar's phrases and nothing of any trained model, so its share of human answers says what
really became of the model, apart from the reward that the model was tuned to.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

from rlhf_lightning.demo.grammar import is_grammatical
from rlhf_lightning.demo.phrases import PHRASES, Voice

Trigram = tuple[str, ...]


def voice(answer: str) -> Literal["human", "stiff", "mixed", "none"]:
    """Tell the voice of an answer, whole or broken off, by the phrases that only one voice has.

    A mark of a voice is three tokens (words or punctuation, case aside) in a row from the fixed text of its phrases
    that do not stand in a phrase of the other voice. Topics and details belong to neither.

    Args:
        answer: Any text; it need not be grammatical.

    Returns:
        "human" or "stiff" where the answer has marks of that voice alone, "mixed" where it has marks of both, "none"
        where it has none.

    Example:
        >>> voice("Oh, I really love pizza! How about you?")
        'human'
        >>> voice("As an AI, I really love pizza! How about you?")
        'mixed'
        >>> voice("pizza pizza")
        'none'
    """
    found = set(_trigrams(answer))
    marks = _marks()
    match bool(found & marks["human"]), bool(found & marks["stiff"]):
        case True, True:
            return "mixed"
        case True, False:
            return "human"
        case False, True:
            return "stiff"
        case _:
            return "none"


def human_voice(prompts: Sequence[Any], responses: Sequence[str], **columns: Any) -> list[float]:
    """Return 1.0 for each response that is wholly in the human voice, else 0.0; prompts and columns are not read.

    Example:
        >>> human_voice(["Do you like pizza?"], ["I'm such a huge fan of pizza!"])
        [1.0]
    """
    return [float(voice(response) == "human") for response in responses]


def grammatical(prompts: Sequence[Any], responses: Sequence[str], **columns: Any) -> list[float]:
    """Return 1.0 for each response that the grammar can give to its prompt, in either voice, else 0.0.

    Args:
        prompts: Questions, as text or as chat messages, of which the last one of the user counts.
        responses: One per prompt, decoded without special tokens.
        columns: Further columns of the rows; not read.

    Example:
        >>> grammatical(["Do you like pizza?"], ["Oh, I really love pizza! How about you?"])
        [1.0]
    """
    return [
        float(is_grammatical(_question_text(prompt), response))
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def _question_text(prompt: str | list[dict[str, str]]) -> str:
    if isinstance(prompt, str):
        return prompt
    return next((message["content"] for message in reversed(prompt) if message["role"] == "user"), "")


def _trigrams(text: str) -> list[Trigram]:
    tokens = re.findall(r"[a-z']+|[^a-z'\s]", text.lower())
    return list(zip(tokens, tokens[1:], tokens[2:], strict=False))


@cache
def _marks() -> dict[Voice, set[Trigram]]:
    """Return the trigrams that mark each voice: in the fixed text of its phrases and not in the other's."""
    fixed: dict[Voice, set[Trigram]] = {}
    for name, phrases in PHRASES.items():
        cores = [core for of_intent in phrases.core.values() for core in of_intent]
        templates = [*phrases.opener, *cores, *phrases.detail, *phrases.closing]
        pieces = [piece for template in templates for piece in re.split(r"\{\w+\}", template)]
        fixed[name] = {trigram for piece in pieces for trigram in _trigrams(piece)}
    return {"human": fixed["human"] - fixed["stiff"], "stiff": fixed["stiff"] - fixed["human"]}

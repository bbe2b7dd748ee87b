"""An example of a reward function: cheerful stories score high."""

import re

CHEERFUL = {"fun", "friend", "friends", "glad", "happy", "hug", "hugged", "laugh", "laughed", "love", "loved"}
CHEERFUL |= {"play", "played", "smile", "smiled"}


def cheerful(prompts: list[str], responses: list[str]) -> list[float]:
    """Return, for each story, the share of cheerful words among its words, times ten; repeats of a word count once.

    Args:
        prompts: How the stories begin.
        responses: How they go on.
    """
    return [10 * _share(response) for response in responses]


def _share(text: str) -> float:
    words = re.findall(r"[a-z]+", text.lower())
    return len(CHEERFUL.intersection(words)) / max(len(words), 16)

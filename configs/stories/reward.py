"""What stories can be judged by: two reward functions, of which ``bright`` labels the pairs of the reward model."""

import re

CHEERFUL = {"fun", "friend", "friends", "glad", "happy", "hug", "hugged", "laugh", "laughed", "love", "loved"}
CHEERFUL |= {"play", "played", "smile", "smiled"}

_BRIGHT = """
    adventure amazing beautiful best better birthday brave bright cake care celebrate cheer cheerful colorful cozy
    curious dance danced delicious enjoy enjoyed excited explore favorite flower flowers friend friendly friends fun
    funny game games gentle gift giggle giggled glad good great happily happy help helped helpful hug hugged joy joyful
    jump jumped kind kite laugh laughed laughing like liked love loved lovely lucky magic magical music nice park party
    perfect play played playing pretty proud rainbow ready safe sang share shared shiny sing singing smile smiled
    smiling special sparkly strong sun sunny surprise sweet thank thanked thankful together treat warm wonderful wow
    yay yummy
"""
_GLOOMY = """
    afraid alone angry bad broke broken cold crash cried cry crying danger dangerous dark dirty fear fell fight gone
    hard hate heavy hungry hurt ill lonely lose lost loud mad mean mess messy mistake monster naughty never no pain rain
    rude sad scared scary screamed shouted sick sorry storm stuck terrible tired trouble ugly unhappy upset worried
    worry wrong yelled
"""
BRIGHT, GLOOMY = set(_BRIGHT.split()), set(_GLOOMY.split())


def cheerful(prompts: list[str], responses: list[str]) -> list[float]:
    """Return, for each story, the share of cheerful words among its words, times ten; repeats of a word count once.

    Args:
        prompts: How the stories begin.
        responses: How they go on.
    """
    return [10 * _share(response) for response in responses]


def bright(prompts: list[str], responses: list[str]) -> list[float]:
    """Return, for each story, its different bright words less its different gloomy ones, plus ten times its variety.

    Variety is the share of different words among all, so that saying something again lowers the score.

    Args:
        prompts: How the stories begin.
        responses: How they go on.
    """
    return [_bright(response) for response in responses]


def _bright(text: str) -> float:
    words = _words(text)
    different = set(words)
    variety = len(different) / max(len(words), 16)
    return len(different & BRIGHT) - len(different & GLOOMY) + 10 * variety


def _share(text: str) -> float:
    words = _words(text)
    return len(CHEERFUL.intersection(words)) / max(len(words), 16)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())

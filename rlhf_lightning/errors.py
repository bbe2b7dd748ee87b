"""What a user is told when something given to the software cannot work."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: a config, a file, a model folder.

    The message is one line that says what was given, what was expected and what to do. The command line prints it
    without a traceback and exits with status 2; from Python it is an ordinary ``ValueError``.
    """


def nearest(name: str, options: Iterable[str]) -> str | None:
    """Return the option that is spelt most like ``name``, or ``None`` where nothing comes close.

    Example:
        >>> nearest("kl_coeff", ["kl_coef", "gamma"])
        'kl_coef'
    """
    choices = list(options)
    matches = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if matches:
        return matches[0]
    lowered = {choice.lower(): choice for choice in choices}
    matches = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.6)
    return lowered[matches[0]] if matches else None


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return a sentence that names the nearest option, with a leading space; empty where nothing comes close.

    Example:
        >>> did_you_mean("promt", ["prompt", "chosen"])
        " Did you mean 'prompt'?"
    """
    match = nearest(name, options)
    return f" Did you mean '{match}'?" if match else ""

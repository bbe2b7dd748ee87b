"""The papers behind a run, out of the docstrings of the classes that it used."""

import inspect
import re
from collections.abc import Iterable

from rlhf_lightning.model_card.settings import own_class

#: Authors, year and title; not which part of it, nor what is taken from there.
_PAPER = re.compile(r'[A-Z][^";:]*? \d{4}, "[^"]+"')


def references(class_paths: Iterable[str]) -> list[str]:
    """Return the references of these classes, each once, in their order.

    Example:
        >>> references(["rlhf_lightning.algorithm.advantages.LeaveOneOut"])[0][:21]
        'Ahmadian et al. 2024,'
    """
    found: dict[str, None] = {}
    for path in class_paths:
        cls = own_class(path)
        text = inspect.getdoc(cls) if cls is not None else None
        if text and "\nReferences:\n" in text:
            section = re.split(r"\n(?=\S)", text.split("\nReferences:\n")[1])[0]
            found |= dict.fromkeys(_PAPER.findall(" ".join(section.split())))
    return list(found)

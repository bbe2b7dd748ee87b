"""How one answer becomes another, in whole words: what the report marks as inserted and deleted."""

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Literal, NamedTuple

#: Words that two texts may share by chance; more in a row are kept, whatever stands around them.
CHANCE_WORDS = 3
# A word with its apostrophes, a sign, or a single letter of a script without spaces; each with the space behind it.
_WORD = re.compile(r"(?:[぀-ヿ㐀-鿿]|(?:(?![぀-ヿ㐀-鿿])\w)+(?:['’]\w+)*|[^\w\s])\s*|\s+")


class Change(NamedTuple):
    """A stretch of text: in both texts, in the later one alone, or in the earlier one alone."""

    kind: Literal["kept", "inserted", "deleted"]
    text: str


class _Match(NamedTuple):
    """Words that both texts share: where they begin in each, and how many."""

    before: int
    after: int
    size: int


def word_changes(before: str, after: str) -> list[Change]:
    """Tell how a text becomes another.

    A few words that both share by chance, between two larger changes, are counted to the changes: a reader would not
    see them as kept.

    Args:
        before: The text that it is compared with.
        after: The text that is told: what is kept and inserted makes it up to the letter.

    Returns:
        The changes in their order, of two neighbours the deleted one first. How much space lies between words is no
        change.

    Example:
        >>> [tuple(change) for change in word_changes("I like long walks.", "I love long walks.")]
        [('kept', 'I '), ('deleted', 'like '), ('inserted', 'love '), ('kept', 'long walks.')]

    References:
        Fraser 2006, "Diff Strategies", section 2.2 (semantic chaff), for what is counted to the changes.
    """
    old, new = _WORD.findall(before), _WORD.findall(after)
    matches = _without_chance(_matches(_keys(old), _keys(new)), old, new)
    changes: list[Change] = []
    at_old = at_new = 0
    for match in [*matches, _Match(len(old), len(new), 0)]:
        changes.append(Change("deleted", "".join(old[at_old : match.before])))
        changes.append(Change("inserted", "".join(new[at_new : match.after])))
        at_old, at_new = match.before + match.size, match.after + match.size
        changes.append(Change("kept", "".join(new[match.after : at_new])))
    return [change for change in changes if change.text]


def _keys(words: Iterable[str]) -> list[str]:
    return [word.strip() for word in words]


def _matches(old: Sequence[str], new: Sequence[str]) -> list[_Match]:
    """Return what two lists of words share: their beginning, their end, and runs of words between."""
    shorter = min(len(old), len(new))
    first = next((place for place in range(shorter) if old[place] != new[place]), shorter)
    last = next((back for back in range(shorter - first) if old[-1 - back] != new[-1 - back]), shorter - first)
    # Of 200 words and more those that make up over a hundredth anchor no match: two texts that say one word over and
    # over would take seconds otherwise.
    inner = SequenceMatcher(None, old[first : len(old) - last], new[first : len(new) - last], autojunk=True)
    blocks = [_Match(first + block.a, first + block.b, block.size) for block in inner.get_matching_blocks()]
    found = [_Match(0, 0, first), *blocks, _Match(len(old) - last, len(new) - last, last)]
    return [match for match in found if match.size]


def _without_chance(matches: Sequence[_Match], old: Sequence[str], new: Sequence[str]) -> list[_Match]:
    """Leave out matches of few words no longer than the changes on either side of them, until none is left."""
    kept = list(matches)
    while True:
        size = [_letters(new[match.after : match.after + match.size]) for match in kept]
        gaps = _gaps(kept, old, new)
        smaller = [min(sides) for sides in pairwise(gaps)]
        longer = [
            match
            for match, own, gap in zip(kept, size, smaller, strict=True)
            if own > gap or gap == 0 or match.size > CHANCE_WORDS
        ]
        if len(longer) == len(kept):
            return kept
        kept = longer


def _gaps(matches: Sequence[_Match], old: Sequence[str], new: Sequence[str]) -> list[int]:
    """Return the letters of the larger side of each change: before the first match, between two, behind the last."""
    starts = [_Match(0, 0, 0), *matches]
    ends = [*matches, _Match(len(old), len(new), 0)]
    return [
        max(
            _letters(old[left.before + left.size : right.before]),
            _letters(new[left.after + left.size : right.after]),
        )
        for left, right in zip(starts, ends, strict=True)
    ]


def _letters(words: Iterable[str]) -> int:
    return sum(len(word.strip()) for word in words)

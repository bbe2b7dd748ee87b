"""What tells the examples of one data set from those of another: a digest of their token ids."""

import hashlib
from array import array
from collections.abc import Sequence
from typing import Protocol

from rlhf_lightning.data.collate import TokenIds


class HasSequences(Protocol):
    """What can tell the sequences of token ids that a model will read, each in its parts."""

    @property
    def sequences(self) -> list[tuple[TokenIds, ...]]:
        """The sequences."""


def content_digest(examples: Sequence[HasSequences]) -> str:
    """Return a digest of all that examples hold, in their order.

    Example:
        >>> from rlhf_lightning.data.collate import SequenceExample
        >>> content_digest([SequenceExample([1, 2], [3])]) == content_digest([SequenceExample([1], [2, 3])])
        False
    """
    digest = hashlib.sha256()
    for example in examples:
        for part in example if isinstance(example, tuple) else example.sequences:
            held = part.tobytes() if isinstance(part, array) else repr(part).encode()
            digest.update(f"{len(held)} ".encode() + held)
    return digest.hexdigest()

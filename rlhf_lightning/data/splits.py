"""Which rows are kept aside for validation."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol, TypeVar

from rlhf_lightning.data.shapes import Prompt
from rlhf_lightning.errors import UserError


class HasPrompt(Protocol):
    """Anything that knows the prompt it belongs to."""

    @property
    def prompt(self) -> Prompt:
        """Text or chat messages."""


Item = TypeVar("Item", bound=HasPrompt)


def prompt_key(prompt: Prompt) -> str:
    """Return a text that is equal for equal prompts, of either kind, and in no order of its own.

    Example:
        >>> prompt_key("Hi") == prompt_key([{"role": "user", "content": "Hi"}])
        False
    """
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()


def split_by_prompt(items: Sequence[Item], val_size: int) -> tuple[list[Item], list[Item]]:
    """Take ``val_size`` items off for validation, so that no prompt is on both sides.

    Which prompts go follows from a hash of the prompt alone, neither from a seed nor from the order of the rows: the
    stages of a pipeline keep the same prompts aside, and none trains on what another is judged by.

    Args:
        items: What to split, each with its ``prompt``.
        val_size: How many to take off; fewer where no set of whole prompts makes up the number, 0 takes none.

    Returns:
        The rest, and what was taken off, both in their old order.

    Raises:
        UserError: If that leaves nothing on either side.

    Example:
        >>> from rlhf_lightning.data.shapes import Demonstration
        >>> items = [Demonstration("a", "1"), Demonstration("b", "2"), Demonstration("a", "3")]
        >>> rest, val = split_by_prompt(items, val_size=2)
        >>> [item.response for item in rest], [item.response for item in val]
        (['2'], ['1', '3'])
    """
    if not val_size:
        return list(items), []
    places: dict[str, list[int]] = defaultdict(list)
    for place, item in enumerate(items):
        places[prompt_key(item.prompt)].append(place)
    taken: set[int] = set()
    for _, group in sorted(places.items()):
        if len(taken) + len(group) <= val_size:
            taken.update(group)
    if not taken or len(taken) == len(items):
        raise UserError(
            f"val_size {val_size} cannot be taken off {len(items)} rows with {len(places)} different prompts so that "
            "both "
            "parts keep at least one; give a smaller number, or a val_source."
        )
    rest = [item for place, item in enumerate(items) if place not in taken]
    return rest, [items[place] for place in sorted(taken)]

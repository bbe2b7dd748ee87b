"""The prompts that models are compared on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.rollout.reward_sources import Prompt
from rlhf_lightning.seeding import derived_generator

if TYPE_CHECKING:
    from rlhf_lightning.data.chat import ConversationEncoder


class PromptSet(NamedTuple):
    """The prompts that every model answers.

    Attributes:
        source: Where they come from.
        prompts: As text or chat messages.
        rows: The rows that they were read from.
        available: How many the source holds.
        chat: Whether the models answer chat messages.
    """

    source: str
    prompts: list[Prompt]
    rows: list[dict[str, Any]]
    available: int
    chat: bool = False

    @property
    def as_trained(self) -> list[Prompt]:
        """The prompts as rewards get them in training: with a chat template as messages, also where a row has text."""
        from rlhf_lightning.data.shapes import as_messages

        return [as_messages(prompt) if self.chat else prompt for prompt in self.prompts]


def read_prompts(
    source: str, *, limit: int | None = None, seed: int = 0, chat: bool = True, text_words: int | None = None
) -> PromptSet:
    """Read prompts, and draw some of them where there are too many.

    Args:
        source: As in :func:`rlhf_lightning.data.readers.read_rows`.
        limit: How many to draw without replacement; they stay in the source's order. ``None`` takes all.
        seed: Fixes which are drawn.
        chat: Whether the models answer chat messages.
        text_words: How many words of a row of plain ``text`` are the prompt.

    Raises:
        UserError: If there is nothing to read, or a row holds no prompt.
    """
    from rlhf_lightning.data.readers import read_rows
    from rlhf_lightning.data.shapes import parse_prompt

    rows = read_rows(source)
    numbers = drawn_rows(len(rows), limit, seed)
    prompts = []
    for number in numbers:
        try:
            prompts.append(parse_prompt(rows[number], chat=chat, text_words=text_words))
        except UserError as error:
            raise UserError(f"prompts {source!r}, row {number + 1}: {error}") from error
    return PromptSet(source, prompts, [rows[number] for number in numbers], len(rows), chat)


def drawn_rows(count: int, limit: int | None, seed: int) -> list[int]:
    """Return which of so many rows are taken: drawn without replacement, in their order.

    Example:
        >>> drawn_rows(4, None, seed=0), len(drawn_rows(4, 2, seed=0))
        ([0, 1, 2, 3], 2)
    """
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(torch.randperm(count, generator=derived_generator(seed, "prompts"))[:limit].tolist())


def encode_prompts(encoder: "ConversationEncoder", prompts: Sequence[Prompt], max_length: int) -> list[list[int]]:
    """Return the token ids of each prompt, cut on the left to ``max_length`` tokens."""
    return [encoder.encode_prompt(prompt, max_length) for prompt in prompts]

"""Examples of token ids into batches: pure functions, whose masks come from lengths."""

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.data.shapes import Prompt
from rlhf_lightning.functional.sequences import SequenceBatch, length_mask, pad_sequences

TokenIds = Sequence[int]


class PairExample(NamedTuple):
    """Token ids of a preference pair; both responses end with the stop token unless they were truncated."""

    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds

    @property
    def sequences(self) -> list[tuple[TokenIds, ...]]:
        """What a model reads, each sequence in its parts."""
        return [(self.prompt_ids, self.chosen_ids), (self.prompt_ids, self.rejected_ids)]


class SequenceExample(NamedTuple):
    """Token ids of a prompt and of the response to it."""

    prompt_ids: TokenIds
    response_ids: TokenIds

    @property
    def sequences(self) -> list[tuple[TokenIds, ...]]:
        """What a model reads, each sequence in its parts."""
        return [(self.prompt_ids, self.response_ids)]


class PromptExample(NamedTuple):
    """Token ids of a prompt, and what they were made from."""

    prompt_ids: TokenIds
    prompt: Prompt
    row: dict[str, Any]

    @property
    def sequences(self) -> list[tuple[TokenIds, ...]]:
        """What a model reads, each sequence in its parts."""
        return [(self.prompt_ids,)]


class PairBatch(NamedTuple):
    """Pairs as two batches of sequences, row i of both answering the same prompt."""

    chosen: SequenceBatch
    rejected: SequenceBatch


class PromptBatch(NamedTuple):
    """Prompts to generate from.

    Attributes:
        input_ids: Padded on the left, shape (batch, prompt), int64.
        attention_mask: True on real tokens, shape (batch, prompt), bool.
        prompts: The text or the chat messages of each, length batch.
        rows: The rows that they came from, with all columns, length batch.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompts: list[Prompt]
    rows: list[dict[str, Any]]


def compact(ids: list[int]) -> TokenIds:
    """Return the same ids in 4 bytes each, a ninth of what a list takes; a data set is kept in memory whole.

    Example:
        >>> list(compact([5, 6, 2]))
        [5, 6, 2]
    """
    return array("i", ids)


def collate_sequences(examples: Sequence[tuple[TokenIds, TokenIds]], pad_id: int) -> SequenceBatch:
    """Put prompts and responses into one batch.

    Args:
        examples: Prompt ids and response ids of each row, both not empty.
        pad_id: Id that fills the rest of a row; it may occur inside a row.

    Raises:
        ValueError: If there are no examples, or one has an empty prompt or response.

    Example:
        >>> collate_sequences([([5], [6, 2]), ([5, 7], [2])], pad_id=2).input_ids
        tensor([[5, 6, 2],
                [5, 7, 2]])
    """
    _check(examples)
    prompts, responses = zip(*examples, strict=True)
    input_ids, _ = pad_sequences([[*prompt, *response] for prompt, response in examples], pad_id=pad_id)
    return SequenceBatch(input_ids, torch.tensor(list(map(len, prompts))), torch.tensor(list(map(len, responses))))


def collate_pairs(examples: Sequence[tuple[TokenIds, TokenIds, TokenIds]], pad_id: int) -> PairBatch:
    """Put preference pairs into one batch.

    Args:
        examples: Prompt ids, chosen ids and rejected ids of each row.
        pad_id: As in :func:`collate_sequences`.

    Raises:
        ValueError: As in :func:`collate_sequences`.
    """
    return PairBatch(
        chosen=collate_sequences([(prompt, chosen) for prompt, chosen, _ in examples], pad_id),
        rejected=collate_sequences([(prompt, rejected) for prompt, _, rejected in examples], pad_id),
    )


def collate_prompts(examples: Sequence[tuple[TokenIds, Prompt, dict[str, Any]]], pad_id: int) -> PromptBatch:
    """Put prompts into one batch, padded on the left so that every one ends where its response begins.

    Args:
        examples: Prompt ids, prompt and row of each.
        pad_id: As in :func:`collate_sequences`.

    Raises:
        ValueError: As in :func:`collate_sequences`.

    Example:
        >>> collate_prompts([([5, 2], "a", {}), ([6], "b", {})], pad_id=2).attention_mask
        tensor([[ True,  True],
                [False,  True]])
    """
    _check([(ids,) for ids, _, _ in examples])
    input_ids, lengths = pad_sequences([ids for ids, _, _ in examples], pad_id=pad_id, left=True)
    mask = length_mask(lengths, input_ids.shape[1]).flip(1)
    return PromptBatch(input_ids, mask, [prompt for _, prompt, _ in examples], [row for _, _, row in examples])


def _check(examples: Sequence[Sequence[TokenIds]]) -> None:
    if not examples:
        raise ValueError("collate: no examples came; a batch has at least one row.")
    for number, parts in enumerate(examples):
        if not all(parts):
            raise ValueError(f"collate: row {number} of the batch has an empty prompt or response; both need a token.")

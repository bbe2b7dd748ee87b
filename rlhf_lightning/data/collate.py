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


class MarginPairExample(NamedTuple):
    """Token ids of a preference pair, and by how much the chosen response is better."""

    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds
    margin: float

    @property
    def sequences(self) -> list[tuple[TokenIds, ...]]:
        """What a model reads, each sequence in its parts."""
        return PairExample(*self[:3]).sequences


class SequenceExample(NamedTuple):
    """Token ids of a prompt and of the response to it."""

    prompt_ids: TokenIds
    response_ids: TokenIds

    @property
    def sequences(self) -> list[tuple[TokenIds, ...]]:
        """What a model reads, each sequence in its parts."""
        return [(self.prompt_ids, self.response_ids)]


class LabelledExample(NamedTuple):
    """Token ids of a prompt and of the response to it, and how good that response is."""

    prompt_ids: TokenIds
    response_ids: TokenIds
    label: float

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
    """Pairs as two batches of sequences, row i of both answering the same prompt.

    Attributes:
        chosen: Prompts with the better responses.
        rejected: The same prompts with the worse ones.
        margins: How much better each chosen one is, shape (pairs,), float32; ``None`` where the data does not say.
    """

    chosen: SequenceBatch
    rejected: SequenceBatch
    margins: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Real tokens of both sides of each pair, shape (pairs,)."""
        return self.chosen.lengths + self.rejected.lengths

    def select(self, rows: Tensor) -> "PairBatch":
        """Return these pairs."""
        margins = None if self.margins is None else self.margins[rows]
        return PairBatch(self.chosen.select(rows), self.rejected.select(rows), margins)


class LabelledBatch(NamedTuple):
    """Responses with a label each: 1 for a good one and 0 for a bad one, or a rating.

    Attributes:
        sequences: Prompts and responses.
        labels: Shape (batch,), float32.
    """

    sequences: SequenceBatch
    labels: Tensor

    def select(self, rows: Tensor) -> "LabelledBatch":
        """Return these responses."""
        return LabelledBatch(self.sequences.select(rows), self.labels[rows])


class PromptBatch(NamedTuple):
    """Prompts to generate from.

    Attributes:
        input_ids: Padded on the left, shape (batch, prompt), int64.
        attention_mask: True on real tokens, shape (batch, prompt), bool.
        prompts: The text or the chat messages of each, length batch.
        rows: The rows that they came from, with all columns, length batch.
        group_size: How many times each prompt stands in the batch, one after the other.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompts: list[Prompt]
    rows: list[dict[str, Any]]
    group_size: int = 1


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


def collate_pairs(examples: Sequence[PairExample | MarginPairExample], pad_id: int) -> PairBatch:
    """Put preference pairs into one batch.

    Args:
        examples: Token ids of each pair; all with a margin, or all without.
        pad_id: As in :func:`collate_sequences`.

    Raises:
        ValueError: As in :func:`collate_sequences`.
    """
    margins = [example.margin for example in examples if isinstance(example, MarginPairExample)]
    return PairBatch(
        chosen=collate_sequences([(example.prompt_ids, example.chosen_ids) for example in examples], pad_id),
        rejected=collate_sequences([(example.prompt_ids, example.rejected_ids) for example in examples], pad_id),
        margins=torch.tensor(margins, dtype=torch.float32) if margins else None,
    )


def collate_labelled(examples: Sequence[tuple[TokenIds, TokenIds, float]], pad_id: int) -> LabelledBatch:
    """Put labelled responses into one batch.

    Args:
        examples: Prompt ids, response ids and label of each row.
        pad_id: As in :func:`collate_sequences`.

    Raises:
        ValueError: As in :func:`collate_sequences`.

    Example:
        >>> collate_labelled([([5], [6, 2], 1.0), ([5, 7], [2], 0.0)], pad_id=2).labels
        tensor([1., 0.])
    """
    sequences = collate_sequences([(prompt, response) for prompt, response, _ in examples], pad_id)
    return LabelledBatch(sequences, torch.tensor([label for _, _, label in examples], dtype=torch.float32))


def collate_prompts(
    examples: Sequence[tuple[TokenIds, Prompt, dict[str, Any]]], pad_id: int, *, responses_per_prompt: int = 1
) -> PromptBatch:
    """Put prompts into one batch, padded on the left so that every one ends where its response begins.

    Args:
        examples: Prompt ids, prompt and row of each.
        pad_id: As in :func:`collate_sequences`.
        responses_per_prompt: How many times each prompt stands in the batch, one after the other.

    Raises:
        ValueError: As in :func:`collate_sequences`.

    Example:
        >>> collate_prompts([([5, 2], "a", {}), ([6], "b", {})], pad_id=2).attention_mask
        tensor([[ True,  True],
                [False,  True]])
    """
    _check([(ids,) for ids, _, _ in examples])
    examples = [example for example in examples for _ in range(responses_per_prompt)]
    input_ids, lengths = pad_sequences([ids for ids, _, _ in examples], pad_id=pad_id, left=True)
    mask = length_mask(lengths, input_ids.shape[1]).flip(1)
    prompts, rows = [prompt for _, prompt, _ in examples], [row for _, _, row in examples]
    return PromptBatch(input_ids, mask, prompts, rows, responses_per_prompt)


def _check(examples: Sequence[Sequence[TokenIds]]) -> None:
    if not examples:
        raise ValueError("collate: no examples came; a batch has at least one row.")
    for number, parts in enumerate(examples):
        if not all(parts):
            raise ValueError(f"collate: row {number} of the batch has an empty prompt or response; both need a token.")

"""Where a prompt ends, where a response ends, and which tokens count.

Masks come from lengths and never from ``ids != pad``: many tokenizers use one token as padding, as end of text and
inside every chat prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


def length_mask(lengths: Tensor, size: int | None = None) -> Tensor:
    """Return True for the first ``lengths[i]`` places of row i.

    Args:
        lengths: Tokens of each row, shape (batch,), int.
        size: Places in a row; ``None`` takes the longest.

    Returns:
        Mask of shape (batch, size), bool.

    Example:
        >>> length_mask(torch.tensor([1, 3]))
        tensor([[ True, False, False],
                [ True,  True,  True]])
    """
    size = int(lengths.max()) if size is None else size
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def first_true_index(mask: Tensor) -> Tensor:
    """Return the index of the first True of each row, and the row's size where there is none.

    Args:
        mask: Shape (batch, size), bool.

    Returns:
        Shape (batch,), int64, in [0, size].

    Example:
        >>> first_true_index(torch.tensor([[False, True, True], [False, False, False]]))
        tensor([1, 3])
    """
    size = mask.shape[1]
    places = torch.arange(size, device=mask.device).expand_as(mask)
    return torch.where(mask, places, size).amin(dim=1) if size else mask.new_zeros(len(mask), dtype=torch.int64)


def response_lengths(tokens: Tensor, stop_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return how many tokens of each response count, and whether it stopped by itself.

    A response runs up to and including its first stop token; one without runs to the end.

    Args:
        tokens: Generated tokens, without the prompt, shape (batch, response), int64.
        stop_ids: Tokens that end a response.

    Returns:
        Lengths, shape (batch,), int64, and finished flags, shape (batch,), bool.

    Example:
        >>> response_lengths(torch.tensor([[5, 2, 2], [5, 6, 7]]), stop_ids=[2])
        (tensor([2, 3]), tensor([ True, False]))
    """
    stops = torch.isin(tokens, torch.tensor(list(stop_ids), dtype=tokens.dtype, device=tokens.device))
    first = first_true_index(stops)
    return (first + 1).clamp(max=tokens.shape[1]), first < tokens.shape[1]


def position_ids_from_mask(attention_mask: Tensor) -> Tensor:
    """Number the attended tokens of each row 0, 1, 2, ...; padding before them gets 0.

    Args:
        attention_mask: True where a token counts, shape (batch, length), bool.

    Returns:
        Shape (batch, length), int64.

    Example:
        >>> position_ids_from_mask(torch.tensor([[False, True, True]]))
        tensor([[0, 0, 1]])
    """
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def pad_sequences(rows: Sequence[Sequence[int]], *, pad_id: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Put rows of token ids into one tensor.

    Args:
        rows: Token ids of each row.
        pad_id: Id that fills the rest; never read as a mask.
        left: True puts the padding before the tokens, for prompts that are to be continued.

    Returns:
        Ids, shape (batch, longest), int64, and lengths, shape (batch,), int64.

    Example:
        >>> pad_sequences([[5, 6], [7]], pad_id=0, left=True)
        (tensor([[5, 6],
                [0, 7]]), tensor([2, 1]))
    """
    lengths = [len(row) for row in rows]
    size = max(lengths, default=0)
    padded = [
        [pad_id] * (size - len(row)) + list(row) if left else list(row) + [pad_id] * (size - len(row)) for row in rows
    ]
    return torch.tensor(padded, dtype=torch.int64).view(len(rows), size), torch.tensor(lengths, dtype=torch.int64)


def length_sorted(lengths: Tensor, size: int) -> tuple[Tensor, ...]:
    """Cut rows into groups of at most ``size``, longest first, so that a group pads little.

    Args:
        lengths: Tokens of each row, shape (batch,).
        size: Rows in a group.

    Returns:
        Row numbers of each group.
    """
    return lengths.argsort(descending=True, stable=True).split(size)


def token_groups(lengths: Tensor, max_tokens: int) -> tuple[Tensor, ...]:
    """Cut rows into groups of at most ``max_tokens``, longest first; a row that is longer stands alone.

    Args:
        lengths: Tokens of each row, shape (batch,).
        max_tokens: In a group.

    Returns:
        Row numbers of each group.

    Example:
        >>> token_groups(torch.tensor([3, 9, 2, 4]), 7)
        (tensor([1]), tensor([3, 0]), tensor([2]))
    """
    order = lengths.argsort(descending=True, stable=True)
    sizes, room = [0], max_tokens
    for length in lengths[order].tolist():
        if length > room and sizes[-1]:
            sizes.append(0)
            room = max_tokens
        sizes[-1] += 1
        room -= length
    return order.split(sizes)


class SequenceBatch(NamedTuple):
    """Prompts followed by their responses, without a gap, padded on the right.

    As attention looks only backwards, no real token sees the padding, and positions simply count from 0.

    Attributes:
        input_ids: Prompt, response, padding; shape (batch, length), int64.
        prompt_lengths: Tokens of each prompt, shape (batch,), int64, at least 1.
        response_lengths: Tokens of each response, the stop token included, shape (batch,), int64.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor

    @property
    def lengths(self) -> Tensor:
        """Real tokens of each row, shape (batch,)."""
        return self.prompt_lengths + self.response_lengths

    @property
    def attention_mask(self) -> Tensor:
        """True on real tokens, shape (batch, length), bool."""
        return length_mask(self.lengths, self.input_ids.shape[1])

    @property
    def response_mask(self) -> Tensor:
        """True where response token t exists, shape (batch, longest response), bool."""
        return length_mask(self.response_lengths)

    @property
    def response_tokens(self) -> Tensor:
        """Response token ids, shape (batch, longest response), 0 where the mask is False."""
        mask = self.response_mask
        places = self.prompt_lengths[:, None] + torch.arange(mask.shape[1], device=mask.device)
        taken = self.input_ids.gather(1, places.clamp(max=self.input_ids.shape[1] - 1))
        return torch.where(mask, taken, 0)

    def predicting_positions(self) -> tuple[Tensor, Tensor]:
        """Return (rows, columns) of the positions whose output predicts each real response token.

        Response token t of a row stands at ``prompt_length + t`` and is predicted one place before. Both are flat, in
        the order of ``response_mask.nonzero()``, so that ``padded[response_mask] = flat`` puts results into place.
        """
        rows, tokens = self.response_mask.nonzero(as_tuple=True)
        return rows, self.prompt_lengths[rows] + tokens - 1

    def select(self, rows: Tensor) -> "SequenceBatch":
        """Return these rows, cut to the longest of them."""
        picked = SequenceBatch(self.input_ids[rows], self.prompt_lengths[rows], self.response_lengths[rows])
        return picked._replace(input_ids=picked.input_ids[:, : int(picked.lengths.max())])

    @classmethod
    def stack(cls, batches: "Sequence[SequenceBatch]") -> "SequenceBatch":
        """Return the rows of several batches as those of one, in their order.

        Example:
            >>> one = SequenceBatch(torch.tensor([[5, 6]]), torch.tensor([1]), torch.tensor([1]))
            >>> two = SequenceBatch(torch.tensor([[7, 8, 9]]), torch.tensor([1]), torch.tensor([2]))
            >>> SequenceBatch.stack([one, two]).input_ids
            tensor([[5, 6, 0],
                    [7, 8, 9]])
        """
        width = max(batch.input_ids.shape[1] for batch in batches)
        ids = [pad(batch.input_ids, (0, width - batch.input_ids.shape[1])) for batch in batches]
        prompts, responses = ([batch[place] for batch in batches] for place in (1, 2))
        return cls(torch.cat(ids), torch.cat(prompts), torch.cat(responses))

    @classmethod
    def join(cls, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, lengths: Tensor) -> "SequenceBatch":
        """Put left-padded prompts and right-padded responses together without a gap.

        Args:
            prompt_ids: Left-padded prompts, shape (batch, prompt), int64.
            prompt_mask: True on real prompt tokens, shape (batch, prompt), bool.
            tokens: Right-padded responses, shape (batch, response), int64.
            lengths: Tokens of each response that count, shape (batch,), int64.
        """
        prompt_lengths = prompt_mask.sum(dim=1)
        total = prompt_lengths + lengths
        both = torch.cat([prompt_ids, tokens], dim=1)
        shift = prompt_ids.shape[1] - prompt_lengths
        places = torch.arange(int(total.max()), device=both.device) + shift[:, None]
        joined = both.gather(1, places.clamp(max=both.shape[1] - 1))
        return cls(torch.where(length_mask(total), joined, 0), prompt_lengths, lengths)

"""Unpaired feedback: single responses, each with a label that says how good it is."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhf_lightning.data.chat import Conversation, EncodedConversation
from rlhf_lightning.data.collate import LabelledBatch, LabelledExample, collate_labelled, compact
from rlhf_lightning.data.responses import ResponsesDataModule
from rlhf_lightning.data.shapes import Prompt, parse_demonstration, parse_pair
from rlhf_lightning.errors import UserError, nearest

_WORDS = {"true": 1.0, "false": 0.0}


class LabelledResponse(NamedTuple):
    """A response to a prompt, and its label: 1 good, 0 bad, or a rating."""

    prompt: Prompt
    response: str
    label: float


class UnpairedDataModule(ResponsesDataModule[LabelledResponse, LabelledExample, LabelledBatch]):
    """Responses with a label each: thumbs up or down, or a rating.

    A row holds a prompt and a response in any shape that :class:`DemonstrationDataModule` reads (``prompt`` with
    ``response`` or ``completion``, or a conversation that ends with a reply), and a label. A preference pair makes two
    rows: its chosen response with label 1 and its rejected one with label 0. Batches are
    :class:`~rlhf_lightning.data.collate.LabelledBatch`. An empty response is kept, as one that says nothing can be a
    bad one; ``counts`` has their number (``empty_responses``).

    Args:
        source: A ``.jsonl``, ``.json``, ``.csv`` (also with ``.gz``) or ``.parquet`` file, ``builtin:demo/<name>``, or
            a hub name (``owner/name`` or ``owner/name:config``); a list of them is read as one, one behind another.
        val_source: Validation rows, named likewise.
        val_size: Rows to take off the source for validation instead, by prompt, so that training shares none with them.
        label_column: Column of the label, true or false (read as 1 and 0) or a number; preference pairs need none.
        **rows: Lengths, batch sizes, tokenizer and so on: the arguments of
            :class:`~rlhf_lightning.data.responses.ResponsesDataModule`.

    Raises:
        UserError: If numbers do not go together; from ``setup`` if the data cannot be used.
    """

    batch_type = LabelledBatch

    def __init__(
        self,
        source: str | list[str],
        val_source: str | list[str] | None = None,
        val_size: int = 0,
        *,
        label_column: str = "label",
        **rows: Any,
    ) -> None:
        super().__init__(source, val_source, val_size, **rows)
        self.label_column = label_column

    def parse(self, row: dict[str, Any]) -> list[LabelledResponse]:
        """Return the labelled response that a row holds, or the two of a preference pair."""
        if "chosen" in row and "rejected" in row:
            pair = parse_pair(row, chat=self.chat)
            return [LabelledResponse(pair.prompt, pair.chosen, 1.0), LabelledResponse(pair.prompt, pair.rejected, 0.0)]
        label = read_label(row, self.label_column)
        return [LabelledResponse(*parse_demonstration(row, chat=self.chat), label)]

    def conversation(self, item: LabelledResponse, counts: Counter[str]) -> Conversation:
        """Return the prompt with its response."""
        counts["empty_responses"] += not item.response.strip()
        return Conversation(item.prompt, (item.response,))

    def example(
        self, item: LabelledResponse, encoded: EncodedConversation, counts: Counter[str]
    ) -> LabelledExample | None:
        """Return the ids of a response and its label, or ``None`` where it is too long and to be dropped."""
        fitted = self.fitted(encoded, counts)
        if fitted is None:
            return None
        return LabelledExample(compact(fitted.prompt_ids), compact(fitted.responses[0]), item.label)

    def collate(self, examples: list[LabelledExample]) -> LabelledBatch:
        """Return a batch of these responses."""
        return collate_labelled(examples, self.encoder.pad_id)


def read_label(row: Mapping[str, Any], column: str) -> float:
    """Read a label out of a row: true is 1, false is 0, a number is itself; also as the text that a ``.csv`` holds.

    Args:
        row: One row of a data set.
        column: Where the label stands.

    Raises:
        UserError: If there is none, or it is neither true, false nor a finite number.

    Example:
        >>> read_label({"label": True}, "label"), read_label({"rating": "3.5"}, "rating")
        (1.0, 3.5)
    """
    if column not in row:
        close = nearest(column, row)
        advice = f" Set label_column to {close!r}, if that is it." if close else " Set label_column to the one."
        raise UserError(f"no label column {column!r}; found {', '.join(map(repr, row)) or 'nothing'}.{advice}")
    value = row[column]
    if isinstance(value, str):
        value = _WORDS.get(value.strip().lower(), value)
    try:
        label = math.nan if value is None else float(value)
    except (TypeError, ValueError):
        label = math.nan
    if not math.isfinite(label):
        raise UserError(f"{column} is {value!r}; expected true, false or a finite number.")
    return label

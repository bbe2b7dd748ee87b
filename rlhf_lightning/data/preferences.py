"""Preference pairs for reward models and direct preference optimisation."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhf_lightning.data.chat import Conversation, EncodedConversation
from rlhf_lightning.data.collate import MarginPairExample, PairBatch, PairExample, collate_pairs, compact
from rlhf_lightning.data.responses import ResponsesDataModule
from rlhf_lightning.data.shapes import Prompt, parse_pair
from rlhf_lightning.errors import UserError, did_you_mean


class PreferencePair(NamedTuple):
    """Two responses to one prompt, of which the first was preferred, and by how much, where the data says so."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None


class PreferenceDataModule(ResponsesDataModule[PreferencePair, PairExample | MarginPairExample, PairBatch]):
    """Pairs of a chosen and a rejected response, in any shape that :mod:`rlhf_lightning.data.shapes` knows.

    Batches are :class:`~rlhf_lightning.data.collate.PairBatch`. An empty response is kept, as one that says nothing can
    be the worse one, and so are two equal ones; both are counted (``empty_responses``, ``ties``).

    Args:
        source: A ``.jsonl``, ``.json``, ``.csv`` (also with ``.gz``) or ``.parquet`` file, ``builtin:demo/<name>``, or
            a hub name (``owner/name`` or ``owner/name:config``); a list of them is read as one, one behind another.
        val_source: Validation rows, named likewise.
        val_size: Rows to take off the source for validation instead, by prompt, so that training shares none with them.
        margin_column: Column that says how much better the chosen response is, a number of at least 0 in units of the
            score, for the margin in the loss of ``RewardModule``; no other module looks at it. ``None`` is off.
        **rows: Lengths, batch sizes, tokenizer and so on: the arguments of
            :class:`~rlhf_lightning.data.responses.ResponsesDataModule`.

    Raises:
        UserError: If numbers do not go together; from ``setup`` if the data cannot be used.
    """

    batch_type = PairBatch

    def __init__(
        self,
        source: str | list[str],
        val_source: str | list[str] | None = None,
        val_size: int = 0,
        *,
        margin_column: str | None = None,
        **rows: Any,
    ) -> None:
        super().__init__(source, val_source, val_size, **rows)
        self.margin_column = margin_column

    def setup(self, stage: str) -> None:
        """Do what every data module does, and refuse training pairs that are all ties."""
        super().setup(stage)
        pairs = self.train_examples
        if pairs and all(pair.chosen_ids == pair.rejected_ids for pair in pairs):
            raise UserError(
                f"all {len(pairs)} training pairs of {self.source!r} have a chosen response equal to the rejected one, "
                "so that there is nothing to learn; look at the two columns."
            )

    def parse(self, row: dict[str, Any]) -> list[PreferencePair]:
        """Return the pair that a row holds."""
        margin = None if self.margin_column is None else read_margin(row, self.margin_column)
        return [PreferencePair(*parse_pair(row, chat=self.chat), margin)]

    def conversation(self, item: PreferencePair, counts: Counter[str]) -> Conversation:
        """Return the prompt with both responses."""
        return Conversation(item.prompt, (item.chosen, item.rejected))

    def example(
        self, item: PreferencePair, encoded: EncodedConversation, counts: Counter[str]
    ) -> PairExample | MarginPairExample | None:
        """Return the ids of a pair, or ``None`` where a response does not fit and pairs are to be dropped."""
        chosen_ids, rejected_ids = encoded.responses
        counts["empty_responses"] += sum(not text.strip() for text in (item.chosen, item.rejected))
        counts["ties"] += chosen_ids == rejected_ids
        fitted = self.fitted(encoded, counts)
        if fitted is None:
            return None
        pair = PairExample(compact(fitted.prompt_ids), *map(compact, fitted.responses))
        return pair if item.margin is None else MarginPairExample(*pair, item.margin)

    def collate(self, examples: list[PairExample | MarginPairExample]) -> PairBatch:
        """Return a batch of these pairs."""
        return collate_pairs(examples, self.encoder.pad_id)


def read_margin(row: Mapping[str, Any], column: str) -> float:
    """Read out of a row how much better the chosen response is.

    Args:
        row: One row of a data set.
        column: Where it stands, as a number or, in a ``.csv``, its text.

    Raises:
        UserError: If there is none, or it is no finite number of at least 0.

    Example:
        >>> read_margin({"margin": "1.5"}, "margin")
        1.5
    """
    if column not in row:
        found = ", ".join(map(repr, row)) or "nothing"
        raise UserError(f"no margin column {column!r}; found {found}.{did_you_mean(column, row)}")
    try:
        margin = math.nan if row[column] is None else float(row[column])
    except (TypeError, ValueError):
        margin = math.nan
    if not 0 <= margin < math.inf:
        raise UserError(
            f"{column} is {row[column]!r}; expected a finite number of at least 0 by which the chosen one is better."
        )
    return margin

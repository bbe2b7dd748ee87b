"""Demonstrations for supervised fine-tuning: prompts with the response to learn, or running text."""

from collections import Counter
from typing import Any, Literal

from rlhf_lightning.data.chat import Conversation, EncodedConversation
from rlhf_lightning.data.collate import SequenceExample, collate_sequences, compact
from rlhf_lightning.data.responses import ResponsesDataModule
from rlhf_lightning.data.shapes import Demonstration, parse_demonstration, parse_pair
from rlhf_lightning.functional.sequences import SequenceBatch


class DemonstrationDataModule(ResponsesDataModule[Demonstration, SequenceExample, SequenceBatch]):
    """Demonstrations, out of pairs, prompts with responses, conversations that end with a reply, or running text.

    Batches are :class:`~rlhf_lightning.functional.sequences.SequenceBatch`, whose response tokens are what is learnt.
    An empty response teaches nothing but to be silent: such rows are dropped and counted (``dropped_empty``), as are
    rows that a ``label`` of false marks as bad (``dropped_unwanted``).

    Args:
        source: A ``.jsonl``, ``.json``, ``.csv`` (also with ``.gz``) or ``.parquet`` file, ``builtin:demo/<name>``, or
            a hub name (``owner/name`` or ``owner/name:config``); a list of them is read as one, one behind another.
        val_source: Validation rows, named likewise.
        val_size: Rows to take off the source for validation instead, by prompt, so that training shares none with them.
        responses: Which response of a preference pair to learn; ``both`` makes two demonstrations of it.
        **rows: Lengths, batch sizes, tokenizer and so on: the arguments of
            :class:`~rlhf_lightning.data.responses.ResponsesDataModule`.

    Raises:
        UserError: If numbers do not go together; from ``setup`` if the data cannot be used.
    """

    batch_type = SequenceBatch

    def __init__(
        self,
        source: str | list[str],
        val_source: str | list[str] | None = None,
        val_size: int = 0,
        *,
        responses: Literal["chosen", "rejected", "both"] = "chosen",
        **rows: Any,
    ) -> None:
        super().__init__(source, val_source, val_size, **rows)
        self.responses = responses

    def parse(self, row: dict[str, Any]) -> list[Demonstration]:
        """Return the demonstrations in a row: two of a pair if both are wanted, none of what was marked as bad."""
        if "chosen" not in row or "rejected" not in row:
            if row.get("label") is False:
                return []
            return [parse_demonstration(row, chat=self.chat)]
        pair = parse_pair(row, chat=self.chat)
        wanted = {"chosen": [pair.chosen], "rejected": [pair.rejected], "both": [pair.chosen, pair.rejected]}
        return [Demonstration(pair.prompt, response) for response in wanted[self.responses]]

    def conversation(self, item: Demonstration, counts: Counter[str]) -> Conversation | None:
        """Return the prompt with its response, or ``None`` where that is empty."""
        if not item.response.strip():
            counts["dropped_empty"] += 1
            return None
        return Conversation(item.prompt, (item.response,))

    def example(
        self, item: Demonstration, encoded: EncodedConversation, counts: Counter[str]
    ) -> SequenceExample | None:
        """Return the ids of a demonstration, or ``None`` where it is too long and to be dropped."""
        fitted = self.fitted(encoded, counts)
        if fitted is None:
            return None
        return SequenceExample(compact(fitted.prompt_ids), compact(fitted.responses[0]))

    def collate(self, examples: list[SequenceExample]) -> SequenceBatch:
        """Return a batch of these demonstrations."""
        return collate_sequences(examples, self.encoder.pad_id)

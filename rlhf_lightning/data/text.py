"""Demonstrations for supervised fine-tuning: prompts with the response to learn, or running text."""

from collections import Counter
from typing import Any, Literal

from rlhf_lightning.data.base import RowsDataModule
from rlhf_lightning.data.collate import SequenceExample, collate_sequences, compact
from rlhf_lightning.data.lengths import check_lengths, cut_prompt, cut_responses
from rlhf_lightning.data.shapes import Demonstration, parse_demonstration, parse_pair
from rlhf_lightning.functional.sequences import SequenceBatch


class DemonstrationDataModule(RowsDataModule[Demonstration, SequenceExample, SequenceBatch]):
    """Demonstrations, out of pairs, prompts with responses, conversations that end with a reply, or running text.

    Batches are :class:`~rlhf_lightning.functional.sequences.SequenceBatch`, whose response tokens are what is learnt.
    An empty response teaches nothing but to be silent: such rows are dropped and counted (``dropped_empty``), as are
    rows that a ``label`` of false marks as bad (``dropped_unwanted``).

    Args:
        source: A ``.jsonl``, ``.json``, ``.csv`` (also with ``.gz``) or ``.parquet`` file, ``builtin:demo/<name>``, or
            a hub name (``owner/name`` or ``owner/name:config``).
        val_source: Validation rows, named likewise.
        val_size: Rows to take off the source for validation instead, by prompt, so that training shares none with them.
        responses: Which response of a preference pair to learn; ``both`` makes two demonstrations of it.
        batch_size: Demonstrations per optimizer step over all processes together; more makes steps steadier and dearer.
        val_batch_size: Demonstrations per validation step over all processes; ``None`` takes ``batch_size``.
        max_length: Tokens of prompt and response together.
        max_prompt_length: Tokens of the prompt; a longer one loses its beginning.
        overlong: What to do with a response that does not fit: ``drop`` the row, or ``truncate`` the response's end.
        chat: Apply the tokenizer's chat template; false takes prompts and responses as plain text.
        stop_token: Token that ends a response; ``None`` takes the tokenizer's EOS token.
        tokenizer: Model folder or hub name to take the tokenizer from; ``None`` takes that of the module in training.
        split: Split of a hub data set.
        val_split: Split of a hub data set for validation.
        limit: Rows of the source to use, the first ones; ``None`` uses all.
        shuffle: Draw training rows in a random order that follows from the run's seed.
        bad_rows: What to do with a row that cannot be read: stop with an ``error`` that names it, or ``drop`` and count
            it.

    Raises:
        UserError: If numbers do not go together; from ``setup`` if the data cannot be used.
    """

    batch_type = SequenceBatch

    def __init__(
        self,
        source: str,
        val_source: str | None = None,
        val_size: int = 0,
        responses: Literal["chosen", "rejected", "both"] = "chosen",
        batch_size: int = 8,
        val_batch_size: int | None = None,
        max_length: int = 512,
        max_prompt_length: int = 256,
        overlong: Literal["truncate", "drop"] = "drop",
        chat: bool = True,
        stop_token: str | None = None,
        tokenizer: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        limit: int | None = None,
        shuffle: bool = True,
        bad_rows: Literal["error", "drop"] = "error",
    ) -> None:
        super().__init__(
            source=source,
            val_source=val_source,
            val_size=val_size,
            batch_size=batch_size,
            val_batch_size=batch_size if val_batch_size is None else val_batch_size,
            chat=chat,
            stop_token=stop_token,
            tokenizer=tokenizer,
            split=split,
            val_split=val_split,
            limit=limit,
            shuffle=shuffle,
            bad_rows=bad_rows,
        )
        self.save_hyperparameters(logger=False)
        check_lengths(max_length, max_prompt_length)
        self.responses = responses
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.overlong = overlong

    def parse(self, row: dict[str, Any]) -> list[Demonstration]:
        """Return the demonstrations in a row: two of a pair if both are wanted, none of what was marked as bad."""
        if "chosen" not in row or "rejected" not in row:
            if row.get("label") is False:
                return []
            return [parse_demonstration(row, chat=self.chat)]
        pair = parse_pair(row, chat=self.chat)
        wanted = {"chosen": [pair.chosen], "rejected": [pair.rejected], "both": [pair.chosen, pair.rejected]}
        return [Demonstration(pair.prompt, response) for response in wanted[self.responses]]

    def encode(self, item: Demonstration, counts: Counter[str]) -> SequenceExample | None:
        """Return the ids of a demonstration, or ``None`` where it is empty, or too long and to be dropped."""
        if not item.response.strip():
            counts["dropped_empty"] += 1
            return None
        prompt_ids, response_ids = self.encoder.encode(item.prompt, item.response)
        prompt_ids = cut_prompt(self.encoder, prompt_ids, self.max_prompt_length, counts)
        responses = cut_responses(
            prompt_ids, [response_ids], max_length=self.max_length, overlong=self.overlong, counts=counts
        )
        return None if responses is None else SequenceExample(compact(prompt_ids), compact(responses[0]))

    def collate(self, examples: list[SequenceExample]) -> SequenceBatch:
        """Return a batch of these demonstrations."""
        return collate_sequences(examples, self.encoder.pad_id)

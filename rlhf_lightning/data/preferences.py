"""Preference pairs for reward models and direct preference optimisation."""

from collections import Counter
from typing import Any, Literal

from rlhf_lightning.data.base import RowsDataModule
from rlhf_lightning.data.collate import PairBatch, PairExample, collate_pairs, compact
from rlhf_lightning.data.lengths import check_lengths, cut_prompt, cut_responses
from rlhf_lightning.data.shapes import Pair, parse_pair


class PreferenceDataModule(RowsDataModule[Pair, PairExample, PairBatch]):
    """Pairs of a chosen and a rejected response, in any shape that :mod:`rlhf_lightning.data.shapes` knows.

    Batches are :class:`~rlhf_lightning.data.collate.PairBatch`. An empty response is kept, as one that says nothing can
    be the worse one, and so are two equal ones; both are counted (``empty_responses``, ``ties``).

    Args:
        source: A ``.jsonl``, ``.json``, ``.csv`` (also with ``.gz``) or ``.parquet`` file, ``builtin:demo/<name>``, or
            a hub name (``owner/name`` or ``owner/name:config``).
        val_source: Validation rows, named likewise.
        val_size: Rows to take off the source for validation instead, by prompt, so that training shares none with them.
        batch_size: Pairs per optimizer step over all processes together; more makes steps steadier and dearer.
        val_batch_size: Pairs per validation step over all processes together; ``None`` takes ``batch_size``.
        max_length: Tokens of prompt and response together.
        max_prompt_length: Tokens of the prompt; a longer one loses its beginning.
        overlong: What to do with a pair of which a response does not fit: ``drop`` it, or ``truncate`` the response's
            end.
        chat: Apply the tokenizer's chat template; false takes prompts and responses as plain text.
        stop_token: Token that ends a response; ``None`` takes the tokenizer's EOS token.
        tokenizer: Model folder or hub name to take the tokenizer from; ``None`` takes that of the module in training.
        split: Split of a hub data set.
        val_split: Split of a hub data set for validation.
        limit: Rows of the source to use, the first ones; ``None`` uses all.
        shuffle: Draw training pairs in a random order that follows from the run's seed.
        bad_rows: What to do with a row that cannot be read: stop with an ``error`` that names it, or ``drop`` and count
            it.

    Raises:
        UserError: If numbers do not go together; from ``setup`` if the data cannot be used.
    """

    batch_type = PairBatch

    def __init__(
        self,
        source: str,
        val_source: str | None = None,
        val_size: int = 0,
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
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.overlong = overlong

    def parse(self, row: dict[str, Any]) -> list[Pair]:
        """Return the pair that a row holds."""
        return [parse_pair(row, chat=self.chat)]

    def encode(self, item: Pair, counts: Counter[str]) -> PairExample | None:
        """Return the ids of a pair, or ``None`` where a response does not fit and pairs are to be dropped."""
        prompt_ids, chosen_ids = self.encoder.encode(item.prompt, item.chosen)
        _, rejected_ids = self.encoder.encode(item.prompt, item.rejected)
        counts["empty_responses"] += sum(not text.strip() for text in item[1:])
        counts["ties"] += chosen_ids == rejected_ids
        prompt_ids = cut_prompt(self.encoder, prompt_ids, self.max_prompt_length, counts)
        responses = cut_responses(
            prompt_ids, [chosen_ids, rejected_ids], max_length=self.max_length, overlong=self.overlong, counts=counts
        )
        return None if responses is None else PairExample(compact(prompt_ids), *map(compact, responses))

    def collate(self, examples: list[PairExample]) -> PairBatch:
        """Return a batch of these pairs."""
        return collate_pairs(examples, self.encoder.pad_id)

"""Prompts for a policy to answer: those of PPO's rollouts."""

from collections import Counter
from typing import Any, NamedTuple

from rlhf_lightning.data.base import RowsDataModule
from rlhf_lightning.data.chat import Conversation, EncodedConversation
from rlhf_lightning.data.collate import PromptBatch, PromptExample, collate_prompts, compact
from rlhf_lightning.data.lengths import cut_prompt
from rlhf_lightning.data.shapes import Prompt, as_messages, parse_prompt
from rlhf_lightning.errors import UserError


class PromptItem(NamedTuple):
    """A prompt and the row it came from."""

    prompt: Prompt
    row: dict[str, Any]


class PromptDataModule(RowsDataModule[PromptItem, PromptExample, PromptBatch]):
    """Prompts, out of rows of prompts, pairs, demonstrations or conversations.

    Batches are :class:`~rlhf_lightning.data.collate.PromptBatch`. Its ``prompts`` are chat messages exactly where the
    chat template was applied, text where it was not; its ``rows`` carry all columns, for reward functions to read.

    Args:
        source: A ``.jsonl``, ``.json``, ``.csv`` (also with ``.gz``) or ``.parquet`` file, ``builtin:demo/<name>``, or
            a hub name (``owner/name`` or ``owner/name:config``); a list of them is read as one, one behind another.
        val_source: Validation rows, named likewise.
        val_size: Rows to take off the source for validation instead, by prompt, so that training shares none with them.
        rollout_batch_size: Responses per PPO iteration over all processes together; more makes an iteration's
            estimates steadier and dearer.
        responses_per_prompt: Responses to each training prompt, which a rollout holds together; 1 answers each once,
            ``LeaveOneOut`` and ``GroupRelative`` need at least 2. Divides ``rollout_batch_size``.
        val_batch_size: Prompts per validation step over all processes together; ``None`` takes ``rollout_batch_size``.
        max_prompt_length: Tokens of the prompt; a longer one loses its beginning.
        text_words: How many words rows with nothing but ``text`` give as their prompt; ``None`` refuses such rows.
        **rows: Tokenizer, splits and so on: the arguments of :class:`~rlhf_lightning.data.base.RowsDataModule`.

    Raises:
        UserError: If a number is out of range; from ``setup`` if the data cannot be used.
    """

    batch_type = PromptBatch

    def __init__(
        self,
        source: str | list[str],
        val_source: str | list[str] | None = None,
        val_size: int = 0,
        rollout_batch_size: int = 16,
        responses_per_prompt: int = 1,
        val_batch_size: int | None = None,
        max_prompt_length: int = 256,
        text_words: int | None = None,
        **rows: Any,
    ) -> None:
        for name, number in {
            "rollout_batch_size": rollout_batch_size,
            "responses_per_prompt": responses_per_prompt,
            "max_prompt_length": max_prompt_length,
            "text_words": text_words,
        }.items():
            if number is not None and number < 1:
                raise UserError(f"{name} is {number}; expected at least 1.")
        if rollout_batch_size % responses_per_prompt:
            raise UserError(
                f"rollout_batch_size {rollout_batch_size} is not divisible by responses_per_prompt "
                f"{responses_per_prompt}; it counts responses, so make it a multiple."
            )
        super().__init__(
            source,
            val_source,
            val_size,
            batch_size=rollout_batch_size // responses_per_prompt,
            val_batch_size=rollout_batch_size if val_batch_size is None else val_batch_size,
            stop_token=None,
            **rows,
        )
        self.save_hyperparameters(logger=False)
        self.rollout_batch_size, self.max_prompt_length = rollout_batch_size, max_prompt_length
        self.text_words, self.responses_per_prompt = text_words, responses_per_prompt

    def parse(self, row: dict[str, Any]) -> list[PromptItem]:
        """Return the prompt that a row holds."""
        prompt = parse_prompt(row, chat=self.chat, text_words=self.text_words)
        return [PromptItem(as_messages(prompt) if self.chat else prompt, row)]

    def conversation(self, item: PromptItem, counts: Counter[str]) -> Conversation:
        """Return the prompt, which nothing answers yet."""
        return Conversation(item.prompt)

    def example(self, item: PromptItem, encoded: EncodedConversation, counts: Counter[str]) -> PromptExample:
        """Return the ids of a prompt."""
        prompt_ids = cut_prompt(self.encoder, encoded.prompt_ids, self.max_prompt_length, counts)
        return PromptExample(compact(prompt_ids), item.prompt, item.row)

    def collate(self, examples: list[PromptExample]) -> PromptBatch:
        """Return a batch of these prompts."""
        return collate_prompts(examples, self.encoder.pad_id)

    def collate_for_training(self, examples: list[PromptExample]) -> PromptBatch:
        """Return a batch of these prompts, each as often as it is to be answered."""
        return collate_prompts(examples, self.encoder.pad_id, responses_per_prompt=self.responses_per_prompt)

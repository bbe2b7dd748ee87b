"""What data of prompts with given responses have in common: how long both may be, and what becomes of longer ones."""

from abc import ABC
from collections import Counter
from typing import Any, Literal

from rlhf_lightning.data.base import Batch, Example, Item, RowsDataModule
from rlhf_lightning.data.chat import EncodedConversation
from rlhf_lightning.data.lengths import check_lengths, cut_prompt, cut_responses


class ResponsesDataModule(RowsDataModule[Item, Example, Batch], ABC):
    """Rows of a prompt and one response to it, or two.

    Args:
        source: See :class:`~rlhf_lightning.data.base.RowsDataModule`, as for all that is not described here.
        val_source: Validation rows, named likewise.
        val_size: Rows to take off the source for validation instead, by prompt, so that training shares none with them.
        max_length: Tokens of prompt and response together.
        max_prompt_length: Tokens of the prompt; a longer one loses its beginning.
        overlong: What to do with a row of which a response does not fit: ``drop`` it, or ``truncate`` the response's
            end.
        **rows: Arguments of :class:`~rlhf_lightning.data.base.RowsDataModule`.
    """

    def __init__(
        self,
        source: str | list[str],
        val_source: str | list[str] | None = None,
        val_size: int = 0,
        *,
        max_length: int = 512,
        max_prompt_length: int = 256,
        overlong: Literal["truncate", "drop"] = "drop",
        **rows: Any,
    ) -> None:
        super().__init__(source, val_source, val_size, **rows)
        self.save_hyperparameters(logger=False)
        check_lengths(max_length, max_prompt_length)
        self.max_length, self.max_prompt_length, self.overlong = max_length, max_prompt_length, overlong

    def fitted(self, encoded: EncodedConversation, counts: Counter[str]) -> EncodedConversation | None:
        """Cut prompt and responses to their lengths, or return ``None`` where they are to be dropped; count either."""
        prompt_ids = cut_prompt(self.encoder, encoded.prompt_ids, self.max_prompt_length, counts)
        responses = cut_responses(
            prompt_ids, encoded.responses, max_length=self.max_length, overlong=self.overlong, counts=counts
        )
        return None if responses is None else EncodedConversation(prompt_ids, responses)

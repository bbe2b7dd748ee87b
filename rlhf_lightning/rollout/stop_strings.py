"""Texts that end a response, however the tokenizer cuts them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Tells which responses have just been ended by a string; it is handed to a sampler, which has no tokenizer.

    The text looked at is that of the response alone, special tokens included. No more than the last tokens are decoded,
    as many as a string can span.

    Args:
        tokenizer: The policy's.
        strings: Texts, each of which ends a response; not empty.

    Example:
        >>> from rlhf_lightning.models.loading import load_tokenizer
        >>> tokenizer = load_tokenizer("builtin:demo")
        >>> ids = tokenizer("a cup of tea. And", add_special_tokens=False).input_ids
        >>> stops = StopStrings(tokenizer, ["tea."])
        >>> [tokenizer.decode(ids[:n]) for n in range(1, len(ids) + 1) if stops.completed([ids[:n]])[0]]
        ['a cup of tea.']
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", strings: Sequence[str]) -> None:
        if not strings or not all(strings):
            raise UserError(
                f"stop_strings is {list(strings)}; name at least one text, none of them empty, or leave it out."
            )
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        # A token has a byte at least, so a string spans no more tokens than it has bytes. The first token of a cut-out
        # text may lose its blank, so a few stand before it.
        self.window = max(len(string.encode()) for string in strings) + 4

    def completed(self, rows: Sequence[Sequence[int]]) -> list[bool]:
        """Tell of each row whether its last token completes one of the strings.

        Args:
            rows: Tokens of each response so far, or at least the last ``window`` of them; not empty.
        """
        tails = [list(row[-self.window :]) for row in rows]
        texts = self._decode(tails)
        ended = [any(string in text for string in self.strings) for text in texts]
        # One that stands there already was completed by an earlier token, too early to count.
        found = [number for number, has_one in enumerate(ended) if has_one]
        for number, before in zip(found, self._decode([tails[number][:-1] for number in found]), strict=True):
            ended[number] = self._ends_beyond(texts[number], before)
        return ended

    def _ends_beyond(self, text: str, before: str) -> bool:
        """Tell whether a string in ``text`` ends beyond what it has in common with ``before``, the text less a token.

        Where that token completed a character, ``before`` is no beginning of ``text``.
        """
        same = next((at for at, (a, b) in enumerate(zip(text, before, strict=False)) if a != b), len(before))
        return any(string in text[max(0, same - len(string) + 1) :] for string in self.strings)

    def _decode(self, rows: list[list[int]]) -> list[str]:
        return [
            self.tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False) for row in rows
        ]


def resolve_stop_strings(tokenizer: "PreTrainedTokenizerBase", strings: Sequence[str] | None) -> StopStrings | None:
    """Return what ``SamplingConfig.stop_strings`` means with this tokenizer; ``None`` where there are none."""
    return None if strings is None else StopStrings(tokenizer, strings)

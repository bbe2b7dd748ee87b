"""The answers that models are asked how likely they find: named data sets, read, drawn and tokenised once for all."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.data.shapes import RESPONSE_COLUMNS, Prompt, as_messages, parse_demonstration, parse_pair
from rlhf_lightning.errors import UserError, did_you_mean
from rlhf_lightning.evaluation.formatting import without_home
from rlhf_lightning.evaluation.prompts import drawn_rows
from rlhf_lightning.functional.sequences import SequenceBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_lightning.data.chat import ConversationEncoder, EncodedConversation


@dataclass
class AnswerSource:
    """Rows with answers: where they come from, how many, and how long they may be.

    Args:
        source: A ``.jsonl``, ``.json``, ``.csv`` (also with ``.gz``) or ``.parquet`` file, ``builtin:demo/<name>``, or
            a hub name (``owner/name`` or ``owner/name:config``).
        split: Split of a hub data set.
        limit: Rows to draw, by the seed, of those that have an answer; ``None`` takes all. The same source and limit
            give the same rows, wherever they are named.
        max_length: Tokens of prompt and answer together.
        max_prompt_length: Tokens of the prompt; a longer one loses its beginning.
        overlong: What to do where an answer does not fit: ``truncate`` its end, or ``drop`` the row.
        chat: Apply the chat template; false takes prompts and answers as plain text.
    """

    source: str
    split: str = "train"
    limit: int | None = 256
    max_length: int = 512
    max_prompt_length: int = 256
    overlong: Literal["truncate", "drop"] = "truncate"
    chat: bool = True

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        from rlhf_lightning.data.lengths import check_lengths

        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}; it must be at least 1, or null for all rows.")
        check_lengths(self.max_length, self.max_prompt_length)

    def as_dict(self) -> dict[str, Any]:
        """Return what a report tells of it."""
        return {**vars(self), "source": without_home(self.source)}


@dataclass
class LikelihoodSet(AnswerSource):
    """Answers whose log-probability is measured.

    Args:
        source: A ``.jsonl``, ``.json``, ``.csv`` (also with ``.gz``) or ``.parquet`` file, ``builtin:demo/<name>``, or
            a hub name (``owner/name`` or ``owner/name:config``); for what is not described here see
            :class:`AnswerSource`.
        answer: What of a row is the answer: the ``chosen`` or the ``rejected`` side of a pair, the ``response`` of a
            demonstration, or the whole ``text``, prompt included. ``auto`` takes the chosen side of a pair, else the
            response, else the text. An answer counts with its stop token; running text has none.
    """

    answer: Literal["auto", "chosen", "rejected", "response", "text"] = "auto"


@dataclass
class PairSet(AnswerSource):
    """Preference pairs on which policies and reward models are judged.

    Args:
        source: A ``.jsonl``, ``.json``, ``.csv`` (also with ``.gz``) or ``.parquet`` file, ``builtin:demo/<name>``, or
            a hub name (``owner/name`` or ``owner/name:config``); for what is not described here see
            :class:`AnswerSource`.
        group_by: Column by whose values the accuracy of reward models is told apart, such as ``source_file``; ``None``
            is off.
    """

    group_by: str | None = None


class EncodedAnswers(NamedTuple):
    """Answers in tokens.

    Attributes:
        sequences: Prompts and answers; what stands before running text is one token.
        available: Rows of the source.
        counts: How many rows were ``dropped_empty``, ``dropped_overlong``, ``prompts_truncated`` or
            ``responses_truncated``.
    """

    sequences: SequenceBatch
    available: int
    counts: dict[str, int]


class EncodedPairs(NamedTuple):
    """Pairs in tokens and as text.

    Attributes:
        chosen: Prompts with the better answers.
        rejected: The same prompts with the worse ones.
        prompts: As rewards get them: chat messages with a chat template, else text.
        texts: The answers as text, chosen and rejected; what was cut off is left out.
        finished: False where an answer was cut off, chosen and rejected, shape (pairs,), bool.
        rows: The rows that they come from.
        groups: Of each pair, where they are told apart by a column.
        available: Rows of the source.
        counts: As in :class:`EncodedAnswers`.
    """

    chosen: SequenceBatch
    rejected: SequenceBatch
    prompts: list[Prompt]
    texts: tuple[list[str], list[str]]
    finished: tuple[Tensor, Tensor]
    rows: list[dict[str, Any]]
    groups: list[str] | None
    available: int
    counts: dict[str, int]


def read_answers(
    wanted: LikelihoodSet, tokenizer: "PreTrainedTokenizerBase", *, seed: int = 0, where: str = "likelihood"
) -> EncodedAnswers:
    """Read, draw and tokenise answers.

    Args:
        wanted: What to read.
        tokenizer: Of the models.
        seed: Fixes which rows are drawn.
        where: Named in errors.

    Raises:
        UserError: If the source or a row cannot be read, or nothing is left of it.
    """
    rows = _rows(wanted, where)
    asked = _parsed(rows, partial(_answer_of, wanted=wanted), wanted, where)
    counts = Counter(dropped_empty=0, dropped_overlong=0, prompts_truncated=0, responses_truncated=0)
    full = [(number, item) for number, item in asked if item.answers[0].strip()]
    counts["dropped_empty"] = len(asked) - len(full)
    taken = [full[place] for place in drawn_rows(len(full), wanted.limit, seed)]
    kept = _fitted(taken, wanted, tokenizer, counts, where)
    return EncodedAnswers(_sequences(kept, 0), len(rows), dict(counts))


def read_pairs(
    wanted: PairSet, tokenizer: "PreTrainedTokenizerBase", *, seed: int = 0, where: str = "pairs"
) -> EncodedPairs:
    """Read, draw and tokenise preference pairs.

    Args:
        wanted: What to read.
        tokenizer: Of the models.
        seed: Fixes which rows are drawn.
        where: Named in errors.

    Raises:
        UserError: If the source or a row cannot be read, or nothing is left of it.
    """
    rows = _rows(wanted, where)
    asked = _parsed(rows, partial(_both_sides, chat=wanted.chat), wanted, where)
    counts = Counter(dropped_overlong=0, prompts_truncated=0, responses_truncated=0)
    taken = [asked[place] for place in drawn_rows(len(asked), wanted.limit, seed)]
    kept = _fitted(taken, wanted, tokenizer, counts, where)
    own = [rows[fitted.number - 1] for fitted in kept]
    return EncodedPairs(
        chosen=_sequences(kept, 0),
        rejected=_sequences(kept, 1),
        prompts=[as_messages(one.asked.prompt) if wanted.chat else one.asked.prompt for one in kept],
        texts=(_texts(kept, 0, tokenizer), _texts(kept, 1, tokenizer)),
        finished=(_finished(kept, 0), _finished(kept, 1)),
        rows=own,
        groups=None if wanted.group_by is None else [_group(row, wanted.group_by, where) for row in own],
        available=len(rows),
        counts=dict(counts),
    )


def longest(batches: Iterable[SequenceBatch]) -> int:
    """Return the tokens of the longest sequence; 0 without any."""
    return max((int(batch.lengths.max()) for batch in batches), default=0)


def counted(name: str, kept: int, available: int, counts: Mapping[str, int]) -> str:
    """Return in words how many rows of a set are measured, and what became of others.

    Args:
        name: Of the set.
        kept: Rows that are measured.
        available: Rows of the source.
        counts: As in :class:`EncodedAnswers`.

    Example:
        >>> counted("unseen", 50, 4358, {"dropped_empty": 1467, "responses_truncated": 16, "dropped_overlong": 0})
        'unseen: 50 of 4358 rows (1467 are empty, 16 of the answers cut to length)'
    """
    words = {
        "dropped_empty": "are empty",
        "dropped_overlong": "of those drawn left out as too long",
        "prompts_truncated": "of the prompts cut to length",
        "responses_truncated": "of the answers cut to length",
    }
    told = ", ".join(f"{counts[key]} {text}" for key, text in words.items() if counts.get(key))
    return f"{name}: {kept} of {available} rows{f' ({told})' if told else ''}"


class _Asked(NamedTuple):
    """What is given, and the answers to it that are measured.

    Attributes:
        prompt: As text or chat messages.
        answers: One, or the two of a pair.
        plain: Whether the chat template stays out.
        whole: Whether the prompt counts too.
    """

    prompt: Prompt
    answers: tuple[str, ...]
    plain: bool
    whole: bool = False


class _Fitted(NamedTuple):
    """Ids cut to their lengths, the number of their row, and the answers as they were before."""

    number: int
    asked: _Asked
    prompt_ids: list[int]
    answer_ids: list[list[int]]
    uncut: list[int]


def _rows(wanted: AnswerSource, where: str) -> list[dict[str, Any]]:
    from rlhf_lightning.data.readers import read_rows

    try:
        return read_rows(wanted.source, split=wanted.split)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _parsed(
    rows: Sequence[dict[str, Any]], parse: Callable[[dict[str, Any]], _Asked], wanted: AnswerSource, where: str
) -> list[tuple[int, _Asked]]:
    """Return what each row holds with its number, from 1."""
    parsed = []
    for number, row in enumerate(rows, start=1):
        try:
            parsed.append((number, parse(row)))
        except UserError as error:
            raise _at_row(wanted, number, error, where) from error
    return parsed


def _answer_of(row: Mapping[str, Any], wanted: LikelihoodSet) -> _Asked:
    kind = _kind(row) if wanted.answer == "auto" else wanted.answer
    if kind in ("chosen", "rejected"):
        pair = parse_pair(row, chat=wanted.chat)
        return _Asked(pair.prompt, (pair.chosen if kind == "chosen" else pair.rejected,), not wanted.chat)
    plain = not wanted.chat or (kind == "text" and _kind(row) == "text")
    prompt, response = parse_demonstration(row, chat=not plain)
    if kind == "response" or not plain:
        return _Asked(prompt, (response,), plain, whole=kind == "text")
    if not isinstance(prompt, str):
        raise UserError("the prompt is a list of chat messages, but chat is false; set chat: true, or give text.")
    return _Asked("", (prompt + response,), plain, whole=True)


def _kind(row: Mapping[str, Any]) -> str:
    if "chosen" in row and "rejected" in row:
        return "chosen"
    answered = any(column in row for column in (*RESPONSE_COLUMNS, "messages", "conversations"))
    return "text" if "text" in row and not answered else "response"


def _both_sides(row: Mapping[str, Any], *, chat: bool) -> _Asked:
    prompt, chosen, rejected = parse_pair(row, chat=chat)
    return _Asked(prompt, (chosen, rejected), plain=not chat)


def _fitted(
    taken: Sequence[tuple[int, _Asked]],
    wanted: AnswerSource,
    tokenizer: "PreTrainedTokenizerBase",
    counts: Counter[str],
    where: str,
) -> list[_Fitted]:
    """Tokenise, and cut to length or leave out what does not fit.

    Raises:
        UserError: If a row cannot be tokenised, or nothing is left.
    """
    from rlhf_lightning.data.lengths import cut_prompt, cut_responses

    kept = []
    for (number, asked), (encoder, encoded) in zip(taken, _encoded(taken, tokenizer), strict=True):
        if isinstance(encoded, UserError):
            raise _at_row(wanted, number, encoded, where) from encoded
        prompt_ids, uncut = encoded.prompt_ids, [len(ids) for ids in encoded.responses]
        if not asked.whole:
            prompt_ids = cut_prompt(encoder, prompt_ids, wanted.max_prompt_length, counts)
        cut = cut_responses(
            prompt_ids, encoded.responses, max_length=wanted.max_length, overlong=wanted.overlong, counts=counts
        )
        if cut is not None:
            kept.append(_Fitted(number, asked, prompt_ids, cut, uncut))
    if not kept:
        why = "raise max_length, or set overlong: truncate" if counts["dropped_overlong"] else "all answers are empty"
        told = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        raise UserError(f"{where}: nothing is left of {wanted.source!r} ({told}); {why}.")
    return kept


def _encoded(
    taken: Sequence[tuple[int, _Asked]], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple["ConversationEncoder", "EncodedConversation | UserError"]]:
    """Yield the ids of each row, those by the chat template and those of plain text each tokenised together."""
    from rlhf_lightning.data.chat import Conversation, ConversationEncoder

    encoders, streams = {}, {}
    for plain in {asked.plain for _, asked in taken}:
        encoders[plain] = ConversationEncoder(tokenizer, chat=not plain)
        mine = [asked for _, asked in taken if asked.plain == plain]
        # Running text ends with no stop token: it is tokenised as what a response would follow.
        asked_for = [Conversation(*(a.answers if a.plain and a.whole else (a.prompt, a.answers))) for a in mine]
        streams[plain] = encoders[plain].encode_many(asked_for)
    for _, asked in taken:
        encoder = encoders[asked.plain]
        found = next(streams[asked.plain])
        yield encoder, found if isinstance(found, UserError) or not asked.whole else _counted_whole(encoder, found)


def _counted_whole(encoder: "ConversationEncoder", encoded: "EncodedConversation") -> "EncodedConversation":
    """Let all tokens count but a first one, for the second to be predicted from; running text gets one if need be."""
    ids = [token for part in (encoded.prompt_ids, *encoded.responses) for token in part]
    first = encoder.encode_prompt("")[:1] if not encoder.chat else ids[:1]
    return encoded._replace(prompt_ids=first, responses=[ids[1:] if ids[:1] == first else ids])


def _sequences(kept: Sequence[_Fitted], side: int) -> SequenceBatch:
    from rlhf_lightning.data.collate import collate_sequences

    return collate_sequences([(fitted.prompt_ids, fitted.answer_ids[side]) for fitted in kept], pad_id=0)


def _texts(kept: Sequence[_Fitted], side: int, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    finished = _finished(kept, side).tolist()
    return [
        fitted.asked.answers[side] if whole else tokenizer.decode(fitted.answer_ids[side], skip_special_tokens=True)
        for fitted, whole in zip(kept, finished, strict=True)
    ]


def _finished(kept: Sequence[_Fitted], side: int) -> Tensor:
    return torch.tensor([len(fitted.answer_ids[side]) == fitted.uncut[side] for fitted in kept])


def _group(row: Mapping[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise UserError(
            f"{where}: group_by is {column!r}, but a row has only {', '.join(map(repr, row))}."
            f"{did_you_mean(column, row)}"
        )
    return str(row[column])


def _at_row(wanted: AnswerSource, number: int, error: UserError, where: str) -> UserError:
    from rlhf_lightning.data.readers import line_of_row

    return UserError(f"{where}: {wanted.source!r} row {number}{line_of_row(wanted.source, number)}: {error}")

"""The shapes in which preference data exists, told apart by their columns and brought to one.

A prompt is plain text or a list of chat messages ``{"role": "system" | "user" | "assistant", "content": text}``; a
response is text. Understood are

- ``prompt``, ``chosen``, ``rejected`` as text, or as chat messages (OpenAI's ``role``/``content`` or ShareGPT's
  ``from``/``value``);
- ``conversations`` or ``messages`` with ``chosen`` and ``rejected`` beside them;
- ``chosen`` and ``rejected`` alone: whole conversations, or HH-RLHF dialogues (Bai et al. 2022), whose common beginning
  is the prompt;
- ``prompt`` or ``question`` or ``instruction`` (with ``context`` or ``input``), and for demonstrations ``response`` or
  ``completion`` or ``output`` or ``answer``; ``messages`` or ``conversations`` that end with a reply; ``text``.
"""

import json
import re
from collections.abc import Mapping
from itertools import takewhile
from typing import Any, NamedTuple, cast

from rlhf_lightning.errors import UserError, nearest

Message = dict[str, str]
Prompt = str | list[Message]

PROMPT_COLUMNS = ("prompt", "question", "instruction", "conversations", "messages")
RESPONSE_COLUMNS = ("response", "completion", "output", "answer")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_REPLY_MARK = "\n\nAssistant:"


class Pair(NamedTuple):
    """Two responses to one prompt, of which the first was preferred."""

    prompt: Prompt
    chosen: str
    rejected: str


class Demonstration(NamedTuple):
    """A prompt and the response that a model should learn to give; the prompt is ``""`` for running text."""

    prompt: Prompt
    response: str


def parse_pair(row: Mapping[str, Any], *, chat: bool = True) -> Pair:
    r"""Read a preference pair out of a row of any of the known shapes.

    Args:
        row: One row of a data set.
        chat: False leaves HH-RLHF dialogues as the text they are, for models without a chat template.

    Raises:
        UserError: If columns are missing, or hold what cannot be a pair.

    Example:
        >>> asked = "\n\nHuman: Hi\n\nAssistant:"
        >>> parse_pair({"chosen": asked + " Hello!", "rejected": asked + " What?"})
        Pair(prompt=[{'role': 'user', 'content': 'Hi'}], chosen='Hello!', rejected='What?')
    """
    if "label" in row and not {"chosen", "rejected"} & set(row):
        raise UserError(
            "the row is unpaired (it has a label, but no chosen and rejected); preference pairs need both. Unpaired "
            "rows can serve as demonstrations or prompts."
        )
    for column in ("chosen", "rejected"):
        if column not in row:
            raise _missing(column, row)
    sides = [row["chosen"], row["rejected"]]
    if all(isinstance(side, str) for side in sides):
        return _text_pair(row, sides, chat=chat)
    if any(isinstance(side, str) for side in sides):
        found = " and ".join(f"{name} is {_described(row[name])}" for name in ("chosen", "rejected"))
        raise UserError(f"{found}; both must be text, or both chat messages.")
    chosen, rejected = (_messages(row[column], column) for column in ("chosen", "rejected"))
    if all(message["role"] == "assistant" for message in chosen + rejected):
        return Pair(_stated_prompt(row, chat=chat), _joined(chosen), _joined(rejected))
    return _split_conversations(chosen, rejected)


def parse_prompt(row: Mapping[str, Any], *, chat: bool = True, text_words: int | None = None) -> Prompt:
    """Read a prompt out of a row: of prompts, of pairs, of demonstrations or of conversations.

    Args:
        row: One row of a data set. The last reply of a conversation is left out.
        chat: As in :func:`parse_pair`.
        text_words: How many words a row with nothing but ``text`` gives as its prompt; ``None`` refuses such rows.

    Raises:
        UserError: If there is no prompt in it.

    Example:
        >>> parse_prompt({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]})
        [{'role': 'user', 'content': 'Hi'}]
    """
    if "chosen" in row and "rejected" in row:
        return parse_pair(row, chat=chat).prompt
    if any(column in row for column in PROMPT_COLUMNS):
        return _stated_prompt(row, chat=chat, drop_reply=True)
    if "text" not in row:
        raise _missing("prompt", row)
    if text_words is None:
        raise UserError("the row has no prompt, only text; set text_words to take the first words of it as the prompt.")
    text = _text(row["text"], "text")
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    return text[: ends[text_words - 1]] if len(ends) >= text_words else text


def parse_demonstration(row: Mapping[str, Any], *, chat: bool = True) -> Demonstration:
    r"""Read a prompt and its response out of a row; of a pair the chosen response.

    Args:
        row: One row of a data set.
        chat: As in :func:`parse_pair`; rows of running ``text`` need False.

    Raises:
        UserError: If there is no response in it, or a conversation does not end with the assistant.

    Example:
        >>> parse_demonstration({"instruction": "Add.", "context": "1 and 2", "response": "3"})
        Demonstration(prompt='Add.\n\n1 and 2', response='3')
    """
    if "chosen" in row and "rejected" in row:
        return Demonstration(*parse_pair(row, chat=chat)[:2])
    response_column = _first(RESPONSE_COLUMNS, row)
    if response_column:
        return Demonstration(_stated_prompt(row, chat=chat), _response(row[response_column], response_column))
    conversation_column = _first(("messages", "conversations"), row)
    if conversation_column:
        messages = _with_system(_messages(row[conversation_column], conversation_column), row)
        prompt, reply = _split_reply(messages)
        if not reply:
            raise UserError(
                f"{conversation_column} ends with {messages[-1]['role']!r}; expected the assistant's reply last."
            )
        if not prompt:
            raise UserError(
                f"{conversation_column} holds nothing but the assistant's reply; expected a prompt before it."
            )
        return Demonstration(cast(Prompt, prompt), _joined(reply))
    if "text" not in row:
        raise _missing("response", row)
    if chat:
        raise UserError("the row has no prompt and response, only text; set chat: false to train on running text.")
    return Demonstration("", _text(row["text"], "text"))


def as_messages(prompt: Prompt) -> list[Message]:
    """Return a prompt as chat messages: a text is one message of the user.

    Example:
        >>> as_messages("Hi")
        [{'role': 'user', 'content': 'Hi'}]
    """
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _text_pair(row: Mapping[str, Any], sides: list[str], *, chat: bool) -> Pair:
    if _first(PROMPT_COLUMNS, row):
        return Pair(_stated_prompt(row, chat=chat), sides[0], sides[1])
    if not all(_is_dialogue(side) for side in sides):
        raise UserError(
            f"chosen and rejected are texts without a prompt column (found {_found(row)}), and no dialogues that begin "
            f"with 'Human:'; expected a prompt.{_renaming('prompt', row)}"
        )
    if chat:
        return _split_conversations(_dialogue(sides[0]), _dialogue(sides[1]))
    return _split_dialogues(*sides)


def _split_dialogues(chosen: str, rejected: str) -> Pair:
    """Cut two dialogues after the last mark of a reply that they share, and leave them the text they are."""
    shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    before, mark, _ = chosen[:shared].rpartition(_REPLY_MARK)
    prompt = before + mark
    replies = chosen.removeprefix(prompt), rejected.removeprefix(prompt)
    if not mark or any("\n\nHuman:" in reply for reply in replies):
        raise UserError("chosen and rejected differ before their last reply; expected one prompt for both.")
    return Pair(prompt, *replies)


def _split_conversations(chosen: list[Message], rejected: list[Message]) -> Pair:
    """Take the common beginning, up to where the assistant replies, as the prompt."""
    common = [left for left, _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))]
    prompt, _ = _split_reply(common)
    replies = [side[len(prompt) :] for side in (chosen, rejected)]
    if any(message["role"] != "assistant" for reply in replies for message in reply):
        raise UserError("chosen and rejected differ before their last reply; expected one prompt for both.")
    if not prompt or not all(replies):
        raise UserError("chosen and rejected must be whole conversations: a prompt, and the assistant's reply last.")
    return Pair(cast(Prompt, prompt), _joined(replies[0]), _joined(replies[1]))


def _split_reply(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """Cut the assistant's messages off the end."""
    reply = list(takewhile(lambda message: message["role"] == "assistant", reversed(messages)))[::-1]
    return messages[: len(messages) - len(reply)], reply


def _stated_prompt(row: Mapping[str, Any], *, chat: bool, drop_reply: bool = False) -> Prompt:
    """Read the prompt from its own column."""
    column = _first(PROMPT_COLUMNS, row)
    if column is None:
        raise _missing("prompt", row)
    value = row[column]
    if isinstance(value, str):
        return _text_prompt(value, row, column, chat=chat)
    messages = _with_system(_messages(value, column), row)
    prompt, reply = _split_reply(messages)
    if reply and not (drop_reply and column in ("messages", "conversations")):
        raise UserError(
            f"{column} ends with the assistant's message; expected the user's last, as the reply is to be given."
        )
    if not prompt:
        raise UserError(f"{column} holds nothing but the assistant's reply; expected a prompt before it.")
    return cast(Prompt, prompt)


def _text_prompt(value: str, row: Mapping[str, Any], column: str, *, chat: bool) -> Prompt:
    extra = row.get("context") or row.get("input") if column == "instruction" else None
    text = f"{value}\n\n{_text(extra, 'context')}" if extra else value
    if not chat:
        return f"{_text(row['system'], 'system')}\n\n{text}" if row.get("system") else text
    if _is_dialogue(text):
        prompt, reply = _split_reply(_dialogue(text))
        if any(message["content"] for message in reply):
            raise UserError(
                f"{column} ends with the assistant's message; expected the user's last, as the reply is to be given."
            )
        return cast(Prompt, _with_system(prompt, row))
    return _with_system(as_messages(text), row) if row.get("system") else text


def _with_system(messages: list[Message], row: Mapping[str, Any]) -> list[Message]:
    """Put the ``system`` column of a row first, where the messages bring no system message."""
    system = row.get("system")
    if not system or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": _text(system, "system")}, *messages]


def _messages(value: Any, column: str) -> list[Message]:
    entries = [value] if isinstance(value, dict) else value
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{column} is {_described(value)}; expected text or a list of chat messages.")
    return [_message(entry, column) for entry in entries]


def _message(entry: Any, column: str) -> Message:
    for role_key, content_key in (("role", "content"), ("from", "value")):
        if isinstance(entry, dict) and role_key in entry and content_key in entry:
            role = ROLES.get(str(entry[role_key]).lower())
            if role is None:
                raise UserError(f"{column} has a message of role {entry[role_key]!r}; known are {', '.join(ROLES)}.")
            return {"role": role, "content": _content(entry[content_key], column)}
    found = _found(entry) if isinstance(entry, dict) else _described(entry)
    raise UserError(f"{column} has a message with {found}; expected role and content, or from and value.")


def _content(value: Any, column: str) -> str:
    """Read a message's content, which may come as a list of parts."""
    if (
        isinstance(value, list)
        and value
        and all(isinstance(part, dict) and part.get("type") == "text" for part in value)
    ):
        return "".join(_text(part.get("text"), column) for part in value)
    return _text(value, column)


def _response(value: Any, column: str) -> str:
    if isinstance(value, str):
        return value
    messages = _messages(value, column)
    if any(message["role"] != "assistant" for message in messages):
        raise UserError(f"{column} holds messages that are not the assistant's; expected its reply alone.")
    return _joined(messages)


def _is_dialogue(text: str) -> bool:
    return text.lstrip().startswith("Human:") and _REPLY_MARK in text


def _dialogue(text: str) -> list[Message]:
    pieces = _TURN.split(text.strip())[1:]
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": ROLES[speaker.lower()], "content": said.strip()} for speaker, said in turns]


def _joined(messages: list[Message]) -> str:
    """Make one response of a reply that came in pieces, as when a reply itself contains a turn mark."""
    return "\n\n".join(message["content"] for message in messages if message["content"])


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{column} is {_described(value)}; expected text.")
    return value


def _described(value: Any) -> str:
    if isinstance(value, list | dict):
        return f"a {type(value).__name__}" if value else f"an empty {type(value).__name__}"
    return "text" if isinstance(value, str) else json.dumps(value, default=str)


def _first(columns: tuple[str, ...], row: Mapping[str, Any]) -> str | None:
    return next((column for column in columns if column in row), None)


def _found(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "nothing"


def _missing(column: str, row: Mapping[str, Any]) -> UserError:
    return UserError(f"no column {column!r}; found {_found(row)}.{_renaming(column, row)}")


def _renaming(column: str, row: Mapping[str, Any]) -> str:
    close = nearest(column, row)
    return f" Rename {close!r} to {column!r}, if that is it." if close else ""

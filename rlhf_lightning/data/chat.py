"""From a prompt and a response to token ids: the one function that every stage and every data set goes through."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

from rlhf_lightning.data.rendering import UnboundedTemplateError, bounded, render_chat, trimmed_template
from rlhf_lightning.data.shapes import Message, Prompt, as_messages
from rlhf_lightning.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_lightning.data.token_cache import TokenCache

_RENDERED_TOGETHER = 20  # enough that bounding them costs little, few enough that their texts stay within the bounds
_CHARACTERS_A_CALL = 250_000  # the tokenizer's own account of a token takes a hundred times the id


class Conversation(NamedTuple):
    """A prompt and any number of responses to it."""

    prompt: Prompt
    responses: Sequence[str] = ()


class EncodedConversation(NamedTuple):
    """Token ids of a prompt, and of each response to it."""

    prompt_ids: list[int]
    responses: list[list[int]]


class _Rendered(NamedTuple):
    """The text of a prompt as the tokenizer reads it, and of the prompt with each response."""

    prompt: str
    wholes: list[str]


class _KnownIds:
    """Ids of texts that were tokenised together; of any other text those of a call of its own."""

    def __init__(self, one: Callable[[str], list[int]], many: Callable[[Sequence[str]], list["array[int]"]]) -> None:
        self._one, self._many = one, many
        self._known: dict[str, array[int]] = {}

    def add(self, texts: Iterable[str]) -> None:
        """Tokenise texts, each once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, self._many(new), strict=True))

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._known[text].tolist() if text in self._known else self._one(text)


class ConversationEncoder:
    """Turns conversations into token ids, the same ids in fine-tuning, reward model and PPO.

    With ``chat`` the prompt is everything up to and including the template's generation prompt, the response what the
    template writes after it, up to and including the stop token. Without, both are plain text: the prompt begins with
    the BOS token if this tokenizer puts one before a text by itself, and the stop token is put after the response.

    Args:
        tokenizer: Tokenizer of the model.
        stop_token: Token that ends a response, as text; ``None`` takes the tokenizer's EOS token.
        chat: Whether to apply the tokenizer's chat template; False takes prompts and responses as plain text.

    Raises:
        UserError: If the template or the stop token is missing.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", *, stop_token: str | None = None, chat: bool = True
    ) -> None:
        if chat and not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; set chat: false to use plain text, "
                "or take a model that was tuned for chat."
            )
        self.tokenizer = tokenizer
        self.chat = chat
        self.stop_id = _stop_id(tokenizer, stop_token)
        """Id of the token that ends a response; ``None`` where neither an argument nor the tokenizer names one."""
        self.pad_id: int = next((id_ for id_ in (tokenizer.pad_token_id, self.stop_id) if id_ is not None), 0)
        """Id that fills a batch; it may be the stop token's, as masks are never made from it."""
        bos = tokenizer.bos_token_id
        adds_bos = not chat and bos is not None and self._ids("", special=True)[:1] == [bos]
        self._before: list[int] = [bos] if adds_bos else []

    def encode_prompt(self, prompt: Prompt, max_length: int | None = None) -> list[int]:
        """Return the ids that a response is generated from.

        Args:
            prompt: Text or chat messages; with a chat template a text is one message of the user.
            max_length: Tokens to keep, see :func:`truncate_left`; ``None`` keeps all.

        Returns:
            At least one id.

        Raises:
            UserError: If messages come without a chat template, or the template refuses them.
        """
        return self.truncate_prompt(self._prompt_ids(self._ids(self._prompt_text(prompt))), max_length)

    def truncate_prompt(self, prompt_ids: list[int], max_length: int | None) -> list[int]:
        """Cut the ids of a prompt as :meth:`encode_prompt` does."""
        return truncate_left(prompt_ids, max_length, bos_id=self.tokenizer.bos_token_id)

    def encode(self, prompt: Prompt, response: str) -> tuple[list[int], list[int]]:
        """Return the ids of a prompt and of a response to it.

        Args:
            prompt: As in :meth:`encode_prompt`, which gives the same ids for it.
            response: What the assistant answers; ``""`` is an answer of nothing but the stop token.

        Returns:
            Ids of the whole prompt, and ids of the response, which end with the stop token.

        Raises:
            UserError: As in :meth:`encode_prompt`, or if there is no stop token.
        """
        prompt_ids, (response_ids,) = self._cut(self._rendered(Conversation(prompt, (response,))), self._ids)
        return prompt_ids, response_ids

    def encode_many(
        self, conversations: Sequence[Conversation], cache: "TokenCache | None" = None
    ) -> Iterator[EncodedConversation | UserError]:
        """Yield the ids that :meth:`encode` gives, of many conversations tokenised at once.

        Every text is tokenised once, and the tokenizers library spreads those of one call over the processor's cores.

        Args:
            conversations: Prompts and responses; ids of a prompt without any are those of :meth:`encode_prompt`.
            cache: Where ids are kept from run to run; ``None`` always asks the tokenizer.

        Yields:
            The ids of each conversation; in the place of one that :meth:`encode` refuses, the error.
        """
        rendered = self._all_rendered(conversations)
        good = [texts for texts in rendered if isinstance(texts, _Rendered)]
        known = _KnownIds(self._ids, partial(cache.ids, tokenise=self._ids_of_all) if cache else self._ids_of_all)
        known.add(text for texts in good for text in (texts.prompt, *texts.wholes))
        # What is asked for where tokens run over the cut: rarely, but with some templates by every response.
        known.add(text for texts in good for text in _line_beginnings(texts, known))
        yield from (self._cut(texts, known) if isinstance(texts, _Rendered) else texts for texts in rendered)

    def encode_whole(self, prompt: Prompt, response: str) -> list[int]:
        """Return the ids of a prompt and a finished response as other programs have them: of one text, to its end.

        In a chat that is all that the template writes, also behind the stop token; plain text ends with the stop token.
        """
        (whole,) = self._rendered(Conversation(prompt, (response,))).wholes
        ids = self._before + self._ids(whole)
        return ids if self.chat else [*ids, cast(int, self.stop_id)]

    def after_stop(self, ids: list[int]) -> int:
        """Return where the last stop token of some ids ends; their number where there is none."""
        return next((at for at in range(len(ids), 0, -1) if ids[at - 1] == self.stop_id), len(ids))

    def _rendered(self, conversation: Conversation) -> _Rendered:
        prompt, responses = conversation
        if responses and self.stop_id is None:
            raise UserError(f"the tokenizer of {self.tokenizer.name_or_path!r} has no EOS token; name a stop_token.")
        prompt_text = self._prompt_text(prompt)
        return _Rendered(prompt_text, [self._whole_text(prompt, prompt_text, response) for response in responses])

    def _all_rendered(self, conversations: Sequence[Conversation]) -> list[_Rendered | UserError]:
        rendered: list[_Rendered | UserError] = []
        for start in range(0, len(conversations), _RENDERED_TOGETHER):
            with bounded(self.tokenizer.name_or_path):
                rendered += map(self._rendered_or_refused, conversations[start : start + _RENDERED_TOGETHER])
        return rendered

    def _rendered_or_refused(self, conversation: Conversation) -> _Rendered | UserError:
        try:
            return self._rendered(conversation)
        except UnboundedTemplateError:
            raise
        except UserError as error:
            return error

    def _cut(self, texts: _Rendered, ids_of: Callable[[str], list[int]]) -> EncodedConversation:
        """Tokenise prompt and responses together, and cut behind the prompt."""
        prompt_ids, responses = ids_of(texts.prompt), []
        for whole in texts.wholes:
            joint = ids_of(whole)
            fits = _begins(joint, prompt_ids)
            text = whole.removeprefix(texts.prompt)
            responses.append(self._stopped(joint[len(prompt_ids) :] if fits else _continuation_ids(text, ids_of)))
        return EncodedConversation(self._prompt_ids(prompt_ids), responses)

    def _prompt_text(self, prompt: Prompt) -> str:
        if self.chat:
            return render_chat(self.tokenizer, as_messages(prompt), add_generation_prompt=True)
        if not isinstance(prompt, str):
            raise UserError("the prompt is a list of chat messages, but chat is false; set chat: true, or give text.")
        return prompt

    def _whole_text(self, prompt: Prompt, prompt_text: str, response: str) -> str:
        if not self.chat:
            return prompt_text + response
        answer: Message = {"role": "assistant", "content": response}
        whole = render_chat(self.tokenizer, [*as_messages(prompt), answer], add_generation_prompt=False)
        if not whole.startswith(prompt_text):
            raise UserError(
                "the chat template does not put a reply after its generation prompt (a conversation with the reply "
                "does not begin with the prompt), so prompt and response cannot be told apart; give a template that "
                "does."
            )
        return whole

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _ids_of_all(self, texts: Sequence[str]) -> list["array[int]"]:
        ids: list[array[int]] = []
        for some in _portions(texts):
            encoded = self.tokenizer(
                some, add_special_tokens=False, verbose=False, return_attention_mask=False, return_token_type_ids=False
            )
            ids += [array("i", one) for one in encoded["input_ids"]]
        return ids

    def _prompt_ids(self, text_ids: list[int]) -> list[int]:
        """Put the BOS token before; a prompt of nothing becomes one token, for a response to be predicted from."""
        bos = self.tokenizer.bos_token_id
        return self._before + text_ids or [self.pad_id if bos is None else bos]

    def _stopped(self, ids: list[int]) -> list[int]:
        """End at the stop token: cut off the blanks that a template writes after it, or put it there."""
        assert self.stop_id is not None
        last = next((place for place in range(len(ids) - 1, -1, -1) if ids[place] == self.stop_id), None)
        if last is not None and not self.tokenizer.decode(ids[last + 1 :]).strip():
            return ids[: last + 1]
        return [*ids, self.stop_id]


def _begins(ids: list[int], with_ids: list[int]) -> bool:
    return ids[: len(with_ids)] == with_ids


def _continuation_ids(text: str, ids_of: Callable[[str], list[int]]) -> list[int]:
    """Tokenise text that follows other text, without the blank that some tokenizers put before a text."""
    line_end, joint = ids_of("\n"), ids_of("\n" + text)
    return joint[len(line_end) :] if _begins(joint, line_end) else ids_of(text)


def _line_beginnings(texts: _Rendered, ids_of: Callable[[str], list[int]]) -> list[str]:
    """Return what :func:`_continuation_ids` asks for first, of each response that needs it."""
    prompt_ids = ids_of(texts.prompt)
    running_over = [whole for whole in texts.wholes if not _begins(ids_of(whole), prompt_ids)]
    return [text for whole in running_over for text in ("\n", "\n" + whole.removeprefix(texts.prompt))]


def _portions(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield the texts in lists that a tokenizer can be given at once, without more memory than a fraction of a GiB."""
    portion: list[str] = []
    size = 0
    for text in texts:
        portion.append(text)
        size += len(text)
        if size >= _CHARACTERS_A_CALL:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def end_chats_at_stop(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Let the chat template write nothing behind the last stop token where it writes blanks there, in place.

    A reward model is read at that token, and every other program reads it at the end of what its template writes.
    A template that cannot be trimmed so is left as it is.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or tokenizer.eos_token_id is None:
        return
    try:
        whole = ConversationEncoder(tokenizer).encode_whole("a", "b")
        tokenizer.chat_template = trimmed_template(template)
        encoder = ConversationEncoder(tokenizer)
        trimmed = encoder.encode_whole("a", "b")
        fits = trimmed == whole[: encoder.after_stop(whole)] != whole
    except UserError:  # a template that needs more than a turn
        fits = False
    if not fits:
        tokenizer.chat_template = template


def truncate_left(ids: list[int], max_length: int | None, *, bos_id: int | None = None) -> list[int]:
    """Keep the last ``max_length`` ids, as what was said last matters most for the answer.

    Args:
        ids: Token ids.
        max_length: How many to keep, at least 1; ``None`` keeps all.
        bos_id: Where the ids begin with this one and it stands nowhere else, it stays in front: models lean on it. One
            that also marks turns, as SmolLM's does, is cut like any other.

    Example:
        >>> truncate_left([1, 5, 6, 7], 3, bos_id=1), truncate_left([1, 5, 1, 7], 3, bos_id=1)
        ([1, 6, 7], [5, 1, 7])
    """
    if max_length is None or len(ids) <= max_length:
        return ids
    if max_length > 1 and ids[0] == bos_id and ids.count(ids[0]) == 1:
        return [ids[0], *ids[len(ids) - max_length + 1 :]]
    return ids[len(ids) - max_length :]


def _stop_id(tokenizer: "PreTrainedTokenizerBase", stop_token: str | None) -> int | None:
    if stop_token is None:
        return tokenizer.eos_token_id
    stop_id = tokenizer.get_vocab().get(stop_token)
    if stop_id is None:
        near = did_you_mean(stop_token, tokenizer.get_added_vocab()) or did_you_mean(
            stop_token, tokenizer.all_special_tokens
        )
        raise UserError(f"stop_token {stop_token!r} is not one token of {tokenizer.name_or_path!r}.{near}")
    return int(stop_id)

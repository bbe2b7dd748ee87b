"""A chat template is a program of whoever made the model: it runs in transformers' sandbox, within bounds."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_lightning.data.shapes import Message
from rlhf_lightning.errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Of a call, or of a few conversations; ordinary templates take a ten-thousandth of a second and some kilobytes each.
MAX_SECONDS = 5.0
MAX_BYTES = 2**30
#: Letters that a template may write for one conversation, beside ten for each letter of its messages.
MAX_LETTERS = 1_000_000

_running = False  # within bounds already


#: What is put around a chat template so that it ends a conversation without blanks behind it.
_TRIMMED = "{% set whole %}", "{% endset %}{{ whole if add_generation_prompt else whole.rstrip() }}"


class UnboundedTemplateError(UserError):
    """A chat template goes beyond all bounds; no row of the data is to blame, so none is dropped for it."""


class _TooLong(BaseException):
    """Ends a template that runs too long; no ``Exception``, as jinja2 goes on after one in a constant expression."""


def render_chat(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, add_generation_prompt: bool
) -> str:
    """Return the text that a tokenizer's chat template makes of messages.

    Args:
        tokenizer: With a chat template, which runs in transformers' sandbox: it reaches no file and no module.
        messages: The conversation.
        add_generation_prompt: Whether to begin the assistant's next reply.

    Raises:
        UnboundedTemplateError: If it goes beyond what :func:`bounded` allows, or writes a million letters.
        UserError: If the template does not parse or refuses the conversation.
    """
    import jinja2

    name = tokenizer.name_or_path
    try:
        with bounded(name):
            text: Any = tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=add_generation_prompt, tokenize=False
            )
    except UnboundedTemplateError:
        raise
    except MemoryError as error:
        raise _unbounded(name, "a GiB of memory") from error
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template of {name!r} does not parse (line {error.lineno}: {error.message})."
        ) from error
    except Exception as error:  # whatever the template's own program raises
        roles = ", ".join(message["role"] for message in messages)
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise UserError(f"the chat template refuses a conversation of {roles}: {reason}.") from error
    if len(text) > MAX_LETTERS + 10 * sum(len(message["content"]) for message in messages):
        raise _unbounded(name, f"{len(text):,} letters")
    return str(text)


def trimmed_template(template: str) -> str:
    """Return a chat template that writes the same, but no blanks behind the end of a conversation.

    Example:
        >>> plain_template(trimmed_template("{{ messages }} ")) == plain_template("{{ messages }} ")
        True
    """
    return plain_template(template).join(_TRIMMED)


def plain_template(template: str) -> str:
    """Return the chat template that :func:`trimmed_template` was given, or one that it never was as it is."""
    before, after = _TRIMMED
    trimmed = template.startswith(before) and template.endswith(after)
    return template[len(before) : -len(after)] if trimmed else template


@contextlib.contextmanager
def bounded(name: str) -> Iterator[None]:
    """Bound what chat templates take that run inside; once for all of them, as it costs as much as a short one.

    Args:
        name: Of the tokenizer, for the error.

    Raises:
        UnboundedTemplateError: After 5 seconds of processor time (on the main thread, where the system has timers), or
            if the process would become a GiB larger (on Linux).
    """
    global _running
    if _running:
        yield
        return
    _running = True
    try:
        with _bounded_memory(MAX_BYTES), _bounded_time(MAX_SECONDS):
            yield
    except _TooLong as error:
        raise _unbounded(name, f"{MAX_SECONDS:g} seconds") from error
    finally:
        _running = False


def _unbounded(name: str, spent: str) -> UnboundedTemplateError:
    return UnboundedTemplateError(
        f"the chat template of {name!r} takes {spent} for a conversation, far beyond any that is meant to be used; "
        "take the model from another source, or set chat: false."
    )


@contextlib.contextmanager
def _bounded_time(seconds: float) -> Iterator[None]:
    """Raise within what runs inside once the process has used so much processor time; a pause does not count."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield  # Python hands signals to the main thread alone.
        return
    handler = signal.signal(signal.SIGPROF, _end)
    # Again after each further second, should the first be lost in code that lets no exception out.
    before = signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, *before)
        signal.signal(signal.SIGPROF, handler)


def _end(number: int, frame: object) -> None:
    raise _TooLong


@contextlib.contextmanager
def _bounded_memory(size: int) -> Iterator[None]:
    """Let an allocation within fail that would make the process larger by more than so many bytes."""
    mapped = _mapped_bytes()
    if mapped is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [mapped + size, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _mapped_bytes() -> int | None:
    """Return the size of the process's address space; ``None`` where the system does not tell."""
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return None
    try:
        return int(os.read(file, 64).split()[0]) * resource.getpagesize()
    finally:
        os.close(file)

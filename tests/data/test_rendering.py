"""Chat templates within bounds: what a template may not do ends in one line, and what it may costs nothing more."""

import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data import rendering
from rlhf_lightning.data.chat import Conversation, ConversationEncoder
from rlhf_lightning.data.rendering import UnboundedTemplateError, bounded, render_chat
from rlhf_lightning.data.shapes import Message
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_tokenizer

MESSAGES: list[Message] = [{"role": "user", "content": "Do you like tea?"}]
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer whose template a test may change."""
    return load_tokenizer("builtin:demo")


def render(tokenizer: Any, template: str) -> str:
    tokenizer.chat_template = template
    return render_chat(tokenizer, MESSAGES, add_generation_prompt=True)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that are reached sooner."""
    monkeypatch.setattr(rendering, "MAX_SECONDS", 0.3)


def test_an_ordinary_template_writes_what_transformers_writes(tokenizer: PreTrainedTokenizerBase) -> None:
    expected = tokenizer.apply_chat_template(list(MESSAGES), add_generation_prompt=True, tokenize=False)
    assert render_chat(tokenizer, MESSAGES, add_generation_prompt=True) == expected


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    "template",
    [
        NESTED,
        "{{ (7 ** (10 ** 7)) % (3 ** (10 ** 6)) > 0 }}",  # a constant, which jinja2 works out where it swallows errors
        "{{ ('a ' * 10 ** 7) | wordwrap }}",
        "{{ lipsum(n=10 ** 7) }}",
    ],
)
def test_a_template_without_end_is_ended(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    start = time.monotonic()
    with pytest.raises(UnboundedTemplateError, match="seconds for a conversation"):
        render(tokenizer, template)
    assert time.monotonic() - start < 30


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is bounded on Linux alone")
@pytest.mark.parametrize(
    "template",
    ["{{ 'a' * 10 ** 10 }}", DOUBLING, "{{ 'x' | center(10 ** 10) }}", "{{ messages[0].content.ljust(10 ** 10) }}"],
)
def test_a_template_that_takes_all_memory_gets_none(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UnboundedTemplateError, match="GiB of memory"):
        render(tokenizer, template)


def test_a_template_that_writes_without_end_is_refused_by_length(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(render(tokenizer, "{{ 'a' * 1000000 }}")) == 1_000_000
    with pytest.raises(UnboundedTemplateError, match="2,000,000 letters"):
        render(tokenizer, "{{ 'a' * 2000000 }}")


def test_a_long_conversation_may_have_a_long_text(tokenizer: PreTrainedTokenizerBase) -> None:
    long: Message = {"role": "user", "content": "tea " * 500_000}
    assert len(render_chat(tokenizer, [long], add_generation_prompt=True)) > 2_000_000


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('touch pwned') }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_what_the_sandbox_refuses_takes_one_line(
    template: str, reason: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError, match=f"refuses a conversation of user: .*{reason}"):
        render(tokenizer, template)


@pytest.mark.usefixtures("soon")
def test_bounds_leave_nothing_behind(tokenizer: PreTrainedTokenizerBase) -> None:
    before = signal.getsignal(signal.SIGPROF), resource.getrlimit(resource.RLIMIT_AS)
    for template in (NESTED, "{{ 'a' * 10 ** 10 }}", "{{ 1 / 0 }}", "ok"):
        try:
            render(tokenizer, template)
        except UserError:
            assert template != "ok"
        assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
        assert (signal.getsignal(signal.SIGPROF), resource.getrlimit(resource.RLIMIT_AS)) == before


def test_bounds_within_bounds_are_those_around_them() -> None:
    with bounded("a"):
        around = signal.getitimer(signal.ITIMER_PROF)[0]
        with bounded("b"):
            assert 0 < signal.getitimer(signal.ITIMER_PROF)[0] <= around
        assert signal.getitimer(signal.ITIMER_PROF)[0] > 0
    assert signal.getitimer(signal.ITIMER_PROF)[0] == 0


def test_a_thread_of_its_own_renders_too(tokenizer: PreTrainedTokenizerBase) -> None:
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(render_chat(tokenizer, MESSAGES, add_generation_prompt=True)))
    thread.start()
    thread.join()
    assert texts == [render_chat(tokenizer, MESSAGES, add_generation_prompt=True)]


@pytest.mark.usefixtures("soon")
def test_no_row_is_dropped_for_a_template_without_end(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = NESTED
    encoder = ConversationEncoder(tokenizer)
    with pytest.raises(UnboundedTemplateError):
        list(encoder.encode_many([Conversation("Hi", ("Hello",))] * 3))


def test_bounds_cost_little_where_many_conversations_are_rendered(tokenizer: PreTrainedTokenizerBase) -> None:
    def plain() -> None:
        for _ in range(400):
            tokenizer.apply_chat_template(list(MESSAGES), add_generation_prompt=True, tokenize=False)

    def ours() -> None:
        for _ in range(20):
            with bounded("demo"):
                for _ in range(20):
                    render_chat(tokenizer, MESSAGES, add_generation_prompt=True)

    seconds: dict[str, float] = {}
    for _ in range(20):
        for work in (plain, ours):
            start = time.perf_counter()
            work()
            seconds[work.__name__] = min(seconds.get(work.__name__, 9.0), time.perf_counter() - start)
    assert seconds["ours"] < 2 * seconds["plain"]

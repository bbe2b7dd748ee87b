"""Many conversations at once: the ids, the counts and the errors of one at a time."""

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_lightning.data.base import RowsDataModule
from rlhf_lightning.data.chat import Conversation, ConversationEncoder
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.readers import read_rows
from rlhf_lightning.data.shapes import as_messages, parse_pair
from rlhf_lightning.data.text import DemonstrationDataModule
from rlhf_lightning.data.unpaired import UnpairedDataModule
from rlhf_lightning.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Ends the prompt with a blank, which tokenizers join with the word that follows.
BLANK = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} ASSISTANT: {% else %}{{ m.content }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
REFUSING = "{% if 'bad' in messages[-1].content %}{{ raise_exception('no such words') }}{% endif %}" + CHATML


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's: BPE on bytes, no pad token, one token for BOS and EOS; trained on a few words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["Hi there, how are you? yes yes no no\n\n maybe"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def with_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


MAKERS: dict[str, Callable[[pytest.FixtureRequest], ConversationEncoder]] = {
    "demo": lambda r: ConversationEncoder(r.getfixturevalue("demo_tokenizer")),
    "demo, plain": lambda r: ConversationEncoder(r.getfixturevalue("demo_tokenizer"), stop_token=".", chat=False),
    "words": lambda r: ConversationEncoder(r.getfixturevalue("word_tokenizer")),
    "like GPT-2": lambda r: ConversationEncoder(byte_level(), chat=False),
    "like GPT-2, chat": lambda r: ConversationEncoder(with_template(byte_level(), CHATML)),
    "like GPT-2, blank": lambda r: ConversationEncoder(with_template(byte_level(), BLANK)),
    "in Python": lambda r: ConversationEncoder(with_template(ByT5Tokenizer(), BLANK)),
    "smollm": lambda r: ConversationEncoder(r.getfixturevalue("smollm_tokenizer")),
    "smollm, plain": lambda r: ConversationEncoder(r.getfixturevalue("smollm_tokenizer"), chat=False),
    "smollm, blank": lambda r: ConversationEncoder(with_template(r.getfixturevalue("smollm_tokenizer"), BLANK)),
    "smollm2": lambda r: ConversationEncoder(
        AutoTokenizer.from_pretrained(r.getfixturevalue("shared_data") / "tokenizers" / "smollm2-135m-instruct")
    ),
    "stories, puts BOS": lambda r: ConversationEncoder(
        r.getfixturevalue("stories_tokenizer"), stop_token="<s>", chat=False
    ),
}


@pytest.fixture(params=MAKERS)
def encoder(request: pytest.FixtureRequest) -> ConversationEncoder:
    return MAKERS[request.param](request)


def one_by_one(encoder: ConversationEncoder, conversations: list[Conversation]) -> list[Any]:
    return [
        (encoder.encode_prompt(prompt), [encoder.encode(prompt, response)[1] for response in responses])
        for prompt, responses in conversations
    ]


PIECES = [
    "Hi",
    "yes",
    "no.",
    " ",
    "\n",
    "w3",
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "</s>",
    "é",
    "🙂",
    "12",
    "\t",
    "'s",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


@given(
    conversations=st.lists(
        st.tuples(TEXTS, st.lists(TEXTS, max_size=3)).map(lambda both: Conversation(*both)), max_size=5
    )
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ids_are_those_of_one_at_a_time(encoder: ConversationEncoder, conversations: list[Conversation]) -> None:
    assert list(encoder.encode_many(conversations)) == one_by_one(encoder, conversations)


def by_definition(encoder: ConversationEncoder, prompt: Any, response: str) -> tuple[list[int], list[int]]:
    """Write the definition down again, for chats whose template ends an answer with EOS and perhaps a line end."""

    def ids(text: str) -> list[int]:
        return list(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])

    messages = as_messages(prompt)
    before = encoder.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    whole = encoder.tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": response}], tokenize=False
    )
    after = ids(whole)[len(ids(before)) :]
    if ids(whole)[: len(ids(before))] != ids(before):
        after = ids("\n" + whole.removeprefix(before))[len(ids("\n")) :]
    assert encoder.stop_id is not None
    return ids(before), after[: len(after) - after[::-1].index(encoder.stop_id)]


@pytest.mark.parametrize("template", [CHATML, BLANK])
def test_real_pairs_are_those_of_the_definition(
    shared_data: Path, smollm_tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    encoder = ConversationEncoder(with_template(smollm_tokenizer, template))
    names = ["human_like_dpo/eval.jsonl", "hh_rlhf_harmless/test_pairs.jsonl.gz"]
    pairs = [parse_pair(row) for name in names for row in read_rows(str(shared_data / name))[:150]]
    found = encoder.encode_many([Conversation(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs])
    running_over = 0
    for pair, encoded in zip(pairs, found, strict=True):
        assert not isinstance(encoded, UserError)
        for response, ids in zip((pair.chosen, pair.rejected), encoded.responses, strict=True):
            assert (encoded.prompt_ids, ids) == by_definition(encoder, pair.prompt, response)
            assert (encoded.prompt_ids, ids) == encoder.encode(pair.prompt, response)
            running_over += encoder.tokenizer(" " + response)["input_ids"][:1] != encoder.tokenizer(" ")["input_ids"]
    assert running_over > 500, "the template that ends with a blank is a hard case for nearly all"


class Asked:
    """Texts that tokenizers were asked for, each call's in a list."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[str]] = []
        ask = PreTrainedTokenizerBase.__call__

        def recorded(tokenizer: Any, text: Any, *arguments: Any, **named: Any) -> Any:
            self.calls.append([text] if isinstance(text, str) else list(text))
            return ask(tokenizer, text, *arguments, **named)

        monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", recorded)


@pytest.mark.parametrize("template", [CHATML, BLANK])
def test_a_text_is_tokenised_once_and_many_in_a_call(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ConversationEncoder(with_template(byte_level(), template))
    asked = Asked(monkeypatch)
    list(encoder.encode_many([Conversation(f"Hi {n % 3}", ("yes", f"no {n}")) for n in range(9)]))
    texts = [text for call in asked.calls for text in call]
    assert len(texts) == len(set(texts))
    assert len(asked.calls) == (1 if template is CHATML else 2), "the texts, and those that follow a line end"
    monkeypatch.setattr("rlhf_lightning.data.chat._CHARACTERS_A_CALL", 200)
    asked.calls.clear()
    list(encoder.encode_many([Conversation(f"Hi {n}", ("yes" * 10,)) for n in range(9)]))
    assert len(asked.calls) > 3
    assert all(sum(map(len, call[:-1])) < 200 for call in asked.calls)


def test_what_is_refused_stands_in_its_place(demo_tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = ConversationEncoder(with_template(demo_tokenizer, REFUSING))
    good = Conversation("Hi", ("yes", "no"))
    found = list(encoder.encode_many([good, Conversation("Hi", ("yes", "bad")), Conversation("bad"), good]))
    assert [isinstance(one, UserError) for one in found] == [False, True, True, False]
    assert [found[0], found[3]] == one_by_one(encoder, [good, good])
    with pytest.raises(UserError) as alone:
        encoder.encode("Hi", "bad")
    assert str(found[1]) == str(alone.value)
    without_eos = copy.deepcopy(demo_tokenizer)
    without_eos.eos_token = without_eos.pad_token = None
    asked, refused = ConversationEncoder(without_eos).encode_many([Conversation("Hi"), good])
    assert "no EOS token" in str(refused)
    assert not isinstance(asked, UserError)
    assert list(encoder.encode_many([])) == []


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(source: str, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> PreferenceDataModule:
    data = PreferenceDataModule(source, **settings)
    data._tokenizer = lambda: tokenizer  # type: ignore[method-assign]
    data.setup("fit")
    return data


@pytest.mark.parametrize("at_a_time", [1000, 3])
def test_the_first_row_that_the_template_refuses_is_named_and_only_such_are_dropped(
    tmp_path: Path, demo_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    monkeypatch.setattr("rlhf_lightning.data.base._ITEMS_AT_A_TIME", at_a_time)
    rows = [{"prompt": f"Hi {n}", "chosen": "yes", "rejected": "bad" if n in (4, 6) else "no"} for n in range(9)]
    source, tokenizer = write(tmp_path / "pairs.jsonl", rows), with_template(demo_tokenizer, REFUSING)
    with pytest.raises(UserError, match=r"pairs\.jsonl' row 5: the chat template refuses a conversation of user, ass"):
        pairs(source, tokenizer)
    dropped = pairs(source, tokenizer, bad_rows="drop", max_bad_share=1)
    kept = pairs(write(tmp_path / "kept.jsonl", [row for row in rows if row["rejected"] == "no"]), tokenizer)
    assert dropped.train_examples == kept.train_examples
    assert (dropped.counts["train_dropped_bad"], dropped.counts["train_kept"]) == (2, 7)


def slowly(data: RowsDataModule[Any, Any, Any], rows: list[dict[str, Any]]) -> tuple[list[Any], Counter[str]]:
    """Return examples and counts of rows that are encoded one by one."""
    counts: Counter[str] = Counter()
    examples = []
    for item in [item for row in rows for item in data.parse(row)]:
        conversation = data.conversation(item, counts)
        if conversation is not None:
            (encoded,) = data.encoder.encode_many([conversation])
            prompt_ids, responses = one_by_one(data.encoder, [conversation])[0]
            assert not isinstance(encoded, UserError)
            example = data.example(item, encoded._replace(prompt_ids=prompt_ids, responses=responses), counts)
            examples += [] if example is None else [example]
    return examples, counts


@pytest.mark.parametrize("kind", [PreferenceDataModule, DemonstrationDataModule, UnpairedDataModule, PromptDataModule])
@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_examples_and_counts_of_real_rows_are_those_of_one_at_a_time(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, kind: type[RowsDataModule[Any, Any, Any]], overlong: str
) -> None:
    monkeypatch.setattr("rlhf_lightning.data.base._ITEMS_AT_A_TIME", 70)
    source = str(shared_data / "hh_rlhf_harmless" / "test_pairs.jsonl.gz")
    limits: dict[str, Any] = {"max_prompt_length": 100}
    if kind is not PromptDataModule:
        limits |= {"max_length": 200, "overlong": overlong}
    tokenizer = str(shared_data / "tokenizers" / "smollm-135m-instruct")
    data = kind(source, limit=150, tokenizer=tokenizer, **limits)
    data.setup("fit")
    examples, counts = slowly(data, read_rows(source)[:150])
    assert data.train_examples == examples
    told = {name.removeprefix("train_"): number for name, number in data.counts.items()}
    assert {name: told[name] for name in counts} == dict(counts)
    assert counts["prompts_truncated"] > 0

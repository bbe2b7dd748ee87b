from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.data.readers import read_rows
from rlhf_lightning.data.shapes import Demonstration, Message, Pair, parse_demonstration, parse_pair, parse_prompt
from rlhf_lightning.errors import UserError


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be kind."}
HI = [user("Hi")]
HH = "\n\nHuman: Hi\n\nAssistant: Hey.\n\nHuman: More?\n\nAssistant:"
HH_PROMPT = [user("Hi"), assistant("Hey."), user("More?")]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hi", "chosen": "yes", "rejected": "no"}, "Hi"),
        ({"question": "Hi", "system": "Be kind.", "chosen": "yes", "rejected": "no"}, [SYSTEM, *HI]),
        ({"question": "Hi", "system": "", "chosen": "yes", "rejected": "no"}, "Hi"),
        ({"prompt": HI, "chosen": [assistant("yes")], "rejected": [assistant("no")]}, HI),
        ({"prompt": HI, "chosen": "yes", "rejected": "no"}, HI),
        ({"prompt": "Hi", "chosen": [user("Hi"), assistant("yes")], "rejected": [user("Hi"), assistant("no")]}, HI),
        ({"chosen": [SYSTEM, *HI, assistant("yes")], "rejected": [SYSTEM, *HI, assistant("no")]}, [SYSTEM, *HI]),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "yes"},
                "rejected": {"from": "gpt", "value": "no"},
            },
            HI,
        ),
        (
            {
                "prompt": [{"role": "USER", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}],
                "chosen": assistant("yes"),
                "rejected": [assistant("no")],
            },
            HI,
        ),
        ({"chosen": HH + " yes", "rejected": HH + " no"}, HH_PROMPT),
        ({"prompt": HH, "chosen": "yes", "rejected": "no"}, HH_PROMPT),
    ],
)
def test_pairs_of_every_shape_are_told_apart(row: dict[str, Any], prompt: Any) -> None:
    assert parse_pair(row) == Pair(prompt, "yes", "no")
    assert parse_prompt(row) == prompt
    assert parse_demonstration(row) == Demonstration(prompt, "yes")


def test_dialogues_stay_text_where_there_is_no_chat_template() -> None:
    row = {"chosen": HH + " yes", "rejected": HH + " no"}
    assert parse_pair(row, chat=False) == Pair(HH, " yes", " no")
    assert parse_pair({"prompt": HH, "chosen": "yes", "rejected": "no"}, chat=False) == Pair(HH, "yes", "no")
    assert parse_prompt({"prompt": "Hi", "system": "Be kind."}, chat=False) == "Be kind.\n\nHi"


@pytest.mark.parametrize("chat", [True, False])
def test_equal_responses_are_a_pair_whose_prompt_still_ends_before_the_reply(chat: bool) -> None:
    pair = parse_pair({"chosen": HH + " yes", "rejected": HH + " yes"}, chat=chat)
    assert pair == (Pair(HH_PROMPT, "yes", "yes") if chat else Pair(HH, " yes", " yes"))


def test_a_reply_that_itself_contains_a_turn_mark_is_one_reply() -> None:
    row = {"chosen": HH + " one\n\nAssistant: two", "rejected": HH + " no"}
    assert parse_pair(row) == Pair(HH_PROMPT, "one\n\ntwo", "no")
    assert parse_pair(row, chat=False) == Pair(HH, " one\n\nAssistant: two", " no")


def test_an_empty_piece_of_a_reply_leaves_no_trace() -> None:
    row = {"chosen": HH + " one\n\nAssistant:", "rejected": HH + " no"}
    assert parse_pair(row) == Pair(HH_PROMPT, "one", "no")


def test_an_empty_reply_is_a_reply() -> None:
    assert parse_pair({"chosen": HH + " yes", "rejected": HH}) == Pair(HH_PROMPT, "yes", "")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"promt": "Hi", "chosen": "a", "rejected": "b"}, ["'promt'", "Rename 'promt' to 'prompt'"]),
        ({"prompt": "Hi", "chosn": "a", "rejected": "b"}, ["no column 'chosen'", "Rename 'chosn' to 'chosen'"]),
        ({"prompt": "Hi", "chosen": "a"}, ["no column 'rejected'", "'prompt', 'chosen'"]),
        ({}, ["no column 'chosen'", "found nothing"]),
        ({"messages": [*HI, assistant("a")], "label": True}, ["unpaired", "demonstrations"]),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, ["prompt is 3; expected text"]),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, ["prompt is null"]),
        ({"prompt": "Hi", "chosen": "a", "rejected": None}, ["chosen is text and rejected is null"]),
        ({"prompt": "Hi", "chosen": None, "rejected": None}, ["chosen is null"]),
        ({"prompt": "Hi", "chosen": [], "rejected": []}, ["chosen is an empty list"]),
        ({"prompt": [{"role": "narrator", "content": "x"}], "chosen": "a", "rejected": "b"}, ["'narrator'", "gpt"]),
        ({"prompt": [{"speaker": "me", "text": "x"}], "chosen": "a", "rejected": "b"}, ["'speaker'", "from and value"]),
        ({"prompt": [user("x"), "y"], "chosen": "a", "rejected": "b"}, ["a message with text", "role and content"]),
        ({"prompt": [*HI, assistant("x")], "chosen": "a", "rejected": "b"}, ["ends with the assistant's message"]),
        ({"prompt": HH + " x", "chosen": "a", "rejected": "b"}, ["ends with the assistant's message"]),
        ({"chosen": [*HI, assistant("a")], "rejected": [user("Ho"), assistant("a")]}, ["differ before their last"]),
        ({"chosen": HI, "rejected": [*HI, assistant("a")]}, ["assistant's reply last"]),
        ({"chosen": [*HI, assistant("a"), user("x")], "rejected": [*HI, assistant("a")]}, ["differ before"]),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, ["no column 'prompt'"]),
    ],
)
def test_what_is_no_pair_is_said_in_one_line(row: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_pair(row)
    assert "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


def test_dialogues_that_differ_early_are_refused_as_text_too() -> None:
    row = {"chosen": HH + " yes\n\nHuman: and\n\nAssistant: so", "rejected": HH + " no"}
    for chat in (True, False):
        with pytest.raises(UserError, match="differ before their last reply"):
            parse_pair(row, chat=chat)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hi"}, "Hi"),
        ({"prompt": "Hi", "text": "no"}, "Hi"),
        ({"instruction": "Add.", "context": "1, 2", "response": "3"}, "Add.\n\n1, 2"),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, "Add.\n\n1, 2"),
        ({"instruction": "Add.", "context": "", "response": "3"}, "Add."),
        ({"messages": [*HI, assistant("a")], "label": False}, HI),
        ({"messages": HI}, HI),
        ({"system": "Be kind.", "conversations": [{"from": "human", "value": "Hi"}]}, [SYSTEM, *HI]),
    ],
)
def test_prompts_of_every_shape(row: dict[str, Any], prompt: Any) -> None:
    assert parse_prompt(row) == prompt


def test_text_gives_its_first_words_as_a_prompt_only_when_asked() -> None:
    row = {"text": "Once  upon\na time, there"}
    assert parse_prompt(row, text_words=3) == "Once  upon\na"
    assert parse_prompt(row, text_words=50) == row["text"]
    with pytest.raises(UserError, match="text_words"):
        parse_prompt(row)
    with pytest.raises(UserError, match=r"no column 'prompt'; found 'prmpt'\. Rename 'prmpt' to 'prompt'"):
        parse_prompt({"prmpt": "Hi"})
    with pytest.raises(UserError, match="nothing but the assistant's reply"):
        parse_prompt({"messages": [assistant("a")]})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi", "response": "a"}, Demonstration("Hi", "a")),
        ({"prompt": "Hi", "completion": "a"}, Demonstration("Hi", "a")),
        ({"prompt": HI, "completion": [assistant("a")]}, Demonstration(HI, "a")),
        ({"instruction": "Add.", "input": "", "output": "3"}, Demonstration("Add.", "3")),
        ({"question": "Hi", "answer": "a"}, Demonstration("Hi", "a")),
        (
            {"messages": [SYSTEM, *HI, assistant("a"), user("b"), assistant("c")]},
            Demonstration([SYSTEM, *HI, assistant("a"), user("b")], "c"),
        ),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "bot", "value": "a"}]}, Demonstration(HI, "a")),
    ],
)
def test_demonstrations_of_every_shape(row: dict[str, Any], expected: Demonstration) -> None:
    assert parse_demonstration(row) == expected


def test_demonstrations_that_are_none() -> None:
    with pytest.raises(UserError, match="messages ends with 'user'; expected the assistant's reply last"):
        parse_demonstration({"messages": [*HI, assistant("a"), user("b")]})
    with pytest.raises(UserError, match="nothing but the assistant's reply"):
        parse_demonstration({"messages": [assistant("a")]})
    with pytest.raises(UserError, match="completion holds messages that are not the assistant's"):
        parse_demonstration({"prompt": "Hi", "completion": HI})
    with pytest.raises(
        UserError, match=r"no column 'response'; found 'prompt', 'reponse'\. Rename 'reponse' to 'response'"
    ):
        parse_demonstration({"prompt": "Hi", "reponse": "a"})
    with pytest.raises(UserError, match="chat: false"):
        parse_demonstration({"text": "Once upon a time"})
    assert parse_demonstration({"text": "Once"}, chat=False) == Demonstration("", "Once")


def test_real_dialogues_split_at_the_last_reply(shared_data: Path) -> None:
    rows = read_rows(str(shared_data / "hh_rlhf_harmless" / "test_pairs.jsonl.gz"))
    mark = "\n\nAssistant:"
    plain = 0
    for row in rows:
        pair, text_pair = parse_pair(row), parse_pair(row, chat=False)
        assert isinstance(pair.prompt, list)
        assert pair.prompt[-1]["role"] == "user"
        assert isinstance(text_pair.prompt, str)
        assert text_pair.prompt + text_pair.chosen == row["chosen"]
        assert text_pair.prompt + text_pair.rejected == row["rejected"]
        sides = [row[side].rpartition(mark) for side in ("chosen", "rejected")]
        if sides[0][0] == sides[1][0]:  # the documented cut; the other four rows have a turn mark inside a reply
            assert (pair.chosen, pair.rejected) == (sides[0][2].strip(), sides[1][2].strip())
            plain += 1
    assert plain == 2008


def test_real_files_parse_whole(shared_data: Path) -> None:
    for name in ("train.jsonl.gz", "eval.jsonl", "as_an_ai_variant.jsonl.gz"):
        for row in read_rows(str(shared_data / "human_like_dpo" / name)):
            assert parse_pair(row) == Pair(row["prompt"], row["chosen"], row["rejected"])
    turns: Counter[tuple[str, str]] = Counter()
    for row in read_rows(str(shared_data / "preference_demos" / "dpo_en_demo.jsonl.gz")):
        pair = parse_pair(row)
        assert (pair.chosen, pair.rejected) == (row["chosen"]["value"], row["rejected"]["value"])
        assert [message["content"] for message in pair.prompt if isinstance(message, dict)] == [
            message["value"] for message in row["conversations"]
        ]
        assert isinstance(pair.prompt, list)
        turns[pair.prompt[0]["role"], pair.prompt[-1]["role"]] += 1
    assert turns == {("user", "user"): 220, ("system", "user"): 80}
    for row in read_rows(str(shared_data / "preference_demos" / "kto_en_demo.jsonl.gz")):
        assert parse_demonstration(row) == Demonstration(row["messages"][:-1], row["messages"][-1]["content"])
        with pytest.raises(UserError, match="unpaired"):
            parse_pair(row)
    for row in read_rows(str(shared_data / "dolly" / "eval.jsonl")):
        prompt = row["instruction"] + ("\n\n" + row["context"] if row["context"] else "")
        assert parse_demonstration(row) == Demonstration(prompt, row["response"])
    for row in read_rows(str(shared_data / "tinystories" / "eval.jsonl")):
        assert parse_demonstration(row, chat=False) == Demonstration("", row["text"])
        assert row["text"].startswith(str(parse_prompt(row, text_words=8)))


texts = st.sampled_from(
    ["", "Hi", "Human: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant: b", "\n\nAssistant:\n\nHuman:"]
)
leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | texts
messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            key: st.sampled_from(["user", "gpt", "x", None]) | texts for key in ("role", "from", "content", "value")
        },
    ),
    max_size=4,
)
values = st.recursive(leaves | messages, lambda inner: st.lists(inner, max_size=2) | messages, max_leaves=4)
columns = st.sampled_from(
    [
        "prompt",
        "chosen",
        "rejected",
        "conversations",
        "messages",
        "instruction",
        "input",
        "system",
        "label",
        "text",
        "response",
    ]
)


Parser = Callable[..., Any]


def result_or_error(parse: Parser, row: dict[str, Any], *, chat: bool) -> Any:
    try:
        return parse(row, chat=chat)
    except UserError as error:
        return error


@given(
    row=st.dictionaries(columns, values, max_size=6),
    chat=st.booleans(),
    parse=st.sampled_from([parse_pair, parse_prompt, parse_demonstration]),
)
@settings(max_examples=500, deadline=None)
def test_any_row_is_a_result_or_a_user_error(row: dict[str, Any], chat: bool, parse: Parser) -> None:
    result = result_or_error(parse, row, chat=chat)
    if isinstance(result, UserError):
        assert "\n" not in str(result)
        return
    prompt = result if parse is parse_prompt else result[0]
    if isinstance(prompt, list):
        assert prompt
        assert prompt[-1]["role"] != "assistant"
        assert all(isinstance(text, str) for message in prompt for text in message.values())
    else:
        assert isinstance(prompt, str)
    if parse is not parse_prompt:
        assert all(isinstance(text, str) for text in result[1:])

import copy
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_lightning.data.chat import ConversationEncoder, truncate_left
from rlhf_lightning.data.readers import read_rows
from rlhf_lightning.data.shapes import Prompt, parse_demonstration, parse_pair, parse_prompt
from rlhf_lightning.errors import UserError

IM_START, IM_END = 1, 2  # ids of SmolLM's turn marks
BOS = 1  # of stories260K


def changed(tokenizer: PreTrainedTokenizerBase, **attributes: str | None) -> PreTrainedTokenizerBase:
    other = copy.deepcopy(tokenizer)
    for name, value in attributes.items():
        setattr(other, name, value)
    return other


@pytest.fixture(params=["demo", "demo with pad == eos", "smollm"])
def chat_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    if request.param == "smollm":
        return request.getfixturevalue("smollm_tokenizer")
    pad_token = "<|im_end|>" if "==" in request.param else "<|pad|>"
    return changed(request.getfixturevalue("demo_tokenizer"), pad_token=pad_token)


def test_a_chat_is_what_the_template_writes_up_to_the_stop_token(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = ConversationEncoder(chat_tokenizer)
    prompt_ids, response_ids = encoder.encode("Hi", "Hello!")
    assert chat_tokenizer.decode(prompt_ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert chat_tokenizer.decode(response_ids) == "Hello!<|im_end|>"
    im_end = chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert response_ids[-1] == encoder.stop_id == im_end
    assert encoder.pad_id == chat_tokenizer.pad_token_id
    assert prompt_ids.count(im_end) == 1, "the stop token also stands inside the prompt"
    assert encoder.encode_prompt([{"role": "user", "content": "Hi"}]) == prompt_ids
    assert encoder.encode("Hi", "") == (prompt_ids, [im_end])


def test_the_second_template_puts_its_system_message_first(shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "smollm2-135m-instruct")
    prompt_ids, response_ids = ConversationEncoder(tokenizer).encode("Hi", "Hello!")
    assert tokenizer.decode(prompt_ids).startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert tokenizer.decode(prompt_ids).endswith("user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(response_ids) == "Hello!<|im_end|>"


def test_plain_text_begins_with_bos_and_ends_with_the_named_stop(stories_tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = ConversationEncoder(stories_tokenizer, stop_token="<s>", chat=False)
    prompt_ids, response_ids = encoder.encode("Once upon a time", ", there was")
    # 403 407 261 378 is "Once upon a time", 432 383 286 is ", there was": the ids of the whole text, cut in two
    assert (prompt_ids, response_ids) == ([BOS, 403, 407, 261, 378], [432, 383, 286, BOS])
    assert encoder.encode("", "Once upon a time") == ([BOS], [403, 407, 261, 378, BOS])
    assert encoder.encode_prompt("") == [BOS]
    assert encoder.encode("Once upon a time", "") == (prompt_ids, [BOS])


def test_a_tokenizer_that_puts_no_bos_gets_none(smollm_tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = ConversationEncoder(smollm_tokenizer, chat=False)
    assert encoder.encode("Once upon a time", ", there") == ([6403, 1980, 253, 655], [28, 665, IM_END])
    assert encoder.encode_prompt("") == [IM_START], "a response is predicted from something"


def test_text_whose_tokens_run_over_the_cut_keeps_the_prompt(
    smollm_tokenizer: PreTrainedTokenizerBase, stories_tokenizer: PreTrainedTokenizerBase
) -> None:
    smollm = ConversationEncoder(smollm_tokenizer, chat=False)
    prompt_ids, response_ids = smollm.encode("Answer: ", "yes")  # whole, " yes" is one token
    assert prompt_ids == smollm.encode_prompt("Answer: ")
    assert smollm_tokenizer.decode(prompt_ids + response_ids[:-1]) == "Answer: yes"
    stories = ConversationEncoder(stories_tokenizer, stop_token="<s>", chat=False)
    prompt_ids, response_ids = stories.encode("Once upon a tim", "e, there")
    assert prompt_ids == stories.encode_prompt("Once upon a tim")
    # without a blank before the "e", which this tokenizer puts before any text that stands alone
    assert stories_tokenizer.decode((prompt_ids + response_ids)[1:-1]).strip() == "Once upon a time, there"


def test_a_response_that_starts_with_a_line_end_does_not_change_the_prompt(
    chat_tokenizer: PreTrainedTokenizerBase,
) -> None:
    encoder = ConversationEncoder(chat_tokenizer)
    prompt_ids, response_ids = encoder.encode("Hi", "\nHello!")
    assert prompt_ids == encoder.encode_prompt("Hi")
    assert chat_tokenizer.decode(response_ids) == "\nHello!<|im_end|>"


def test_a_stop_token_that_the_template_does_not_write_is_put_after(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    _, response_ids = ConversationEncoder(chat_tokenizer, stop_token="<|endoftext|>").encode("Hi", "Hello!")
    assert chat_tokenizer.decode(response_ids) == "Hello!<|im_end|>\n<|endoftext|>"
    _, response_ids = ConversationEncoder(chat_tokenizer, stop_token=".", chat=False).encode("Hi", " I am. Yes")
    assert chat_tokenizer.decode(response_ids) == " I am. Yes.", "a stop inside the text cuts nothing off"
    _, response_ids = ConversationEncoder(chat_tokenizer, stop_token=".", chat=False).encode("Hi", " I am.")
    assert chat_tokenizer.decode(response_ids) == " I am."


def test_chats_are_truncated_on_the_left(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = ConversationEncoder(chat_tokenizer)
    whole = encoder.encode_prompt("one two three four")
    for length in range(1, len(whole) + 3):
        assert encoder.encode_prompt("one two three four", length) == whole[-length:]
        assert encoder.truncate_prompt(whole, length) == whole[-length:]


def test_bos_of_a_text_stays_in_front_when_it_is_truncated(stories_tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = ConversationEncoder(stories_tokenizer, chat=False)
    assert encoder.encode_prompt("Once upon a time", 3) == [BOS, 261, 378]
    assert encoder.encode_prompt("Once upon a time", 1) == [378]
    assert truncate_left([BOS, 5, 6], 2, bos_id=BOS) == [BOS, 6]
    assert truncate_left([5, 6, 7], 2, bos_id=None) == [6, 7]


def test_what_is_missing_is_said_before_any_text_comes(demo_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="no chat template; set chat: false"):
        ConversationEncoder(changed(demo_tokenizer, chat_template=None))
    with pytest.raises(UserError, match=r"stop_token '<\|im_ned\|>' is not one token of .*Did you mean '<\|im_end\|>'"):
        ConversationEncoder(demo_tokenizer, stop_token="<|im_ned|>")
    without_eos = ConversationEncoder(changed(demo_tokenizer, eos_token=None, pad_token=None))
    assert len(without_eos.encode_prompt("Hi")) > 0
    with pytest.raises(UserError, match="no EOS token; name a stop_token"):
        without_eos.encode("Hi", "Hello!")


def test_messages_need_a_template_and_the_template_must_take_them(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    prompt: Prompt = [{"role": "user", "content": "Hi"}]
    with pytest.raises(UserError, match="set chat: true"):
        ConversationEncoder(chat_tokenizer, chat=False).encode_prompt(prompt)
    strict = changed(chat_tokenizer, chat_template="{{ raise_exception('System role\n not supported') }}")
    with pytest.raises(UserError, match=r"refuses a conversation of user: System role not supported\."):
        ConversationEncoder(strict).encode_prompt(prompt)
    reordering = changed(
        chat_tokenizer,
        chat_template="{% if add_generation_prompt %}ask:{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    with pytest.raises(UserError, match="prompt and response cannot be told apart"):
        ConversationEncoder(reordering).encode(prompt, "Hello!")


@pytest.mark.parametrize(
    "name",
    ["human_like_dpo/eval.jsonl", "preference_demos/dpo_en_demo.jsonl.gz", "hh_rlhf_harmless/test_pairs.jsonl.gz"],
)
def test_real_pairs_are_the_same_ids_in_every_stage(
    shared_data: Path, smollm_tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    encoder = ConversationEncoder(smollm_tokenizer)
    for row in read_rows(str(shared_data / name))[:100]:
        pair, demonstration = parse_pair(row), parse_demonstration(row)
        prompt_ids, chosen_ids = encoder.encode(pair.prompt, pair.chosen)
        rejected_prompt_ids, rejected_ids = encoder.encode(pair.prompt, pair.rejected)
        assert prompt_ids == rejected_prompt_ids == encoder.encode_prompt(parse_prompt(row))
        assert encoder.encode(demonstration.prompt, demonstration.response) == (prompt_ids, chosen_ids)
        for ids, text in ((chosen_ids, pair.chosen), (rejected_ids, pair.rejected)):
            assert smollm_tokenizer.decode(ids) == text + "<|im_end|>", "not a character is lost or added"
            assert IM_END not in ids[:-1]


def test_real_stories_are_the_ids_of_the_whole_text(
    shared_data: Path, stories_tokenizer: PreTrainedTokenizerBase
) -> None:
    encoder = ConversationEncoder(stories_tokenizer, stop_token="<s>", chat=False)
    for row in read_rows(str(shared_data / "tinystories" / "eval.jsonl")):
        whole = stories_tokenizer(row["text"])["input_ids"]
        assert encoder.encode("", row["text"]) == ([BOS], [*whole[1:], BOS])
        prompt = str(parse_prompt(row, text_words=6))
        prompt_ids, response_ids = encoder.encode(prompt, row["text"].removeprefix(prompt))
        assert prompt_ids == encoder.encode_prompt(prompt)
        assert stories_tokenizer.decode([*prompt_ids[1:], *response_ids[:-1]]).strip() == row["text"].strip()

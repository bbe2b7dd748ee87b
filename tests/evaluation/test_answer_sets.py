import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.chat import ConversationEncoder
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.answer_sets import EncodedAnswers, LikelihoodSet, PairSet, read_answers, read_pairs

PAIR = {"prompt": "Do you like tea?", "chosen": "I love it!", "rejected": "As an AI, I do not drink.", "from": "a"}
DEMONSTRATION = {"instruction": "Name a colour.", "context": "", "response": "Red."}
TEXT = {"text": "The garden was quiet in the morning."}


def written(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ids(found: EncodedAnswers, row: int = 0) -> tuple[list[int], list[int]]:
    """Return the tokens of what is given, and of the answer."""
    batch = found.sequences
    cut, end = int(batch.prompt_lengths[row]), int(batch.lengths[row])
    tokens = batch.input_ids[row].tolist()
    return tokens[:cut], tokens[cut:end]


@pytest.mark.parametrize(
    ("row", "answer", "response"),
    [
        (PAIR, "auto", PAIR["chosen"]),
        (PAIR, "chosen", PAIR["chosen"]),
        (PAIR, "rejected", PAIR["rejected"]),
        (PAIR, "response", PAIR["chosen"]),
        (DEMONSTRATION, "auto", DEMONSTRATION["response"]),
    ],
)
@pytest.mark.parametrize("chat", [True, False])
def test_the_answer_is_what_is_asked_for(
    demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, Any], answer: Any, response: str, chat: bool
) -> None:
    found = read_answers(LikelihoodSet(written(tmp_path, row), answer=answer, chat=chat), demo_tokenizer)
    prompt = row["prompt"] if "prompt" in row else row["instruction"]
    assert ids(found) == ConversationEncoder(demo_tokenizer, chat=chat).encode(prompt, response)


@pytest.mark.parametrize("answer", ["auto", "text"])
@pytest.mark.parametrize("chat", [True, False])
def test_running_text_counts_whole_and_without_a_stop_token(
    demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, answer: Any, chat: bool
) -> None:
    found = read_answers(LikelihoodSet(written(tmp_path, TEXT), answer=answer, chat=chat), demo_tokenizer)
    given, tokens = ids(found)
    assert tokens == demo_tokenizer(TEXT["text"], add_special_tokens=False)["input_ids"]
    assert given == ConversationEncoder(demo_tokenizer, chat=False).encode_prompt("")


def test_running_text_follows_the_bos_token_where_the_tokenizer_puts_one(
    stories_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    given, tokens = ids(read_answers(LikelihoodSet(written(tmp_path, TEXT)), stories_tokenizer))
    assert [*given, *tokens] == stories_tokenizer(TEXT["text"])["input_ids"]
    assert given == [stories_tokenizer.bos_token_id]


def test_the_whole_text_of_a_row_with_an_answer_has_its_prompt_too(
    demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = written(tmp_path, PAIR)
    given, tokens = ids(read_answers(LikelihoodSet(source, answer="text"), demo_tokenizer))
    prompt, response = ConversationEncoder(demo_tokenizer).encode(PAIR["prompt"], PAIR["chosen"])
    assert (given, tokens) == (prompt[:1], prompt[1:] + response)
    _, plain = ids(read_answers(LikelihoodSet(source, answer="text", chat=False), demo_tokenizer))
    assert plain == demo_tokenizer(PAIR["prompt"] + PAIR["chosen"], add_special_tokens=False)["input_ids"]


def test_rows_without_an_answer_do_not_count_and_the_limit_is_of_the_rest(
    demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"text": text} for text in ("", "one", " \n", "two", "three")]
    found = read_answers(LikelihoodSet(written(tmp_path, *rows), limit=2), demo_tokenizer)
    assert (len(found.sequences.lengths), found.available, found.counts["dropped_empty"]) == (2, 5, 2)


def test_the_seed_draws_and_the_same_rows_for_pairs(demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = written(tmp_path, *(PAIR | {"prompt": f"Number {number}?"} for number in range(30)))
    pairs = read_pairs(PairSet(source, limit=5), demo_tokenizer, seed=1)
    again = read_answers(LikelihoodSet(source, limit=5), demo_tokenizer, seed=1)
    other = read_answers(LikelihoodSet(source, limit=5), demo_tokenizer, seed=2)
    assert pairs.chosen.input_ids.tolist() == again.sequences.input_ids.tolist()
    assert again.sequences.input_ids.tolist() != other.sequences.input_ids.tolist()
    # As rewards get them in training.
    assert pairs.prompts == [[{"role": "user", "content": row["prompt"]}] for row in pairs.rows]
    assert read_pairs(PairSet(source, limit=1, chat=False), demo_tokenizer).prompts[0] in {
        f"Number {number}?" for number in range(30)
    }


def test_what_is_too_long_is_cut_or_left_out(demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    long = PAIR | {"rejected": "no " * 60}
    source = written(tmp_path, PAIR, long)
    sizes: dict[str, Any] = {"max_length": 40, "max_prompt_length": 12}
    cut = read_pairs(PairSet(source, **sizes), demo_tokenizer)
    assert cut.finished[0].tolist() == [True, True]
    assert cut.finished[1].tolist()[1] is False
    assert int(cut.rejected.lengths[1]) == 40
    assert int(cut.chosen.prompt_lengths.max()) == 12
    assert cut.texts[0] == [PAIR["chosen"]] * 2
    assert 0 < len(cut.texts[1][1]) < len(long["rejected"])
    assert cut.counts["prompts_truncated"] == 2
    dropped = read_pairs(PairSet(source, max_length=60, max_prompt_length=30, overlong="drop"), demo_tokenizer)
    assert (len(dropped.prompts), dropped.counts["dropped_overlong"]) == (1, 1)


def test_groups_are_the_values_of_the_column(demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = written(tmp_path, PAIR, PAIR | {"from": "b"})
    assert read_pairs(PairSet(source, group_by="from"), demo_tokenizer).groups == ["a", "b"]
    assert read_pairs(PairSet(source), demo_tokenizer).groups is None


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([DEMONSTRATION], {"answer": "chosen"}, r"here: '.*rows.jsonl' row 1: no column 'chosen'"),
        ([TEXT, {"txt": "x"}], {}, "row 2: no column 'response'"),
        ([{"text": " "}], {}, r"nothing is left of .*dropped_empty 1\); all answers are empty"),
        ([PAIR], {"max_length": 9, "max_prompt_length": 8, "overlong": "drop"}, "dropped_overlong 1.*raise max_length"),
        ([{"messages": [{"role": "user", "content": "Hi"}]}], {}, "ends with 'user'"),
    ],
)
def test_mistakes_name_the_set_and_the_row(
    demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, rows: Any, settings: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_answers(LikelihoodSet(written(tmp_path, *rows), **settings), demo_tokenizer, where="here")


def test_numbers_out_of_range_and_columns_that_are_not_there_are_refused(
    demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="limit is 0"):
        LikelihoodSet("rows.jsonl", limit=0)
    with pytest.raises(UserError, match="max_prompt_length is 512 and max_length 512"):
        PairSet("rows.jsonl", max_prompt_length=512)
    with pytest.raises(UserError, match=r"group_by is 'form'.*Did you mean 'from'"):
        read_pairs(PairSet(written(tmp_path, PAIR), group_by="form"), demo_tokenizer)
    with pytest.raises(UserError, match=r"pairs: data file .*none.jsonl' does not exist"):
        read_pairs(PairSet(str(tmp_path / "none.jsonl")), demo_tokenizer)

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.chat import ConversationEncoder
from rlhf_lightning.data.text import DemonstrationDataModule
from rlhf_lightning.errors import UserError

PAIR = {"prompt": "Hi", "chosen": "yes", "rejected": "no"}


def demonstrations(source: Path | str, **settings: Any) -> DemonstrationDataModule:
    data = DemonstrationDataModule(str(source), **{"tokenizer": "builtin:demo", **settings})
    data.setup("fit")
    return data


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize(("wanted", "texts"), [("chosen", ["yes"]), ("rejected", ["no"]), ("both", ["yes", "no"])])
def test_the_named_responses_of_a_pair_are_learnt(
    tmp_path: Path, demo_tokenizer: PreTrainedTokenizerBase, wanted: Any, texts: list[str]
) -> None:
    data = demonstrations(write(tmp_path, [PAIR]), responses=wanted)
    encoder = ConversationEncoder(demo_tokenizer)
    assert [(list(prompt), list(response)) for prompt, response in data.train_examples] == [
        encoder.encode("Hi", text) for text in texts
    ]


def test_both_responses_of_a_prompt_stay_on_one_side_of_the_split(tmp_path: Path) -> None:
    source = write(tmp_path, [{**PAIR, "prompt": f"Hi {number}"} for number in range(10)])
    data = demonstrations(source, responses="both", val_size=4)
    assert (len(data.train_examples), len(data.val_examples)) == (16, 4)
    assert len({tuple(example.prompt_ids) for example in data.val_examples}) == 2


def test_what_is_empty_or_marked_as_bad_is_not_learnt(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rows: list[dict[str, Any]] = [
        {"messages": messages, "label": True},
        {"messages": messages, "label": False},
        {**PAIR, "chosen": " "},
    ]
    data = demonstrations(write(tmp_path, rows))
    assert {name: number for name, number in data.counts.items() if number} == {
        "train_rows": 3,
        "train_dropped_unwanted": 1,
        "train_dropped_empty": 1,
        "train_kept": 1,
    }


def test_batches_hold_the_response_to_learn(tmp_path: Path, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    source = write(tmp_path, [{"instruction": "Add.", "context": "1 2", "response": "3"}])
    (batch,) = demonstrations(source, batch_size=1).train_dataloader()
    assert demo_tokenizer.decode(batch.response_tokens[0]) == "3<|im_end|>"
    assert "Add.\n\n1 2" in demo_tokenizer.decode(batch.input_ids[0, : batch.prompt_lengths[0]])


def test_overlong_demonstrations_are_dropped_or_truncated(tmp_path: Path) -> None:
    source = write(tmp_path, [PAIR, {**PAIR, "chosen": "z" * 100}])
    assert demonstrations(source, max_length=60, max_prompt_length=20).counts["train_dropped_overlong"] == 1
    data = demonstrations(source, max_length=60, max_prompt_length=20, overlong="truncate")
    assert len(data.train_examples[1].prompt_ids) + len(data.train_examples[1].response_ids) == 60
    assert data.counts["train_responses_truncated"] == 1
    with pytest.raises(UserError, match=r"nothing is left of the train rows .* dropped_overlong 2"):
        demonstrations(source, max_length=8, max_prompt_length=7)
    with pytest.raises(UserError, match="max_prompt_length is 9 and max_length 9"):
        DemonstrationDataModule("x.jsonl", max_length=9, max_prompt_length=9)


def test_running_text_needs_plain_text(tmp_path: Path) -> None:
    source = write(tmp_path, [{"text": "Once upon a time"}])
    with pytest.raises(UserError, match=r"row 1: .* set chat: false"):
        demonstrations(source)
    assert len(demonstrations(source, chat=False).train_examples[0].prompt_ids) == 1


def test_real_stories_are_whole_and_end_with_the_named_stop(
    shared_data: Path, stories_tokenizer: PreTrainedTokenizerBase
) -> None:
    data = demonstrations(
        shared_data / "tinystories" / "eval.jsonl",
        tokenizer=str(shared_data / "models" / "stories260K"),
        chat=False,
        stop_token="<s>",
        max_length=2048,
        shuffle=False,
        batch_size=105,
    )
    assert data.counts["train_kept"] == 105
    (batch,) = data.train_dataloader()
    assert batch.input_ids[:, 0].tolist() == [1] * 105
    last = batch.lengths - 1
    assert batch.input_ids.gather(1, last[:, None]).squeeze(1).tolist() == [1] * 105
    story = json.loads((shared_data / "tinystories" / "eval.jsonl").read_text().split("\n")[0])["text"]
    assert stories_tokenizer.decode(batch.response_tokens[0][: batch.response_lengths[0] - 1]) == story


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("dolly/eval.jsonl", 501),
        ("human_like_dpo/eval.jsonl", 400),
        ("preference_demos/dpo_en_demo.jsonl.gz", 300),
        ("preference_demos/kto_en_demo.jsonl.gz", 150),
    ],
)
def test_real_files_load_whole(shared_data: Path, name: str, kept: int) -> None:
    data = demonstrations(
        shared_data / name,
        tokenizer=str(shared_data / "tokenizers" / "smollm-135m-instruct"),
        max_length=20_000,
        max_prompt_length=10_000,
    )
    assert data.counts["train_kept"] == kept
    assert data.counts["train_prompts_truncated"] == 0

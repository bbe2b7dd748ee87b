import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.chat import ConversationEncoder
from rlhf_lightning.data.unpaired import UnpairedDataModule, read_label
from rlhf_lightning.errors import UserError

Read = Callable[..., UnpairedDataModule]
ROW = {"prompt": "Hi", "completion": "yes", "label": True}


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """``read(row, row, ..., setting=...)`` is the data module of these rows, set up."""

    def make(*rows: dict[str, Any], **settings: Any) -> UnpairedDataModule:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = UnpairedDataModule(str(tmp_path / "rows.jsonl"), **{"tokenizer": "builtin:demo", **settings})
        data.setup("fit")
        return data

    return make


def contents(data: UnpairedDataModule) -> list[tuple[list[int], list[int], float]]:
    return [(list(prompt), list(response), label) for prompt, response, label in data.train_examples]


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {"prompt": "Hi", "response": "yes", "label": 1},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}], "label": "True"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "yes"}], "label": "1.0"},
    ],
)
def test_every_form_of_a_labelled_response_reads_alike(
    read: Read, demo_tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]
) -> None:
    assert contents(read(row)) == [(*ConversationEncoder(demo_tokenizer).encode("Hi", "yes"), 1.0)]


def test_a_pair_is_a_good_and_a_bad_response(read: Read, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    encode = ConversationEncoder(demo_tokenizer).encode
    data = read({"prompt": "Hi", "chosen": "yes", "rejected": "no"})
    assert contents(data) == [(*encode("Hi", "yes"), 1.0), (*encode("Hi", "no"), 0.0)]


def test_both_halves_of_a_pair_stay_on_one_side_of_the_split(read: Read) -> None:
    data = read(*[{"prompt": f"Hi {n}", "chosen": "yes", "rejected": "no"} for n in range(10)], val_size=4)
    assert (len(data.train_examples), len(data.val_examples)) == (16, 4)
    assert len({tuple(example.prompt_ids) for example in data.val_examples}) == 2


@pytest.mark.parametrize(
    ("value", "label"), [(True, 1.0), (False, 0.0), (4, 4.0), (-0.5, -0.5), (" false", 0.0), ("2.5", 2.5)]
)
def test_labels(value: Any, label: float) -> None:
    assert read_label({"label": value}, "label") == label


@pytest.mark.parametrize("value", [None, "good", "nan", float("inf"), [1], ""])
def test_what_is_no_label_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"label is .*; expected true, false or a finite number\."):
        read_label({"label": value}, "label")


def test_label_column_changes_the_labels(read: Read) -> None:
    row = {**ROW, "rating": 4.5}
    assert [read(row, label_column=column).train_examples[0].label for column in ("label", "rating")] == [1.0, 4.5]
    with pytest.raises(UserError, match=r"row 1: no label column 'ratting'; found .* Set label_column to 'rating'"):
        read(row, label_column="ratting")


def test_batches_hold_responses_and_labels(read: Read, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    data = read(ROW, {**ROW, "completion": "no", "label": False}, shuffle=False, batch_size=2)
    (batch,) = data.train_dataloader()
    assert batch.labels.tolist() == [1.0, 0.0]
    responses = zip(batch.sequences.response_tokens, batch.sequences.response_lengths, strict=True)
    assert [demo_tokenizer.decode(row[:n]) for row, n in responses] == ["yes<|im_end|>", "no<|im_end|>"]


def test_overlong_changes_what_becomes_of_long_responses(read: Read) -> None:
    long = {**ROW, "completion": "z" * 100}
    assert read(ROW, long, max_length=60, max_prompt_length=20).counts["train_dropped_overlong"] == 1
    data = read(ROW, long, max_length=60, max_prompt_length=20, overlong="truncate")
    assert sum(map(len, data.train_examples[1][:2])) == 60
    assert data.counts["train_responses_truncated"] == 1


def test_empty_responses_are_kept_and_counted(read: Read) -> None:
    data = read({**ROW, "completion": " ", "label": False})
    assert (data.counts["train_kept"], data.counts["train_empty_responses"]) == (1, 1)


def test_a_real_file_loads_whole(shared_data: Path) -> None:
    data = UnpairedDataModule(
        str(shared_data / "preference_demos" / "kto_en_demo.jsonl.gz"),
        tokenizer=str(shared_data / "tokenizers" / "smollm-135m-instruct"),
        max_length=20_000,
        max_prompt_length=10_000,
    )
    data.setup("fit")
    # 150 good ones, as the demonstrations that are read from the same file.
    assert sorted({example.label for example in data.train_examples}) == [0.0, 1.0]
    assert sum(example.label for example in data.train_examples) == 150
    assert data.counts["train_kept"] == data.counts["train_rows"] == 300

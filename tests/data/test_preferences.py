import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.chat import ConversationEncoder
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.errors import UserError


def pairs(source: Path | str, **settings: Any) -> PreferenceDataModule:
    data = PreferenceDataModule(str(source), **{"tokenizer": "builtin:demo", **settings})
    data.setup("fit")
    return data


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A short pair, one whose chosen response is long, a tie, one with an empty rejected response, a long prompt."""
    words = [
        ("Hi", "yes", "no"),
        ("Hi", "yes" * 30, "no"),
        ("Hi", "no", "no"),
        ("Hi", "yes", ""),
        ("Hi" * 30, "yes", "no"),
    ]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in words]))
    return path


def test_ids_are_those_of_the_encoder(rows: Path, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = ConversationEncoder(demo_tokenizer)
    first, second, _ = (
        pairs(rows, shuffle=False, batch_size=2).train_dataloader().collate(pairs(rows).train_examples[:2])
    )
    prompt_ids, yes = encoder.encode("Hi", "yes")
    no = encoder.encode("Hi", "no")[1]
    assert first.input_ids[0][first.attention_mask[0]].tolist() == prompt_ids + yes
    assert second.input_ids[0][second.attention_mask[0]].tolist() == prompt_ids + no
    assert first.response_lengths[0] == len(yes)


def test_overlong_pairs_are_dropped_or_truncated_by_name_and_counted(
    rows: Path, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    encoder = ConversationEncoder(demo_tokenizer)
    prompt_ids = encoder.encode_prompt("Hi")
    limits = {"max_prompt_length": len(prompt_ids), "max_length": len(prompt_ids) + 5}
    dropped = pairs(rows, **limits)
    assert len(dropped.train_examples) == 4
    assert dropped.counts["train_dropped_overlong"] == 1
    assert dropped.counts["train_prompts_truncated"] == 1
    truncated = pairs(rows, overlong="truncate", **limits)
    long_ids = encoder.encode("Hi", "yes" * 30)[1]
    assert len(truncated.train_examples) == 5
    assert list(truncated.train_examples[1].chosen_ids) == long_ids[:5]
    assert list(truncated.train_examples[1].rejected_ids) == encoder.encode("Hi", "no")[1]
    assert truncated.counts["train_responses_truncated"] == 1
    long_prompt = encoder.encode_prompt("Hi" * 30)
    assert list(truncated.train_examples[4].prompt_ids) == long_prompt[-len(prompt_ids) :]


def test_ties_and_empty_responses_are_kept_and_counted(rows: Path, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    data = pairs(rows)
    assert (data.counts["train_ties"], data.counts["train_empty_responses"], data.counts["train_kept"]) == (1, 1, 5)
    assert list(data.train_examples[3].rejected_ids) == [demo_tokenizer.eos_token_id]


def test_training_pairs_that_are_all_ties_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "same.jsonl"
    path.write_text('{"prompt": "Hi", "chosen": "yes", "rejected": "yes"}\n' * 3)
    with pytest.raises(UserError, match=r"all 3 training pairs of .*same\.jsonl' have a chosen response equal to the"):
        pairs(path)


def test_lengths_must_leave_room() -> None:
    with pytest.raises(UserError, match="max_prompt_length is 512 and max_length 512"):
        PreferenceDataModule("x.jsonl", max_prompt_length=512)


def test_demo_pairs_load(demo_tokenizer: PreTrainedTokenizerBase) -> None:
    data = pairs("builtin:demo/train", val_source="builtin:demo/eval", limit=50)
    assert data.counts["train_kept"] == 50
    assert data.counts["val_prompts_in_training"] == 0
    assert demo_tokenizer.unk_token_id not in data.train_examples[0].chosen_ids


def test_real_pairs_are_counted_as_they_are(shared_data: Path) -> None:
    folder = shared_data / "human_like_dpo"
    tokenizer = str(shared_data / "tokenizers" / "smollm-135m-instruct")
    data = pairs(folder / "eval.jsonl", tokenizer=tokenizer, max_length=300, val_size=40)
    counts = data.counts
    assert counts["train_rows"] == 400
    assert (
        counts["train_kept"] + counts["train_dropped_overlong"] + counts["val_kept"] + counts["val_dropped_overlong"]
        == 400
    )
    assert counts["train_dropped_overlong"] > 0
    longest = max(
        len(example.prompt_ids) + max(len(example.chosen_ids), len(example.rejected_ids))
        for example in data.train_examples
    )
    assert longest <= 300
    cut = pairs(folder / "eval.jsonl", tokenizer=tokenizer, max_length=300, overlong="truncate")
    assert cut.counts["train_kept"] == 400


@pytest.mark.parametrize(
    ("name", "kept"), [("preference_demos/dpo_en_demo.jsonl.gz", 100), ("hh_rlhf_harmless/test_pairs.jsonl.gz", 100)]
)
def test_real_pairs_of_other_shapes_load(shared_data: Path, name: str, kept: int) -> None:
    tokenizer = str(shared_data / "tokenizers" / "smollm-135m-instruct")
    data = pairs(shared_data / name, tokenizer=tokenizer, max_length=4096, max_prompt_length=2048, limit=100)
    assert data.counts["train_kept"] == kept
    with pytest.raises(UserError, match=r"row 1: the row is unpaired"):
        pairs(shared_data / "preference_demos" / "kto_en_demo.jsonl.gz", tokenizer=tokenizer)


class TestMargins:
    def margins(self, tmp_path: Path, values: list[Any], **settings: Any) -> list[float]:
        (tmp_path / "rated.json").write_text(
            json.dumps([{"prompt": "Hi", "chosen": "yes", "rejected": "no", "gap": value} for value in values])
        )
        data = pairs(tmp_path / "rated.json", **{"margin_column": "gap", "batch_size": 8, "shuffle": False, **settings})
        margins = data.collate(data.train_examples).margins
        return [] if margins is None else margins.tolist()

    def test_margin_column_changes_what_batches_hold(self, tmp_path: Path) -> None:
        assert self.margins(tmp_path, [1, 0.5, "2.5", 0]) == [1, 0.5, 2.5, 0]
        assert self.margins(tmp_path, [1, 0.5], margin_column=None) == []

    @pytest.mark.parametrize("value", [None, "much", -1, float("inf"), [1]])
    def test_what_is_no_margin_is_named(self, tmp_path: Path, value: Any) -> None:
        with pytest.raises(UserError, match=r"row 2: gap is .*; expected a finite number of at least 0"):
            self.margins(tmp_path, [1, value])

    def test_a_column_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no margin column 'gab'; found .*'gap'\. Did you mean 'gap'\?"):
            self.margins(tmp_path, [1], margin_column="gab")

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.chat import ConversationEncoder
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.text import DemonstrationDataModule
from rlhf_lightning.errors import UserError


def prompts(source: Path | str, **settings: Any) -> PromptDataModule:
    data = PromptDataModule(str(source), **{"tokenizer": "builtin:demo", **settings})
    data.setup("fit")
    return data


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_batches_are_left_padded_with_their_messages_and_rows(
    tmp_path: Path, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"prompt": "Hi", "topic": 1}, {"prompt": "Hi there", "topic": 2}]
    data = prompts(write(tmp_path, rows), rollout_batch_size=2, shuffle=False)
    (batch,) = data.train_dataloader()
    for number, row in enumerate(rows):
        ids = ConversationEncoder(demo_tokenizer).encode_prompt(str(row["prompt"]))
        assert batch.input_ids[number][batch.attention_mask[number]].tolist() == ids
        assert batch.input_ids[number, -1] == ids[-1]
    assert batch.prompts == [[{"role": "user", "content": row["prompt"]}] for row in rows]
    assert batch.rows == rows


def test_plain_prompts_stay_text(tmp_path: Path) -> None:
    data = prompts(write(tmp_path, [{"prompt": "Hi"}]), chat=False, rollout_batch_size=1)
    (batch,) = data.train_dataloader()
    assert batch.prompts == ["Hi"]


def test_long_prompts_lose_their_beginning_and_are_counted(
    tmp_path: Path, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    data = prompts(write(tmp_path, [{"prompt": "one two three"}, {"prompt": "x"}]), max_prompt_length=9)
    whole = ConversationEncoder(demo_tokenizer).encode_prompt("one two three")
    assert list(data.train_examples[0].prompt_ids) == whole[-9:]
    assert (data.counts["train_prompts_truncated"], data.counts["train_kept"]) == (1, 2)


def test_validation_batches_may_have_another_size(tmp_path: Path) -> None:
    source = write(tmp_path, [{"prompt": f"Hi {n}"} for n in range(12)])
    data = prompts(source, val_size=3, rollout_batch_size=3, val_batch_size=2)
    assert [len(batch.rows) for batch in data.val_dataloader()] == [2, 1]
    assert [len(batch.rows) for batch in data.train_dataloader()] == [3, 3, 3]


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="max_prompt_length is 0"):
        PromptDataModule("x.jsonl", max_prompt_length=0)
    with pytest.raises(UserError, match="text_words is 0"):
        PromptDataModule("x.jsonl", text_words=0)
    with pytest.raises(UserError, match="batch_size is 0"):
        PromptDataModule("x.jsonl", rollout_batch_size=0)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Tell me.", "chosen": "yes\nsir", "rejected": ""},
        {"prompt": [{"role": "user", "content": "Tell me."}], "chosen": "\nyes", "rejected": "no"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Ho", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
    ],
)
@pytest.mark.parametrize("max_prompt_length", [5, 64])
def test_one_conversation_is_the_same_ids_in_fine_tuning_reward_model_and_ppo(
    tmp_path: Path, row: dict[str, Any], max_prompt_length: int
) -> None:
    source = write(tmp_path, [row])
    settings: dict[str, Any] = {"tokenizer": "builtin:demo", "max_prompt_length": max_prompt_length}
    preferences, demonstrations = (
        PreferenceDataModule(str(source), **settings),
        DemonstrationDataModule(str(source), **settings),
    )
    for data in (preferences, demonstrations):
        data.setup("fit")
    pair, demonstration = preferences.train_examples[0], demonstrations.train_examples[0]
    prompt = prompts(source, max_prompt_length=max_prompt_length).train_examples[0]
    assert prompt.prompt_ids == pair.prompt_ids == demonstration.prompt_ids
    assert demonstration.response_ids == pair.chosen_ids
    (rollout,) = prompts(source, max_prompt_length=max_prompt_length, rollout_batch_size=1).train_dataloader()
    (judged,) = preferences.train_dataloader()
    size = len(pair.prompt_ids)
    assert torch.equal(rollout.input_ids[0], judged.chosen.input_ids[0, :size])
    assert torch.equal(rollout.input_ids[0], judged.rejected.input_ids[0, :size])


@pytest.mark.parametrize(
    "name",
    ["human_like_dpo/eval.jsonl", "preference_demos/dpo_en_demo.jsonl.gz", "hh_rlhf_harmless/test_pairs.jsonl.gz"],
)
def test_real_conversations_are_the_same_ids_in_every_stage(shared_data: Path, name: str) -> None:
    settings: dict[str, Any] = {
        "tokenizer": str(shared_data / "tokenizers" / "smollm-135m-instruct"),
        "max_prompt_length": 100,
        "limit": 150,
    }
    long: dict[str, Any] = {"max_length": 10_000, **settings}
    source = str(shared_data / name)
    preferences, demonstrations = PreferenceDataModule(source, **long), DemonstrationDataModule(source, **long)
    stream = prompts(source, **settings)
    for data in (preferences, demonstrations):
        data.setup("fit")
    assert len(preferences.train_examples) == len(stream.train_examples) == 150
    assert stream.counts["train_prompts_truncated"] == preferences.counts["train_prompts_truncated"]
    for pair, prompt in zip(preferences.train_examples, stream.train_examples, strict=True):
        assert pair.prompt_ids == prompt.prompt_ids
    learnt = [(pair.prompt_ids, pair.chosen_ids) for pair in preferences.train_examples if len(pair.chosen_ids) > 1]
    assert demonstrations.train_examples == learnt, "one empty response of HH-RLHF is not learnt"


def test_real_stories_begin_a_prompt(shared_data: Path, stories_tokenizer: PreTrainedTokenizerBase) -> None:
    data = prompts(
        shared_data / "tinystories" / "eval.jsonl",
        tokenizer=str(shared_data / "models" / "stories260K"),
        chat=False,
        text_words=4,
    )
    assert data.counts["train_kept"] == 105
    example = data.train_examples[0]
    assert list(example.prompt_ids) == stories_tokenizer("Once upon a time,")["input_ids"]
    assert example.prompt == "Once upon a time,"
    assert example.row["text"].startswith("Once upon a time, there was an ancient rose.")


def test_responses_per_prompt_repeats_training_prompts_in_runs(tmp_path: Path) -> None:
    source = write(tmp_path, [{"prompt": f"Hi {n}"} for n in range(6)])
    data = prompts(source, val_size=2, rollout_batch_size=4, responses_per_prompt=2, shuffle=False, chat=False)
    first, second = data.train_dataloader()
    for batch in (first, second):
        kept = [row["prompt"] for row in batch.rows]
        assert batch.prompts == kept
        assert [kept.index(text) for text in kept] == [0, 0, 2, 2]
        assert torch.equal(batch.input_ids[0::2], batch.input_ids[1::2])
        assert batch.group_size == 2
    assert not set(first.prompts) & set(second.prompts)
    (held_out,) = data.val_dataloader()
    assert (len(held_out.rows), held_out.group_size) == (2, 1)  # held-out prompts are answered once
    with pytest.raises(UserError, match="rollout_batch_size 4 is not divisible by responses_per_prompt 3"):
        prompts(source, rollout_batch_size=4, responses_per_prompt=3)

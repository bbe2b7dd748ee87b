"""Reward models and tokenizers as other programs write them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerBase

from rlhf_lightning.data.chat import ConversationEncoder
from rlhf_lightning.data.collate import collate_sequences
from rlhf_lightning.data.shapes import Prompt, as_messages
from rlhf_lightning.models.loading import load_tokenizer, resolve_model
from rlhf_lightning.rollout.reward_sources import ScoringBatch

#: Prompts and responses of unequal lengths.
TURNS = [
    ("Do you like hiking?", "Oh, I love it! The air up there."),
    ("Why?", "As an AI, I have no preferences."),
    ("What did you do at the weekend, if I may ask?", "Nothing."),
]


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PreTrainedTokenizerBase]:
    """``make_tokenizer(**changes)`` is the demo's, with other entries of its ``tokenizer_config.json``."""

    def make(**changes: Any) -> PreTrainedTokenizerBase:
        folder = tmp_path_factory.mktemp("tokenizer")
        shutil.copytree(resolve_model("builtin:demo"), folder, dirs_exist_ok=True)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
        return load_tokenizer(str(folder))

    return make


def classifier(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> LlamaForSequenceClassification:
    """Return a tiny reward model, as transformers builds it."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.2}
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForSequenceClassification(
            LlamaConfig(vocab_size=len(tokenizer), num_labels=1, **sizes, **heads, **ends)
        ).eval()


def policys_batch(tokenizer: PreTrainedTokenizerBase, *, chat: bool = True) -> ScoringBatch:
    """Return TURNS as a policy with this tokenizer hands them to a reward source, all finished."""
    encoder = ConversationEncoder(tokenizer, chat=chat)
    prompts: list[Prompt] = [as_messages(prompt) if chat else prompt for prompt, _ in TURNS]
    rows = [encoder.encode(prompt, response) for prompt, (_, response) in zip(prompts, TURNS, strict=True)]
    sequences = collate_sequences(rows, pad_id=encoder.pad_id)
    finished = torch.ones(len(rows), dtype=torch.bool)
    return ScoringBatch(sequences, finished, prompts, [response for _, response in TURNS], [{}] * len(rows))


@torch.no_grad()
def scores_by_transformers(
    model: Any, tokenizer: PreTrainedTokenizerBase, *, side: str, chat: bool = True
) -> list[float]:
    """Return what transformers' own forward pass gives for TURNS, in one batch padded on a side."""
    if chat:
        turns = [[*as_messages(prompt), {"role": "assistant", "content": response}] for prompt, response in TURNS]
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in turns]
    else:
        texts = [prompt + response + tokenizer.eos_token for prompt, response in TURNS]  # as TRL ends plain text
    tokenizer.padding_side = side
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=not chat)
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].tolist()


def write(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """Write a model folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)

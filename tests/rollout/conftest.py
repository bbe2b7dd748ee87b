"""Tiny models of several families, tokenizers of words, and prompts to sample from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from rlhf_lightning.functional.sequences import pad_sequences

VOCABULARY = 37
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.4,  # large enough that the distributions are far from uniform
}
GROUPED = SIZES | {"num_key_value_heads": 2}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, GROUPED),
    "qwen2": (Qwen2Config, GROUPED),
    "qwen3": (Qwen3Config, GROUPED | {"head_dim": 8}),
    "mistral": (MistralConfig, GROUPED | {"sliding_window": 4}),  # every layer sees four tokens back
    "gemma2": (Gemma2Config, GROUPED | {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 5.0}),
    "gpt2": (
        GPT2Config,
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.4}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    ),
    "gpt_neox": (GPTNeoXConfig, SIZES),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Name of a family."""
    return str(request.param)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """``make_model(family, seed=0, scalar=False, **changes)`` draws a tiny model."""

    def make(family: str, *, seed: int = 0, scalar: bool = False, **changes: Any) -> PreTrainedModel:
        kind, sizes = FAMILIES[family]
        config = kind(**(sizes | changes | ({"num_labels": 1} if scalar else {})))
        factory = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = factory.from_config(config, dtype=torch.float32)
        return model.eval()

    return make


class Prompts(NamedTuple):
    """Left-padded prompts and what hides in their padding."""

    ids: Tensor
    mask: Tensor


@pytest.fixture(scope="session")
def make_prompts() -> Callable[..., Prompts]:
    """``make_prompts(rows, pad_id=0)`` pads rows of ids on the left."""

    def make(rows: list[list[int]], pad_id: int = 0) -> Prompts:
        ids, lengths = pad_sequences(rows, pad_id=pad_id, left=True)
        return Prompts(ids, torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None])

    return make


@pytest.fixture
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Splits at blanks; ``<|end|>`` (id 2) is pad, eos and the end of every chat turn, as in many that people use."""
    words = ["<|unk|>", "<|user|>", "<|end|>", *(f"w{number}" for number in range(3, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<|unk|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}<|user|> {% endif %}"
        "{{ message['content'] }} <|end|> {% endfor %}"
    )
    return tokenizer

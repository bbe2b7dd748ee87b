"""Tiny models of several families, and a tiny tokenizer whose padding is its end of text."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

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
FAMILIES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": lambda **changes: LlamaConfig(**(GROUPED | {"tie_word_embeddings": True} | changes)),
    "qwen2": lambda **changes: Qwen2Config(**(GROUPED | changes)),
    "qwen3": lambda **changes: Qwen3Config(**(GROUPED | {"head_dim": 8} | changes)),
    # Caps its logits, and every second layer sees four tokens back.
    "gemma2": lambda **changes: Gemma2Config(
        **(GROUPED | {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 5.0} | changes)
    ),
    # Scales its logits.
    "cohere": lambda **changes: CohereConfig(**(GROUPED | {"logit_scale": 0.3} | changes)),
    # Learned positions.
    "gpt2": lambda **changes: GPT2Config(
        **(
            {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
            | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.4}
            | changes
        )
    ),
    "gpt_neox": lambda **changes: GPTNeoXConfig(**(SIZES | changes)),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Name of a family."""
    return str(request.param)


@pytest.fixture(scope="session")
def make_config() -> Callable[..., PreTrainedConfig]:
    """``make_config(family, **changes)`` returns the config of a tiny model."""
    return lambda family, **changes: FAMILIES[family](**changes)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """``make_model(family, seed=0, scalar=False, **changes)`` draws a tiny model."""

    def make(family: str, *, seed: int = 0, scalar: bool = False, **changes: Any) -> PreTrainedModel:
        config = FAMILIES[family](**(changes | ({"num_labels": 1} if scalar else {})))
        factory = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = factory.from_config(config, dtype=torch.float32)
        return model.eval()

    return make


@pytest.fixture
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Splits at blanks; ``<|end|>`` (id 2) is pad, eos and the end of every chat turn, as in many that people use."""
    words = ["<|unk|>", "<|user|>", "<|end|>", *(f"w{number}" for number in range(3, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<|unk|>", eos_token="<|end|>", pad_token="<|end|>", padding_side="right"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}<|user|> {% endif %}"
        "{{ message['content'] }} <|end|> {% endfor %}"
    )
    return tokenizer

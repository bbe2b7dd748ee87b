"""What tests share: real data beside the checkout, tokenizers, tiny models of many families, a clean slate for each."""

import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never waits for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from rlhf_lightning.models.loading import load_tokenizer

# What a shell starts in the background ignores Ctrl-C, and so would all that is tested of it.
signal.signal(signal.SIGINT, signal.default_int_handler)

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
#: What tells the families apart: tied weights, sliding windows, capped and scaled logits, learned positions.
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, GROUPED),
    "tied_llama": (LlamaConfig, GROUPED | {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, GROUPED),
    "qwen3": (Qwen3Config, GROUPED | {"head_dim": 8}),
    "mistral": (MistralConfig, GROUPED | {"sliding_window": 4}),  # every layer sees four tokens back
    # Caps its logits, and every second layer sees four tokens back.
    "gemma2": (Gemma2Config, GROUPED | {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 5.0}),
    "cohere": (CohereConfig, GROUPED | {"logit_scale": 0.3}),
    "gpt2": (
        GPT2Config,
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.4}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    ),
    "gpt_neox": (GPTNeoXConfig, SIZES),
}


@pytest.fixture(scope="session")
def load_tool() -> Callable[[str], ModuleType]:
    """``load_tool(name)`` imports ``tools/<name>.py``."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "tools" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where a dataclass looks up its annotations
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Name of a family."""
    return str(request.param)


@pytest.fixture(scope="session")
def make_config() -> Callable[..., PreTrainedConfig]:
    """``make_config(family, **changes)`` returns the config of a tiny model."""

    def make(family: str, **changes: Any) -> PreTrainedConfig:
        kind, sizes = FAMILIES[family]
        return kind(**(sizes | changes))

    return make


@pytest.fixture(scope="session")
def make_model(make_config: Callable[..., PreTrainedConfig]) -> Callable[..., PreTrainedModel]:
    """``make_model(family, seed=0, scalar=False, **changes)`` draws a tiny model."""

    def make(family: str, *, seed: int = 0, scalar: bool = False, **changes: Any) -> PreTrainedModel:
        config = make_config(family, **(changes | ({"num_labels": 1} if scalar else {})))
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


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets, tokenizers and small checkpoints, ``shared/data`` beside the repository."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data is absent: no ../shared/data beside the repository")
    return folder


@pytest.fixture(scope="session")
def demo_tokenizer() -> PreTrainedTokenizerBase:
    """Tokenizer of the built-in demo: a ChatML template, pad distinct from eos, any ASCII text comes back as it was."""
    return load_tokenizer("builtin:demo")


@pytest.fixture(scope="session")
def smollm_tokenizer(shared_data: Path) -> PreTrainedTokenizerBase:
    """Tokenizer of SmolLM-135M-Instruct: a ChatML template, pad == eos == ``<|im_end|>``, bos ``<|im_start|>``."""
    return AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "smollm-135m-instruct")


@pytest.fixture(scope="session")
def stories_tokenizer(shared_data: Path) -> PreTrainedTokenizerBase:
    """Tokenizer of stories260K: no chat template, puts BOS before a text, and BOS ends a story too."""
    return AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")


@pytest.fixture(autouse=True)
def _no_seed_left_behind() -> Iterator[None]:
    """Keep ``seed_everything`` of one test from seeding the next."""
    before = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    for name in before:
        os.environ.pop(name, None)
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value

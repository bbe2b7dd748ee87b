"""What tests share: the real data beside the checkout, real tokenizers, and a clean slate for each test."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never waits for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_lightning.models.loading import load_tokenizer


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

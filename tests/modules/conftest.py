"""Tiny models and real Trainers for the modules' tests."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_lightning.algorithm.critics import SeparateCritic
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.models.loading import load_tokenizer, resolve_model
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.rollout.reward_sources import RewardSource, Scores, ScoringBatch
from rlhf_lightning.rollout.sampler import SamplingConfig

torch.set_num_threads(1)


def _save(folder: Path, *, seed: int, scalar: bool = False, **config: Any) -> str:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("builtin:demo"))
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    kind = LlamaForSequenceClassification if scalar else LlamaForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(LlamaConfig(**{**sizes, **({"num_labels": 1} if scalar else {}), **config}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def save_model() -> Callable[..., str]:
    """``save_model(folder, seed=0, scalar=False, **config)`` writes a two-layer Llama with the demo's tokenizer."""
    return _save


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A language model's folder."""
    return _save(tmp_path_factory.mktemp("language_model"), seed=0)


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward model's folder; trained, as it says, to be read at the demo's stop token (id 4)."""
    return _save(tmp_path_factory.mktemp("reward_model"), seed=1, scalar=True, scored_token_id=4)


class ShareOfLowTokens(RewardSource):
    """Share of the response's tokens whose id is below a bound."""

    name = "low_tokens"

    def __init__(self, below: int = 60) -> None:
        super().__init__()
        self.below = below

    def score(self, batch: ScoringBatch) -> Scores:
        mask = batch.sequences.response_mask
        hits = (batch.sequences.response_tokens < self.below) & mask
        scores = hits.sum(dim=1) / mask.sum(dim=1)
        return Scores(scores, {self.name: scores})


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[..., PromptDataModule]:
    """``prompts(n=8, val=0, **arguments)`` is a data module of n prompts of unequal lengths."""

    def make(n: int = 8, val: int = 0, **arguments: Any) -> PromptDataModule:
        files = {}
        for name, count in (("source", n), ("val_source", val)):
            rows = [{"prompt": "what is good about tea " * (1 + number % 4) + str(number)} for number in range(count)]
            files[name] = tmp_path / f"{name}-{n}-{val}.jsonl"
            files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"rollout_batch_size": 8, "max_prompt_length": 48, "shuffle": False, **arguments}
        return PromptDataModule(str(files["source"]), str(files["val_source"]) if val else None, **given)

    return make


@pytest.fixture
def ppo(language_model: str) -> Callable[..., PPOModule]:
    """``ppo(cls=PPOModule, **arguments)`` is a small PPO module on the tiny language model."""

    def make(cls: type[PPOModule] = PPOModule, **arguments: Any) -> PPOModule:
        given: dict[str, Any] = {
            "policy": language_model,
            "reward": ShareOfLowTokens(),
            "critic": SeparateCritic(),
            "sampling": SamplingConfig(max_new_tokens=6),
            "ppo_epochs": 2,
            "minibatch_size": 4,
            "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0),
            **arguments,
        }
        return cls(**given)

    return make


@pytest.fixture
def stops() -> list[str]:
    """A quarter of the vocabulary as stop tokens, so that responses end at unequal lengths."""
    return load_tokenizer("builtin:demo").convert_ids_to_tokens(list(range(5, 400, 3)))


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """``trainer(**arguments)`` is a quiet Trainer on the CPU without logger and checkpoints."""

    def make(**arguments: Any) -> Trainer:
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }
        return Trainer(**{**quiet, **arguments})

    return make


class Recorder(Logger):
    """Keeps what is logged, by name, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, list[float]] = {}

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            self.values.setdefault(key, []).append(value)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.fixture
def recorder() -> Recorder:
    """A logger to be passed to a Trainer together with ``log_every_n_steps=1``; ``values`` holds what was logged."""
    return Recorder()


@pytest.fixture
def weights() -> Callable[[LightningModule], dict[str, torch.Tensor]]:
    """``weights(module)`` copies the state dict."""
    return lambda module: {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.fixture
def run_processes() -> Callable[[str, int, list[str]], None]:
    """``run_processes(program, world_size, arguments)`` runs a file once per rank; each has to end with status 0."""

    def run(program: str, world_size: int, arguments: list[str]) -> None:
        with socket.socket() as found:
            found.bind(("localhost", 0))
            port = found.getsockname()[1]
        running = []
        for rank in range(world_size):
            places = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            environment = {**os.environ, **places, "OMP_NUM_THREADS": "1"}
            running.append(subprocess.Popen([sys.executable, program, str(world_size), *arguments], env=environment))
        assert [process.wait(timeout=240) for process in running] == [0] * world_size

    return run

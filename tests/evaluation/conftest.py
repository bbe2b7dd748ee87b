"""Two tiny real models of one shape and different weights, and a run's metrics."""

from pathlib import Path

import pytest
import torch

from rlhf_lightning.loggers import JSONLLogger
from rlhf_lightning.models.export import write_model_folder
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of two models with the demo's tokenizer, called base and other."""
    folders = {}
    for seed, name in enumerate(("base", "other")):
        torch.manual_seed(seed)
        overrides = {**SHAPE, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2}
        model = load_causal_lm("builtin:demo", pretrained=False, config_overrides=overrides)
        folders[name] = str(tmp_path_factory.mktemp(name))
        write_model_folder(folders[name], model, load_tokenizer("builtin:demo"))
    return folders


@pytest.fixture
def metrics_file(tmp_path: Path) -> Path:
    """The metrics.jsonl of a run of 200 steps, validated every 50."""
    (tmp_path / "run").mkdir()
    logger = JSONLLogger(tmp_path / "run")
    for step in range(200):
        row = {"rollout/score": step / 100, "train/lr": 1e-4, "time/rollout_s": 1.0}
        logger.log_metrics({**row, **({"val/score": step / 100, "val/voice": 0.5} if step % 50 == 0 else {})}, step)
    return logger.path

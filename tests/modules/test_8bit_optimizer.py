"""An optimizer of bitsandbytes with a byte a number of state: trained with, stopped, taken up, told by ``plan``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor

from rlhf_lightning.cli import check_command
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.models.export import export_checkpoint
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.planning.tracing import optimizer_bytes

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the 8-bit optimizer needs bitsandbytes, not installed")


def adamw(params: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(params, lr=1e-3, weight_decay=0.0)
    return optimizer


def test_a_resumed_run_equals_one_never_stopped(
    ppo: Callable[..., PPOModule],
    prompts: Callable[..., PromptDataModule],
    trainer: Callable[..., Trainer],
    weights: Callable[[LightningModule], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    """What it keeps is loaded as plain tensors, and a checkpoint of it can be exported."""

    def make() -> tuple[PPOModule, PromptDataModule]:
        seed_everything(0, verbose=False)
        return ppo(optimizer=adamw), prompts(22, shuffle=True)

    whole, data = make()
    trainer(max_steps=4).fit(whole, datamodule=data)
    stopped, data = make()
    run = trainer(max_steps=2)
    run.fit(stopped, datamodule=data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    resumed, data = make()
    run = trainer(max_steps=4)
    run.fit(resumed, datamodule=data, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    ends = [weights(module) for module in (whole, stopped, resumed)]
    assert all(torch.equal(tensor, ends[2][name]) for name, tensor in ends[0].items())
    assert not all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    states = run.optimizers[0].state
    large = [states[weight] for weight in resumed.parameters() if weight.requires_grad and weight.numel() >= 4096]
    assert large
    assert all(state["state1"].dtype == state["state2"].dtype == torch.uint8 for state in large)
    export_checkpoint(tmp_path / "run.ckpt", tmp_path / "model")


def test_a_plan_knows_its_state() -> None:
    """A byte for each of two moments, and a float32 a block of 256 of each."""
    assert optimizer_bytes(adamw) == pytest.approx(2 + 2 * 4 / 256, abs=0.01)


def test_a_config_names_it(tmp_path: Path) -> None:
    config = tmp_path / "dpo.yaml"
    config.write_text(
        "model:\n  class_path: DPOModule\n  init_args:\n    policy: builtin:demo\n    optimizer:\n"
        "      class_path: bitsandbytes.optim.AdamW8bit\n      init_args: {lr: 1.0e-4, weight_decay: 0.0}\n"
        "data: {class_path: PreferenceDataModule, init_args: {source: builtin:demo/train}}\n"
    )
    check_command(["fit", "--config", str(config)])

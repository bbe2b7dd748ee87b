"""What saves memory in PPO changes no bit of its results, alone or together with adapters."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from rlhf_lightning.algorithm.critics import Critic, SeparateCritic, TrunkCritic
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.modules.ppo import PPOModule

MakePPO = Callable[..., PPOModule]
MakePrompts = Callable[..., Any]
MakeTrainer = Callable[..., Trainer]
Weights = Callable[[LightningModule], dict[str, Tensor]]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("critic", [SeparateCritic, TrunkCritic])
def test_checkpointing_changes_no_bit(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, weights: Weights, critic: type[Critic], precision: Any
) -> None:
    """Responses included, which a model in train mode could not decode with its activations checkpointed."""
    results, responses = [], []
    for checkpointing in (False, True):
        module = ppo(critic=critic(), gradient_checkpointing=checkpointing)
        trainer(max_steps=2, precision=precision).fit(module, datamodule=prompts(8))
        networks = [module.policy, *([module.critic] if critic is SeparateCritic else [])]
        flags = [any(getattr(m, "gradient_checkpointing", False) for m in net.modules()) for net in networks]
        assert set(flags) == {checkpointing}
        assert module.policy.training
        results.append(weights(module))
        responses.append([row["response"] for row in module.samples])
    assert responses[0] == responses[1]
    for name, tensor in results[0].items():
        assert torch.equal(results[1][name], tensor)


def test_a_module_with_offloaded_models_can_be_copied(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = ppo(offload_frozen=True)
    trainer(max_steps=1, default_root_dir=tmp_path).fit(module, datamodule=prompts(8))
    twin = copy.deepcopy(module)
    for mine, other in zip(module.reference.parameters(), twin.reference.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_offloaded_models_change_no_bit(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, weights: Weights, tmp_path: Path
) -> None:
    """A checkpoint on the way included, and a run that is taken up from it."""
    results = []
    for offload in (False, True):
        module, folder = ppo(offload_frozen=offload), tmp_path / str(offload)
        run = trainer(max_steps=2, default_root_dir=folder)
        run.fit(module, datamodule=prompts(8))
        run.save_checkpoint(folder / "two.ckpt")
        assert [each.name for each in folder.iterdir() if "ckpt" not in each.name and each.is_file()] == []
        again = ppo(offload_frozen=offload)
        trainer(max_steps=3, default_root_dir=folder).fit(
            again, datamodule=prompts(8), ckpt_path=folder / "two.ckpt", weights_only=True
        )
        mapped = [p.untyped_storage().data_ptr() for p in again.reference.parameters()]
        assert (max(mapped) - min(mapped) < 2**20 and len(set(mapped)) == 1) == offload  # one storage: the file
        results.append(weights(again))
    for name, tensor in results[0].items():
        assert torch.equal(results[1][name], tensor)


def test_with_adapters_too(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, weights: Weights, tmp_path: Path
) -> None:
    """The reference is then the policy's own frozen weights, which are needed all the time."""
    results = []
    for saving in (False, True):
        torch.manual_seed(0)  # of the adapters' first weights
        options = {"gradient_checkpointing": saving, "offload_frozen": saving}
        module = ppo(lora=LoRA(rank=2), critic=SeparateCritic(lora=LoRA(rank=2)), **options)
        trainer(max_steps=2, default_root_dir=tmp_path).fit(module, datamodule=prompts(8))
        in_use = {id(each) for each in module.policy.parameters()}
        shared = [each for each in module.reference.parameters() if id(each) in in_use]
        assert shared
        assert len({each.untyped_storage().data_ptr() for each in shared}) == len(shared)  # not in one file
        results.append(weights(module))
    assert any("lora" in name for name in results[0])
    for name, tensor in results[0].items():
        assert torch.equal(results[1][name], tensor)

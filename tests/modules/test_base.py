"""What all modules do: export, checkpoints without the frozen models, strict loading, the schedule."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.checkpoint_files import DamagedCheckpointError
from rlhf_lightning.data.collate import collate_sequences
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.export import export_checkpoint
from rlhf_lightning.modules.base import fingerprint
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.rollout.reward_model import RewardModel
from rlhf_lightning.rollout.reward_sources import RewardSource, Scores, ScoringBatch
from rlhf_lightning.schedules import ConstantWithWarmup, LinearDecay

MakePPO = Callable[..., PPOModule]
MakePrompts = Callable[..., PromptDataModule]
MakeTrainer = Callable[..., Trainer]
SaveModel = Callable[..., str]
Weights = Callable[[LightningModule], dict[str, Tensor]]


@pytest.fixture
def checkpoint(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, reward_model: str, tmp_path: Path
) -> tuple[Path, PPOModule]:
    """A checkpoint after two iterations, and the module that was trained."""
    module, run = ppo(reward=RewardModel(reward_model)), trainer(max_steps=2)
    run.fit(module, datamodule=prompts())
    run.save_checkpoint(tmp_path / "run.ckpt")
    return tmp_path / "run.ckpt", module


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None]).logits


def test_export_is_the_trained_model(checkpoint: tuple[Path, PPOModule], language_model: str, tmp_path: Path) -> None:
    path, module = checkpoint
    module.export_model(tmp_path / "model")
    export_checkpoint(path, tmp_path / "from_checkpoint")
    trained = logits(module.policy)
    for folder in ("model", "from_checkpoint"):
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(logits(exported), trained)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert tokenizer.chat_template == module.tokenizer.chat_template
        assert tokenizer.get_vocab() == module.tokenizer.get_vocab()
    assert not torch.equal(trained, logits(AutoModelForCausalLM.from_pretrained(language_model)))


def test_export_before_any_training_loads_the_model(language_model: str, tmp_path: Path) -> None:
    SFTModule(language_model).export_model(tmp_path / "model")
    exported, start = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "model", language_model))
    assert torch.equal(logits(exported), logits(start))


def test_frozen_models_are_not_in_the_checkpoint(checkpoint: tuple[Path, PPOModule]) -> None:
    path, module = checkpoint
    state = torch.load(path, weights_only=True)
    parts = {name.split(".")[0] for name in state["state_dict"]}
    assert parts == {"policy", "critic"}
    assert set(state["rlhf_lightning"]["frozen"]) == {"reference", "reward"}
    assert {name.split(".")[0] for name in module.state_dict()} == {"policy", "critic", "reference", "reward"}


def test_load_from_checkpoint(checkpoint: tuple[Path, PPOModule], reward_model: str, weights: Weights) -> None:
    path, module = checkpoint
    loaded = PPOModule.load_from_checkpoint(path, reward=RewardModel(reward_model), weights_only=True)
    assert loaded.counters == {"iterations": 2, "episodes": 16, "tokens": module.counters["tokens"], "updates": 8}
    assert (loaded.ppo_epochs, loaded.minibatch_size) == (2, 4)  # hyperparameters come along
    trained = weights(module)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.state_dict().keys() == trained.keys()


def test_load_from_checkpoint_names_what_is_to_be_given_again(checkpoint: tuple[Path, PPOModule]) -> None:
    with pytest.raises(
        UserError, match=r"does not hold reward; give it again: load_from_checkpoint\(path, reward=\.\.\."
    ):
        PPOModule.load_from_checkpoint(checkpoint[0], weights_only=True)


def test_load_from_checkpoint_refuses_a_damaged_file(checkpoint: tuple[Path, PPOModule], reward_model: str) -> None:
    path, _ = checkpoint
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1  # within a weight: torch alone would take it
    path.write_bytes(whole)
    with pytest.raises(DamagedCheckpointError, match="does not match its checksum"):
        PPOModule.load_from_checkpoint(path, reward=RewardModel(reward_model), weights_only=True)
    with pytest.raises(UserError, match=r"nowhere\.ckpt' does not exist"):
        PPOModule.load_from_checkpoint(checkpoint_path="nowhere.ckpt", reward=RewardModel(reward_model))


def test_loading_refuses_a_missing_layer(checkpoint: tuple[Path, PPOModule], reward_model: str) -> None:
    path, _ = checkpoint
    state = torch.load(path, weights_only=True)
    del state["state_dict"]["policy.model.layers.1.mlp.up_proj.weight"]
    torch.save(state, path)
    with pytest.raises(UserError, match=r"1 tensors are missing.*layers\.1\.mlp\.up_proj"):
        PPOModule.load_from_checkpoint(path, reward=RewardModel(reward_model))


def test_resuming_refuses_the_checkpoint_of_another_module(
    checkpoint: tuple[Path, PPOModule],
    ppo: MakePPO,
    prompts: MakePrompts,
    trainer: MakeTrainer,
    language_model: str,
    tmp_path: Path,
) -> None:
    path, _ = checkpoint
    with pytest.raises(UserError, match=r"does not fit this SFTModule.*'critic"):
        SFTModule.load_from_checkpoint(path, model=language_model)
    run = trainer(max_steps=0)
    run.strategy.connect(SFTModule(language_model))
    run.lightning_module.configure_model()
    run.save_checkpoint(tmp_path / "sft.ckpt")
    with pytest.raises(UserError, match="does not fit this PPOModule"):
        trainer(max_steps=3).fit(ppo(), datamodule=prompts(), ckpt_path=tmp_path / "sft.ckpt")


@pytest.mark.parametrize("changed", ["reference", "reward"])
def test_resuming_refuses_other_frozen_models(
    checkpoint: tuple[Path, PPOModule],
    ppo: MakePPO,
    prompts: MakePrompts,
    trainer: MakeTrainer,
    save_model: SaveModel,
    reward_model: str,
    tmp_path: Path,
    changed: str,
) -> None:
    path, _ = checkpoint
    other = save_model(tmp_path / "other", seed=7, scalar=changed == "reward", scored_token_id=4)
    module = ppo(
        reward=RewardModel(other if changed == "reward" else reward_model),
        reference=other if changed == "reference" else None,
    )
    with pytest.raises(UserError, match=f"the {changed} is not the one"):
        trainer(max_steps=3).fit(module, datamodule=prompts(), ckpt_path=path)
    trainer().validate(module, datamodule=prompts(val=3), ckpt_path=path, verbose=False)  # only a resumed fit refuses


def test_frozen_models_stay_as_they_are(checkpoint: tuple[Path, PPOModule], ppo: MakePPO, reward_model: str) -> None:
    module, fresh = checkpoint[1], ppo(reward=RewardModel(reward_model))
    fresh.configure_model()
    assert not torch.equal(module.policy.lm_head.weight, fresh.policy.lm_head.weight)
    for name, frozen in module.frozen_modules().items():
        start = fresh.frozen_modules()[name].state_dict()
        assert start
        assert all(torch.equal(tensor, start[key]) for key, tensor in frozen.state_dict().items())
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
        assert all(parameter.grad is None for parameter in frozen.parameters())


def test_train_leaves_frozen_models_in_eval_mode(checkpoint: tuple[Path, PPOModule]) -> None:
    module = checkpoint[1]
    module.train()
    assert module.policy.training
    assert module.critic is not None
    assert all(part.training for part in module.critic.modules())
    frozen = list(module.frozen_modules().values())
    assert len(frozen) == 2
    assert not any(part.training for model in frozen for part in model.modules())


def test_a_reward_of_ones_own_is_frozen_too(ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer) -> None:
    class Network(RewardSource):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))

        def score(self, batch: ScoringBatch) -> Scores:
            assert not self.training
            scores = self.layers(batch.sequences.response_lengths[:, None].float()).flatten()
            return Scores(scores, {self.name: scores})

    module = ppo(reward=Network())
    trainer(max_steps=1).fit(module, datamodule=prompts())
    assert not any(parameter.requires_grad for parameter in module.reward.parameters())
    assert module.counters["iterations"] == 1


def test_no_frozen_parameter_is_in_the_optimizer(ppo: MakePPO, reward_model: str) -> None:
    module = ppo(reward=RewardModel(reward_model))
    module.configure_model()
    optimizer = module.configure_optimizers()
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert module.critic is not None
    wanted = [*module.policy.parameters(), *module.critic.parameters()]
    assert trained == {id(parameter) for parameter in wanted}


def test_the_schedule_is_told_the_length_of_the_run(ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer) -> None:
    """8 prompts in rollouts of 4 over 3 epochs are 6 iterations, whatever number of optimizer steps they hold."""
    rates: list[float] = []

    class Watched(PPOModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            rates.append(self._optimizer().param_groups[0]["lr"])
            super().training_step(batch, batch_idx)

    module = ppo(Watched, lr_scheduler=LinearDecay)
    trainer(max_epochs=3).fit(module, datamodule=prompts(8, rollout_batch_size=4))
    assert rates == pytest.approx([1e-3 * left / 6 for left in (6, 5, 4, 3, 2, 1)])
    assert module.counters["updates"] == 6 * 2  # two epochs of one minibatch


def test_a_run_without_an_end_can_have_a_schedule(ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer) -> None:
    class Stopping(PPOModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            self.trainer.should_stop = self.counters["iterations"] == 3

    module = ppo(Stopping, lr_scheduler=lambda optimizer: ConstantWithWarmup(optimizer, warmup=1))
    trainer(max_epochs=-1).fit(module, datamodule=prompts())
    assert module.counters["iterations"] == 3


def test_what_the_optimizer_refuses_takes_one_line(ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer) -> None:
    module = ppo(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=-1.0))
    with pytest.raises(UserError, match=r"the optimizer refuses its arguments: Invalid learning rate: -1\.0\."):
        trainer(max_steps=1).fit(module, datamodule=prompts())


def test_a_schedule_that_waits_for_a_metric_is_refused(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer
) -> None:
    module = ppo(lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(UserError, match="ReduceLROnPlateau, which waits for a metric"):
        trainer(max_steps=1).fit(module, datamodule=prompts())


@pytest.mark.parametrize(
    ("precision", "algorithm", "limit"),
    [
        ("32-true", "norm", lambda grad: 1e-3 * grad / grad.norm()),
        ("bf16-mixed", "norm", lambda grad: 1e-3 * grad / grad.norm()),
        ("32-true", "value", lambda grad: grad.clamp(-1e-3, 1e-3)),
    ],
)
def test_the_trainer_clips_gradients_of_fused_optimizers(
    language_model: str,
    trainer: MakeTrainer,
    precision: str,
    algorithm: str,
    limit: Callable[[Tensor], Tensor],
) -> None:
    gradients: list[Tensor] = []

    class Watched(SFTModule):
        def flat(self) -> Tensor:
            return torch.cat([p.grad.flatten().clone() for p in self.parameters() if p.grad is not None])

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            gradients.append(self.flat())

        def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
            gradients.extend([self.flat()] if gradients else [])

    batch = collate_sequences([([5, 6], [7, 8, 4]), ([9], [4])], pad_id=4)
    run = trainer(max_steps=2, precision=precision, gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm)
    run.fit(Watched(language_model), DataLoader([batch, batch], batch_size=None))  # type: ignore[arg-type]
    before, after = gradients[:2]
    assert before.norm() > 0.1
    torch.testing.assert_close(after, limit(before), rtol=1e-3, atol=1e-8)


def test_fingerprint_sees_every_change() -> None:
    layer = nn.Linear(3, 2)
    before = fingerprint(layer)
    assert fingerprint(layer) == before
    assert fingerprint(layer.to(torch.bfloat16)) != before
    layer = nn.Linear(3, 2)
    before = fingerprint(layer)
    with torch.no_grad():
        layer.weight[1, 2] = torch.nextafter(layer.weight[1, 2], torch.tensor(9.0))
    assert fingerprint(layer) != before

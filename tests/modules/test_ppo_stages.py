"""PPO from stage to stage: validation, prediction, checkpoints and loading disturb nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor

from rlhf_lightning.algorithm.kl import AdaptiveKL
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.rollout.decoding import CachedSampler
from rlhf_lightning.rollout.sampler import SamplingConfig

MakePPO = Callable[..., PPOModule]
MakePrompts = Callable[..., PromptDataModule]
MakeTrainer = Callable[..., Trainer]
Weights = Callable[[LightningModule], dict[str, Tensor]]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_validation_does_not_disturb_training(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, weights: Weights, precision: str
) -> None:
    results = []
    for validated in (True, False):
        module = ppo()
        data = prompts(16, val=5, val_batch_size=2)
        extra = {"val_check_interval": 1, "num_sanity_val_steps": 2} if validated else {"limit_val_batches": 0}
        if validated:
            trainer(precision=precision).validate(module, datamodule=data, verbose=False)
        run = trainer(max_steps=4, precision=precision, **extra)
        run.fit(module, datamodule=data)
        assert ("val/score" in run.callback_metrics) == validated
        results.append(weights(module))
    assert equal(*results)


def test_validation_gives_the_same_numbers_twice(ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer) -> None:
    module, other, data = ppo(), ppo(), prompts(8, val=5, val_batch_size=2)
    first = trainer().validate(module, datamodule=data, verbose=False)
    assert set(first[0]) == {"val/score", "val/kl", "val/response_length", "val/finished_fraction", "val/repetition"}
    assert first[0]["val/kl"] == 0
    for again in (module, other):
        assert trainer().validate(again, datamodule=data, verbose=False) == first
    trainer(max_steps=2).fit(module, datamodule=data)
    assert trainer().validate(module, datamodule=data, verbose=False) != first
    unmoved = ppo(optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    trainer(max_steps=2).fit(unmoved, datamodule=data)
    assert trainer().validate(unmoved, datamodule=data, verbose=False) == first


def test_validation_does_not_depend_on_its_batches(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, stops: list[str]
) -> None:
    """Each prompt has its own random numbers, and the last, shorter batch weighs as much as its rows."""
    module = ppo(sampling=SamplingConfig(max_new_tokens=6, stop_tokens=stops))
    results, samples = [], []
    for size in (1, 2, 4, 7):
        data = prompts(8, val=7, val_batch_size=size)
        results.append(trainer().validate(module, datamodule=data, verbose=False)[0])
        samples.append([sample["response"] for sample in module.val_samples])
    assert samples == [samples[0]] * 4
    assert results == [pytest.approx(results[0], abs=1e-5)] * 4
    score = sum(sample["score"] for sample in module.val_samples) / 7
    assert results[0]["val/score"] == pytest.approx(score)


def test_samples_of_rollout_and_validation(ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer) -> None:
    module = ppo()
    trainer(max_steps=1).fit(module, datamodule=prompts(8, val=3))
    for samples, count in ((module.samples, 8), (module.val_samples, 3)):
        assert [sample["prompt"][0]["content"][-1] for sample in samples] == [str(n) for n in range(count)]
        assert all(sample["length"] == 6 and not sample["finished"] for sample in samples)
        assert all(sample["response"] and 0 <= sample["score"] <= 1 for sample in samples)
    trainer().test(module, datamodule=prompts(8, val=3), verbose=False)
    assert len(module.val_samples) == 3


class Noting(CachedSampler):
    """A sampler that notes what it is told to do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def setup(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("setup")
        super().setup(*args, **kwargs)

    def sync(self, named_params: Any, version: int) -> None:
        self.calls.append(version)
        super().sync(named_params, version)

    def release(self) -> None:
        self.calls.append("release")

    def close(self) -> None:
        self.calls.append("close")
        super().close()


def test_what_a_sampler_is_told(ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer) -> None:
    """Two updates an iteration; the version of the weights is the number of updates. Two batches of validation."""
    sampler = Noting()
    module, data = ppo(sampler=sampler, ppo_epochs=1), prompts(8, val=4, val_batch_size=2)
    trainer(max_steps=2, val_check_interval=1).fit(module, datamodule=data)
    one = ["setup", 0, "release", 2, 2, "release", 2, "release", 4, 4, "release", "close"]  # iteration, validation, ...
    assert sampler.calls == one
    trainer().validate(module, datamodule=data, verbose=False)
    assert sampler.calls == [*one, "setup", 4, 4, "release", "close"]


def test_predict_alone_gives_the_samples_of_validation(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer
) -> None:
    data = prompts(8, val=5, val_batch_size=2)
    predictions: Any = trainer().predict(ppo(), datamodule=data)
    module = ppo()
    trainer().validate(module, datamodule=data, verbose=False)
    assert [row for batch in predictions for row in batch] == module.val_samples


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_new_weights_put_in_between_two_stages_are_used(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, precision: str
) -> None:
    data = prompts(8, val=5)

    def responses(module: PPOModule) -> list[str]:
        trainer(precision=precision).validate(module, datamodule=data, verbose=False)
        return [sample["response"] for sample in module.val_samples]

    module, fresh = ppo(), ppo()
    responses(module)
    for changed in (module, fresh):
        changed.configure_model()
        with torch.no_grad():
            changed.policy.lm_head.weight.neg_()
    assert responses(module) == responses(fresh)


def test_the_same_seed_gives_the_same_bits(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, weights: Weights
) -> None:
    results = []
    for seed in (1, 1, 2):
        seed_everything(seed, verbose=False)
        module = ppo()
        trainer(max_steps=2).fit(module, datamodule=prompts(16))
        results.append(weights(module))
        torch.rand(7)  # random numbers drawn elsewhere are no part of it
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_resumed_run_equals_one_never_stopped(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, weights: Weights, tmp_path: Path, precision: str
) -> None:
    """Stopped within an epoch of 3 iterations, and taken up with what must be carried over: Adam, KL, data, seeds."""

    def make() -> tuple[PPOModule, PromptDataModule]:
        return ppo(kl=AdaptiveKL(coef=0.5, target=0.1, horizon=20)), prompts(22, shuffle=True)

    module, data = make()
    trainer(max_steps=5, precision=precision).fit(module, datamodule=data)
    stopped, data = make()
    run = trainer(max_steps=2, precision=precision)
    run.fit(stopped, datamodule=data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    resumed, data = make()
    run = trainer(max_steps=5, precision=precision)
    run.fit(resumed, datamodule=data, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert run.global_step == 5
    assert equal(weights(resumed), weights(module))
    assert resumed.counters == module.counters
    assert resumed.kl.coef == module.kl.coef != 0.5


def test_training_goes_on_after_load_from_checkpoint(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, language_model: str, tmp_path: Path
) -> None:
    """As a new run over new iterations, whose random numbers are not those of the first ones."""
    module, run = ppo(), trainer(max_steps=2)
    run.fit(module, datamodule=prompts())
    run.save_checkpoint(tmp_path / "run.ckpt")
    loaded = PPOModule.load_from_checkpoint(
        tmp_path / "run.ckpt", reward=module.reward, sampling=SamplingConfig(max_new_tokens=6)
    )
    assert loaded.model_name == language_model
    run = trainer(max_steps=1)
    run.fit(loaded, datamodule=prompts())
    assert (run.global_step, loaded.counters["iterations"]) == (1, 3)


def test_a_subclass_may_have_arguments_of_its_own(
    ppo: MakePPO, language_model: str, prompts: MakePrompts, trainer: MakeTrainer, tmp_path: Path
) -> None:
    reward = ppo().reward

    class Small(PPOModule):
        def __init__(self, folder: str, bonus: float = 1.0) -> None:
            super().__init__(folder, reward, sampling=SamplingConfig(max_new_tokens=2), ppo_epochs=1)
            self.bonus = bonus

    module, run = Small(language_model, bonus=2.0), trainer(max_steps=1)
    run.fit(module, datamodule=prompts())
    run.save_checkpoint(tmp_path / "run.ckpt")
    loaded = Small.load_from_checkpoint(tmp_path / "run.ckpt", folder=language_model, weights_only=True)
    assert loaded.counters["iterations"] == 1

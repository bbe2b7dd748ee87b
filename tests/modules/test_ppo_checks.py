"""What a PPO run refuses, and whether its self-check finds the faults it is there for."""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from transformers import AutoTokenizer

from rlhf_lightning.algorithm.critics import SeparateCritic
from rlhf_lightning.algorithm.experience import Experience
from rlhf_lightning.algorithm.kl import AdaptiveKL
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.rollout.collect import Rollout
from rlhf_lightning.rollout.decoding import CachedSampler
from rlhf_lightning.rollout.reward_model import RewardModel
from rlhf_lightning.rollout.reward_sources import WeightedSum
from rlhf_lightning.rollout.sampler import Samples, SamplingConfig

MakePPO = Callable[..., PPOModule]
MakePrompts = Callable[..., PromptDataModule]
MakeTrainer = Callable[..., Trainer]
SaveModel = Callable[..., str]


@pytest.fixture
def refused(ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer) -> Callable[..., str]:
    """``refused(module arguments, data=..., trainer=...)`` is the message, given before any iteration."""

    def attempt(*, data: dict[str, Any] | None = None, run: dict[str, Any] | None = None, **arguments: Any) -> str:
        module = ppo(**arguments)
        with pytest.raises(UserError) as caught:
            trainer(max_steps=1, **(run or {})).fit(module, datamodule=prompts(**(data or {})))
        assert module.counters["updates"] == 0
        message = str(caught.value)
        assert "\n" not in message
        return message

    return attempt


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_refuses_a_precision_that_loses_updates(refused: Callable[..., str], precision: str) -> None:
    assert f"trainer.precision is {precision}" in refused(run={"precision": precision})


def test_refuses_float16_autocast(refused: Callable[..., str]) -> None:
    """The CPU has none of its own: Lightning would take bfloat16, unless it is given the plugin."""
    plugin = MixedPrecision("16-mixed", device="cpu")
    assert "trainer.precision is 16-mixed" in refused(run={"plugins": [plugin]})


def test_refuses_minibatches_that_do_not_divide_the_rollout(refused: Callable[..., str]) -> None:
    message = refused(minibatch_size=3, data={"rollout_batch_size": 8})
    assert "rollout_batch_size 8 is not divisible by minibatch_size 3" in message


def test_refuses_more_sequences_than_an_adaptive_price_can_follow(refused: Callable[..., str]) -> None:
    """Before any iteration, and not at the end of the first."""
    message = refused(kl=AdaptiveKL(horizon=4), data={"rollout_batch_size": 8})
    assert "horizon is 4, but an iteration has 8 sequences" in message


def test_refuses_more_tokens_than_the_policy_reads(refused: Callable[..., str]) -> None:
    message = refused(sampling=SamplingConfig(max_new_tokens=81), data={"max_prompt_length": 48})
    assert "data.max_prompt_length 48 + model.sampling.max_new_tokens 81 = 129 tokens" in message
    assert "but the policy reads at most 128" in message


def test_as_many_tokens_as_the_policy_reads_will_do(ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer) -> None:
    module = ppo(sampling=SamplingConfig(max_new_tokens=80), ppo_epochs=1)
    trainer(max_steps=1).fit(module, datamodule=prompts(max_prompt_length=48))
    assert module.counters["iterations"] == 1


def test_refuses_a_bare_function_as_reward(language_model: str) -> None:
    reward: Any = len
    with pytest.raises(UserError, match=r"reward is a builtin_function_or_method, .* make one by FunctionReward"):
        PPOModule(language_model, reward)


@pytest.mark.parametrize("part", ["reference", "critic", "reward model"])
def test_refuses_more_tokens_than_another_model_reads(
    refused: Callable[..., str], save_model: SaveModel, tmp_path: Path, part: str
) -> None:
    short = save_model(tmp_path / "short", seed=0, scalar=part != "reference", max_position_embeddings=50)
    options: dict[str, dict[str, Any]] = {
        "reference": {"reference": short},
        "critic": {"critic": SeparateCritic(short)},
        "reward model": {"reward": WeightedSum([RewardModel(short)], [1.0])},
    }
    arguments = options[part]
    assert f"the {part}" in refused(**arguments).replace("but reward model", "but the reward model")
    assert "= 54 tokens" in refused(**arguments)
    assert "reads at most 50" in refused(**arguments)


@pytest.mark.parametrize("key", ["reference", "critic.init_from"])
def test_refuses_another_vocabulary(refused: Callable[..., str], language_model: str, tmp_path: Path, key: str) -> None:
    other = shutil.copytree(language_model, str(tmp_path / "other"))
    AutoTokenizer.from_pretrained(other).train_new_from_iterator(["tea"], vocab_size=270).save_pretrained(other)
    message = refused(**({"reference": other} if key == "reference" else {"critic": SeparateCritic(init_from=other)}))
    assert message.startswith(f"model.{key} {other!r} has another tokenizer than the policy (such as for ")


def test_refuses_a_reward_model_that_is_read_at_another_token(
    refused: Callable[..., str], save_model: SaveModel, tmp_path: Path
) -> None:
    other = save_model(tmp_path / "other", seed=1, scalar=True, scored_token_id=1)
    message = refused(reward=RewardModel(other))
    assert "was trained to be read at '<|endoftext|>', but responses here end with '<|im_end|>'" in message


@pytest.mark.parametrize("normalize", [True, False])
def test_it_is_said_where_the_first_values_are_on_another_scale_than_the_scores(
    ppo: MakePPO,
    prompts: MakePrompts,
    trainer: MakeTrainer,
    save_model: SaveModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    normalize: bool,
) -> None:
    scorer = save_model(tmp_path / "scorer", seed=1, scalar=True, score_mean=0.5, score_std=0.25)
    critic = SeparateCritic(scorer, normalize=normalize)
    module = ppo(reward=RewardModel(scorer, normalize=True), critic=critic, ppo_epochs=1)
    trainer(max_steps=1).fit(module, datamodule=prompts())
    assert ("critic.normalize is false, but reward.normalize is true" in caplog.text) == (not normalize)


def test_a_stop_token_that_the_reward_model_knows_will_do(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, save_model: SaveModel, tmp_path: Path
) -> None:
    other = save_model(tmp_path / "other", seed=1, scalar=True, scored_token_id=1)
    sampling = SamplingConfig(max_new_tokens=6, stop_tokens=["<|im_end|>", "<|endoftext|>"])
    module = ppo(reward=RewardModel(other), sampling=sampling, ppo_epochs=1)
    trainer(max_steps=1).fit(module, datamodule=prompts())
    assert module.stop_ids == [4, 1]
    assert module.counters["iterations"] == 1


def test_it_is_said_where_responses_end_that_the_reward_model_was_not_trained_to_be_read_at(
    ppo: MakePPO,
    prompts: MakePrompts,
    trainer: MakeTrainer,
    save_model: SaveModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = save_model(tmp_path / "other", seed=1, scalar=True, scored_token_id=4)
    for tokens, strings, told in (
        (None, None, None),
        (None, ["tea"], "end by sampling.stop_strings have"),
        (["<|im_end|>", "<|endoftext|>"], None, "end at '<|endoftext|>' have"),
        (["<|im_end|>", "<|endoftext|>"], ["tea"], "end at '<|endoftext|>' or by sampling.stop_strings have"),
    ):
        caplog.clear()
        sampling = SamplingConfig(max_new_tokens=6, stop_tokens=tokens, stop_strings=strings)
        with caplog.at_level(logging.WARNING, logger="rlhf_lightning"):
            trainer(max_steps=1).fit(
                ppo(reward=RewardModel(other), sampling=sampling, ppo_epochs=1), datamodule=prompts()
            )
        said = [line for line in caplog.messages if "was trained to be read at '<|im_end|>'" in line]
        assert len(said) == (told is not None)
        assert told is None or told in said[0]


def test_a_reward_model_with_a_tokenizer_of_its_own_is_read_at_its_own_token(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, save_model: SaveModel, tmp_path: Path
) -> None:
    other = save_model(tmp_path / "other", seed=1, scalar=True, scored_token_id=1)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<|endoftext|>' }}{% endfor %}"
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(other)
    module = ppo(reward=RewardModel(other), ppo_epochs=1)
    trainer(max_steps=1).fit(module, datamodule=prompts())
    assert module.counters["iterations"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ppo_epochs": 0}, "ppo_epochs is 0"),
        ({"minibatch_size": 0}, "minibatch_size is 0"),
        ({"max_tokens_per_microbatch": -1}, "max_tokens_per_microbatch is -1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"sampling": SamplingConfig(temperature=0.0)}, "temperature is 0"),
    ],
)
def test_refuses_numbers_out_of_range(ppo: MakePPO, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ppo(**arguments)


# --- the self-check ---------------------------------------------------------------------------------------------------


class WithDropout(PPOModule):
    def configure_model(self) -> None:
        super().configure_model()
        for layer in self.policy.model.layers:
            layer.self_attn.attention_dropout = 0.1


class AnotherTemperature(PPOModule):
    def score(self, *args: Any, **kwargs: Any) -> Rollout:
        training, self.sampling = self.sampling, dataclasses.replace(self.sampling, temperature=0.9)
        rollout = super().score(*args, **kwargs)
        self.sampling = training
        return rollout


class NotANumber(PPOModule):
    def estimate(self, rollout: Rollout) -> Experience:
        experience = super().estimate(rollout)
        return dataclasses.replace(experience, old_logprobs=experience.old_logprobs * torch.nan)


class ChangedReference(PPOModule):
    def configure_model(self) -> None:
        super().configure_model()
        with torch.no_grad():
            self.reference.lm_head.weight[::2] *= 1.01


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (WithDropout, "the ratio is off 1 by"),
        (AnotherTemperature, "the ratio is off 1 by"),
        (NotANumber, "the ratio is off 1 by nan"),
        (ChangedReference, "the reference is a copy of the policy, but"),
    ],
)
def test_self_check_finds(refused: Callable[..., str], cls: type[PPOModule], message: str) -> None:
    assert message in refused(cls=cls)


def checks(recorder: Any) -> dict[str, list[float]]:
    return {name: values for name, values in recorder.values.items() if name.startswith("check/")}


def test_self_check_of_a_sound_run(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, recorder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="rlhf_lightning"):
        trainer(max_steps=2, logger=recorder).fit(ppo(), datamodule=prompts())
    [gap] = recorder.values.pop("check/sampler_gap")
    assert 0 < gap < 1e-5  # it rounds otherwise, token by token
    assert checks(recorder) == {"check/max_ratio_error": [0.0], "check/approx_kl": [0.0], "check/max_ref_kl": [0.0]}
    assert not any("sampler" in message for message in caplog.messages)
    assert any("self-check: max |ratio - 1| 0.0e+00" in message for message in caplog.messages)


def test_self_check_under_autocast_stays_within_its_bound(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, recorder: Any
) -> None:
    trainer(max_steps=1, precision="bf16-mixed", logger=recorder).fit(ppo(), datamodule=prompts())
    found = checks(recorder)
    assert 0 <= found["check/max_ratio_error"][0] <= 0.2
    assert 0 <= found["check/approx_kl"][0] <= 0.2**2
    assert 0 <= found["check/max_ref_kl"][0] <= 0.2


class Forgetful(CachedSampler):
    """It reads without the first prompt token."""

    def sample(self, *prompts: Any, **options: Any) -> Samples:
        return super().sample(*(each[:, 1:] for each in prompts), **options)


@pytest.mark.parametrize(
    ("sampling", "told"),
    [({}, True), ({"top_k": 5}, None), ({"top_p": 0.9}, None), ({"min_new_tokens": 6}, None)],
    ids=str,
)
def test_self_check_warns_of_a_sampler_that_reads_otherwise(
    ppo: MakePPO,
    prompts: MakePrompts,
    trainer: MakeTrainer,
    recorder: Any,
    caplog: pytest.LogCaptureFixture,
    sampling: dict[str, Any],
    told: bool | None,
) -> None:
    """Where the sampler cuts the distribution on purpose nothing can be compared."""
    module = ppo(sampler=Forgetful(), sampling=SamplingConfig(max_new_tokens=6, **sampling))
    trainer(max_steps=1, logger=recorder).fit(module, datamodule=prompts())
    assert any("Forgetful may hold other weights" in message for message in caplog.messages) == bool(told)
    assert ("check/sampler_gap" in recorder.values) == bool(told)


def test_self_check_runs_once_a_fit(ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, recorder: Any) -> None:
    module = ppo()
    for _ in range(2):
        trainer(max_steps=2, logger=recorder).fit(module, datamodule=prompts())
    found = checks(recorder)
    assert found["check/max_ratio_error"] == [0.0, 0.0]
    assert found["check/max_ref_kl"][0] == 0 < found["check/max_ref_kl"][1]  # by then the policy has moved


def test_a_reference_of_its_own_may_differ(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, recorder: Any, save_model: SaveModel, tmp_path: Path
) -> None:
    module = ppo(reference=save_model(tmp_path / "other", seed=5))
    trainer(max_steps=1, logger=recorder).fit(module, datamodule=prompts())
    found = checks(recorder)
    assert found["check/max_ref_kl"][0] > 0.1
    assert found["check/max_ratio_error"] == [0.0]

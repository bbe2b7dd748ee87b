"""What the options of PPO change in a run, and the algorithms that they make of it."""

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from rlhf_lightning.algorithm.advantages import GAE, AdvantageEstimator, GlobalBaseline, GroupRelative, LeaveOneOut
from rlhf_lightning.algorithm.critics import SeparateCritic, TrunkCritic
from rlhf_lightning.algorithm.kl import AdaptiveKL, FixedKL
from rlhf_lightning.algorithm.objectives import ClippedObjective, ClippedValueObjective, FixedLength, SequenceMean
from rlhf_lightning.algorithm.score_transforms import MissingEOSPenalty, RunningNormalization, ScoreClip
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.rollout.sampler import SamplingConfig

MakePPO = Callable[..., PPOModule]
MakePrompts = Callable[..., PromptDataModule]
MakeTrainer = Callable[..., Trainer]
Weights = Callable[[LightningModule], dict[str, Tensor]]
Moves = Callable[..., dict[str, Tensor]]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.fixture
def moves(ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, weights: Weights, stops: list[str]) -> Moves:
    """``moves(iterations=1, **arguments)``: by how much each weight moves in iterations of two epochs of gradient
    descent with rate 0.1 and without clipping; responses end at unequal lengths."""

    def run(iterations: int = 1, **arguments: Any) -> dict[str, Tensor]:
        given: dict[str, Any] = {
            "sampling": SamplingConfig(max_new_tokens=4, stop_tokens=stops),
            "optimizer": lambda params: torch.optim.SGD(params, lr=0.1),
            "max_grad_norm": None,
            **arguments,
        }
        module = ppo(**given)
        module.configure_model()
        before = weights(module)
        trainer(max_steps=iterations).fit(module, datamodule=prompts(16))
        return {name: tensor - before[name] for name, tensor in weights(module).items()}

    return run


def with_and_without() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """An option, and the arguments of a run that has not that option but is else the same."""
    in_loss = [{"kl": FixedKL(0.5, estimator=name, place="loss")} for name in ("k1", "k2", "k3")]
    return [
        ({"kl": FixedKL(0.5)}, {"kl": FixedKL(0.0)}),
        ({"kl": FixedKL(0.5, estimator="k2")}, {"kl": FixedKL(0.5)}),
        ({"kl": FixedKL(0.5, estimator="k3")}, {"kl": FixedKL(0.5)}),
        (in_loss[0], {"kl": FixedKL(0.0)}),
        (in_loss[1], in_loss[0]),
        (in_loss[2], in_loss[1]),
        ({"kl": AdaptiveKL(0.5, target=1e-6, horizon=16)}, {"kl": FixedKL(0.5)}),
        ({"advantages": GAE(whiten="minibatch")}, {"advantages": GAE(whiten=None)}),
        ({"advantages": GAE(whiten="minibatch")}, {"advantages": GAE(whiten="rollout")}),
        ({"critic": TrunkCritic(detach=True)}, {"critic": TrunkCritic()}),
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        {"policy_objective": ClippedObjective(clip_range=0.01)},
        {"policy_objective": ClippedObjective(clip_range_high=0.001)},
        {"policy_objective": ClippedObjective(dual_clip=1.001)},
        {"policy_objective": ClippedObjective(log_ratio_guard=1e-3)},
        {"policy_objective": ClippedObjective(entropy_coef=0.1)},
        {"policy_objective": ClippedObjective(normalization=SequenceMean())},
        {"policy_objective": ClippedObjective(normalization=FixedLength(6))},
        {"value_objective": ClippedValueObjective(coef=0.5)},
        {"value_objective": ClippedValueObjective(value_clip_range=1e-3)},
        {"advantages": GAE(gamma=0.5)},
        {"advantages": GAE(gae_lambda=0.2)},
        {"advantages": GAE(whiten=None)},
        {"advantages": GAE(whiten_rewards=True)},
        {"advantages": GlobalBaseline(), "critic": None},
        {"critic": TrunkCritic()},
        {"critic": SeparateCritic(warmup_iterations=1)},
        {"score_transforms": [ScoreClip(0.1)]},
        {"score_transforms": [RunningNormalization()]},
        {"score_transforms": [MissingEOSPenalty(1.0)]},
    ],
    ids=repr,
)
def test_every_option_changes_what_the_policy_learns(moves: Moves, arguments: dict[str, Any]) -> None:
    """Against one run with the defaults; two iterations, as a reference is left only after the first."""
    assert_other_policy(moves, arguments, {})


@pytest.mark.parametrize(("arguments", "without"), with_and_without(), ids=repr)
def test_an_option_changes_what_the_policy_learns_where_nothing_else_differs(
    moves: Moves, arguments: dict[str, Any], without: dict[str, Any]
) -> None:
    """Where the default has another value of more than one setting."""
    assert_other_policy(moves, arguments, without)


def assert_other_policy(moves: Moves, arguments: dict[str, Any], without: dict[str, Any]) -> None:
    # Three iterations for what an option learns from the first two.
    found, plain = (
        torch.cat([tensor.flatten() for name, tensor in moves(3, **given).items() if name.startswith("policy")])
        for given in (arguments, without)
    )
    assert torch.isfinite(found).all()
    assert (found - plain).norm() > 1e-4 * plain.norm()


# --- the critic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SeparateCritic, TrunkCritic])
def test_while_the_critic_warms_up_the_policy_stays(moves: Moves, kind: type[Any]) -> None:
    """Also its trunk, on which the head stands; from the iteration after on it learns."""
    during = moves(1, critic=kind(warmup_iterations=1))
    after = moves(2, critic=kind(warmup_iterations=1))
    for name, moved in during.items():
        if name.startswith("policy."):
            assert not moved.any(), name
    assert any(moved.any() for name, moved in during.items() if name.startswith("critic."))
    assert any(moved.any() for name, moved in after.items() if name.startswith("policy."))


def test_warming_up_leaves_the_optimizers_memory_of_the_policy_empty(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer
) -> None:
    """So that decay of weights and moments begins with the policy's own first step."""
    module, run = ppo(critic=SeparateCritic(warmup_iterations=1)), trainer(max_steps=1)
    run.fit(module, datamodule=prompts(8))
    known = run.optimizers[0].state
    assert not any(parameter in known for parameter in module.policy.parameters())
    assert all(parameter in known for parameter in module.critic.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("parts", "group"),
    [
        ({"critic": TrunkCritic(learning_rate=1e-2)}, 1),
        ({"critic": None, "advantages": LeaveOneOut()}, 4),
        ({"critic": None, "advantages": GroupRelative()}, 4),
        ({"critic": None, "advantages": GlobalBaseline()}, 1),
    ],
    ids=["trunk", "rloo", "grpo", "reinforce++"],
)
def test_each_algorithm_learns_to_emit_rewarded_tokens(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, recorder: Any, parts: dict[str, Any], group: int
) -> None:
    """An eighth of the vocabulary is rewarded; at the start about a fifth of the tokens come from it."""
    module = ppo(
        kl=FixedKL(0.01),
        minibatch_size=16,
        ppo_epochs=4,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0),
        **parts,
    )
    run = trainer(max_steps=20, logger=recorder, log_every_n_steps=1)
    run.fit(module, datamodule=prompts(32, rollout_batch_size=32, responses_per_prompt=group))
    assert recorder.values["check/max_ratio_error"] == [0]
    assert recorder.values["rollout/score"][0] < 0.4
    assert statistics.median(recorder.values["rollout/score"][-6:]) > 0.9  # whitened noise may shake what has converged
    if module.critic is not None:
        assert recorder.values["train/value_loss"][-1] < recorder.values["train/value_loss"][0] / 3


@pytest.mark.parametrize("estimator", [LeaveOneOut(), GroupRelative(), GroupRelative(scale=False), GlobalBaseline()])
def test_without_a_critic_there_is_none(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, recorder: Any, estimator: AdvantageEstimator
) -> None:
    module = ppo(critic=None, advantages=estimator)
    run = trainer(max_steps=2, logger=recorder, log_every_n_steps=1)
    run.fit(module, datamodule=prompts(16, responses_per_prompt=4))
    assert module.critic is None
    assert [group["name"] for group in run.optimizers[0].param_groups] == ["policy"]
    assert not any("value" in name or "critic" in name or "explained" in name for name in recorder.values)
    assert recorder.values["rollout/kl"][1] != 0


def test_a_critic_that_nobody_asks_is_refused(ppo: MakePPO) -> None:
    with pytest.raises(UserError, match="advantages is LeaveOneOut, which needs no critic, but critic is SeparateC"):
        ppo(advantages=LeaveOneOut())
    with pytest.raises(UserError, match="needs no critic, but value_objective is ClippedValueObjective; leave one of"):
        ppo(advantages=LeaveOneOut(), critic=None, value_objective=ClippedValueObjective())


# --- groups -----------------------------------------------------------------------------------------------------------


def test_a_rollout_holds_each_prompt_several_times_with_other_answers(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer
) -> None:
    module = ppo(critic=None, advantages=LeaveOneOut())
    trainer(max_steps=1, val_check_interval=1).fit(module, datamodule=prompts(16, val=3, responses_per_prompt=4))
    asked = [sample["prompt"] for sample in module.samples]
    assert asked == [asked[0]] * 4 + [asked[4]] * 4
    assert asked[0] != asked[4]
    assert len({sample["response"] for sample in module.samples}) == 8
    assert len(module.val_samples) == 3  # held-out prompts are answered once


def test_groups_that_the_data_does_not_give_are_refused_before_training(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer
) -> None:
    module = ppo(critic=None, advantages=GroupRelative())
    with pytest.raises(UserError, match=r"GroupRelative compares several .* data\.responses_per_prompt is 1"):
        trainer(max_steps=1).fit(module, datamodule=prompts(16))
    assert module.counters["iterations"] == 0


# --- stopping an update -----------------------------------------------------------------------------------------------


def test_target_kl_ends_an_update_before_the_step_that_went_too_far(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, recorder: Any
) -> None:
    """With a rate of 0.05 the second minibatch already has moved; 8 minibatches without the target."""

    def updates(target_kl: float | None, minibatch_size: int = 4) -> int:
        recorder.values.clear()
        module = ppo(
            policy_objective=ClippedObjective(target_kl=target_kl),
            minibatch_size=minibatch_size,
            optimizer=lambda params: torch.optim.AdamW(params, lr=0.05),
            ppo_epochs=4,
        )
        trainer(max_steps=1, logger=recorder, log_every_n_steps=1).fit(module, datamodule=prompts(8))
        assert recorder.values["train/stopped_early"] == [float(target_kl is not None and target_kl < 1e6)]
        return module.counters["updates"]

    assert updates(None) == updates(1e9) == 8
    assert updates(1e-4) == 1
    assert updates(1e-4, minibatch_size=8) == 1  # the first minibatch of an epoch is looked at too
    assert 1 <= updates(0.5) < 8


def test_what_was_guarded_is_reported(ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, recorder: Any) -> None:
    for guard, least, most in ((1e-3, 0.3, 0.8), (None, 0.0, 0.0)):
        recorder.values.clear()
        module = ppo(policy_objective=ClippedObjective(log_ratio_guard=guard), minibatch_size=8)
        trainer(max_steps=1, logger=recorder, log_every_n_steps=1).fit(module, datamodule=prompts(8))
        # In the first of two epochs every ratio is 1, in the second hardly one is.
        assert least <= recorder.values["train/guarded_fraction"][0] <= most


def test_while_the_critic_warms_up_the_price_of_a_nat_stays(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, recorder: Any
) -> None:
    """The policy has not moved, so that its KL of 0 says nothing of the price; from the third iteration on it counts:
    n = 8, horizon 16, and a KL far below the target: a factor of 1 - 0.2 · 8 / 16 = 0.9."""
    module = ppo(kl=AdaptiveKL(0.5, target=1e6, horizon=16), critic=SeparateCritic(warmup_iterations=2))
    trainer(max_steps=4, logger=recorder, log_every_n_steps=1).fit(module, datamodule=prompts(32))
    assert recorder.values["rollout/kl_coef"] == pytest.approx([0.5, 0.5, 0.5, 0.45])


# --- state ------------------------------------------------------------------------------------------------------------


def test_running_statistics_are_resumed(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, weights: Weights, tmp_path: Any
) -> None:
    """Two iterations, and one, a checkpoint and another one, end with the same weights."""

    def module() -> PPOModule:
        return ppo(score_transforms=[ScoreClip(5.0), RunningNormalization()])

    whole = module()
    trainer(max_steps=2).fit(whole, datamodule=prompts(16))
    first, run = module(), trainer(max_steps=1)
    run.fit(first, datamodule=prompts(16))
    run.save_checkpoint(tmp_path / "one.ckpt")
    second = module()
    trainer(max_steps=2).fit(second, datamodule=prompts(16), ckpt_path=tmp_path / "one.ckpt")
    assert second.score_transforms[1].state_dict() == whole.score_transforms[1].state_dict()
    assert second.score_transforms[1].state_dict() != first.score_transforms[1].state_dict()
    assert equal(weights(whole), weights(second))


def test_statistics_that_the_run_no_longer_keeps_are_refused(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, tmp_path: Any
) -> None:
    first, run = ppo(score_transforms=[RunningNormalization()]), trainer(max_steps=1)
    run.fit(first, datamodule=prompts(16))
    run.save_checkpoint(tmp_path / "one.ckpt")
    for others in ([], [ScoreClip(5.0)]):
        with pytest.raises(UserError, match="statistics of RunningNormalization, but this run keeps some in none"):
            trainer(max_steps=2).fit(
                ppo(score_transforms=others), datamodule=prompts(16), ckpt_path=tmp_path / "one.ckpt"
            )
    # To look at what was trained they are not needed.
    trainer().validate(ppo(), datamodule=prompts(16, val=4), ckpt_path=tmp_path / "one.ckpt")

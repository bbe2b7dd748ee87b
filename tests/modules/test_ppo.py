"""PPO: what an iteration does to the weights, what it counts, and that nothing disturbs it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning.algorithm.critics import SeparateCritic
from rlhf_lightning.algorithm.experience import Experience
from rlhf_lightning.algorithm.kl import AdaptiveKL, FixedKL
from rlhf_lightning.algorithm.objectives import ClippedObjective
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.ppo_report import UpdateSums
from rlhf_lightning.rollout.collect import Rollout
from rlhf_lightning.rollout.decoding import TransformersSampler
from rlhf_lightning.rollout.sampler import SamplingConfig

MakePPO = Callable[..., PPOModule]
MakePrompts = Callable[..., PromptDataModule]
MakeTrainer = Callable[..., Trainer]
Weights = Callable[[LightningModule], dict[str, Tensor]]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


# --- what is counted --------------------------------------------------------------------------------------------------


def test_one_optimizer_step_a_minibatch_and_one_global_step_an_iteration(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer
) -> None:
    """16 prompts in rollouts of 8: 2 iterations of 3 epochs of 4 minibatches, each of 2 micro-batches."""
    module = ppo(ppo_epochs=3, minibatch_size=2, max_tokens_per_microbatch=1)
    run = trainer(max_epochs=1)
    run.fit(module, datamodule=prompts(16))
    assert run.global_step == 2
    assert module.counters["iterations"] == 2
    assert module.counters["updates"] == 2 * 3 * 4
    assert {int(state["step"]) for state in run.optimizers[0].state.values()} == {24}
    assert module.counters["episodes"] == 16


@pytest.mark.parametrize(("arguments", "expected"), [({"max_steps": 3}, 3), ({"fast_dev_run": 2}, 2)])
def test_the_trainers_limits_mean_iterations(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, arguments: dict[str, int], expected: int
) -> None:
    module = ppo()
    trainer(**arguments).fit(module, datamodule=prompts(40))
    assert module.counters["iterations"] == expected


def test_checkpoints_are_asked_for_and_named_by_iterations(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, tmp_path: Path
) -> None:
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer(max_steps=5, enable_checkpointing=True, callbacks=[saving]).fit(ppo(), datamodule=prompts(40))
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=2.ckpt", "step=4.ckpt"]


def test_what_an_iteration_logs(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, recorder: Any, stops: list[str]
) -> None:
    sampling = SamplingConfig(max_new_tokens=6, stop_tokens=stops)
    module = ppo(sampling=sampling, kl=AdaptiveKL(coef=0.2, target=1.0, horizon=80))
    trainer(max_steps=3, logger=recorder, log_every_n_steps=1).fit(module, datamodule=prompts(24))
    logged = recorder.values
    assert logged["progress/iterations"] == [1, 2, 3]
    assert logged["progress/episodes"] == [8, 16, 24]
    assert logged["progress/updates"] == [4, 8, 12]
    lengths = [8 * mean for mean in logged["rollout/response_length"]]
    assert logged["progress/tokens"] == pytest.approx([lengths[0], sum(lengths[:2]), sum(lengths)])
    assert len(set(lengths)) > 1
    assert all(second > 0 for name in ("rollout", "score", "update") for second in logged[f"time/{name}_s"])
    assert logged["rollout/kl"][0] == 0  # the reference is what the policy starts from
    assert abs(logged["rollout/kl"][2]) > 1e-3
    # The coefficient that an iteration reports is the one it used; 8 / 80 is the share of the horizon.
    expected = [0.2]
    for kl in logged["rollout/kl"][:2]:
        expected.append(expected[-1] * (1 + min(max(kl - 1, -0.2), 0.2) * 0.1))
    assert logged["rollout/kl_coef"] == pytest.approx(expected)
    assert not any(name.endswith("step") for name in logged)


def test_progress_bar_is_told_of_the_phases(ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer) -> None:
    told: list[tuple[str, int, int]] = []

    class Bar(ProgressBar):
        def phase(self, name: str, done: int, total: int) -> None:
            told.append((name, done, total))

        def disable(self) -> None:
            pass

    module = ppo(max_tokens_per_microbatch=1)  # every row in a pass of its own
    trainer(max_steps=1, enable_progress_bar=True, callbacks=[Bar()]).fit(module, datamodule=prompts())
    assert [item for item in told if item[0] == "rollout"] == [("rollout", step, 6) for step in range(1, 7)]
    assert [item for item in told if item[0] == "score"] == [("score", rows, 8) for rows in range(1, 9)]
    assert [item for item in told if item[0] == "update"] == [("update", step, 4) for step in range(1, 5)]


# --- the gradient -----------------------------------------------------------------------------------------------------


def fixed_experience() -> Experience:
    """Four rows of 1 to 5 response tokens."""
    generator = torch.Generator().manual_seed(0)
    prompt_lengths, lengths = torch.tensor([3, 2, 4, 2]), torch.tensor([2, 5, 1, 3])
    ids = torch.randint(5, 400, (4, 7), generator=generator)
    sequences = SequenceBatch(ids, prompt_lengths, lengths)
    mask = sequences.response_mask

    def noise(scale: float, mean: float = 0.0) -> Tensor:
        return torch.where(mask, mean + scale * torch.randn(mask.shape, generator=generator), 0.0)

    return Experience(
        sequences=sequences,
        response_mask=mask,
        old_logprobs=noise(1.5, -7.0),
        old_values=noise(0.3),
        ref_logprobs=noise(1.0),
        rewards=noise(0.0),
        advantages=noise(1.0),
        returns=noise(1.0),
    )


def loss_by_definition(
    module: PPOModule, experience: Experience, *, temperature: float, entropy_coef: float, k2_coef: float
) -> Tensor:
    """Row by row without padding, token by token."""
    total: Any = 0.0
    for row, ids in enumerate(experience.sequences.input_ids):
        prompt, size = (int(n[row]) for n in experience.sequences[1:])
        whole = ids[None, : prompt + size]
        logprobs = (module.policy(input_ids=whole).logits[0] / temperature).log_softmax(dim=-1)
        critic: Any = module.critic.scalar.model  # type: ignore[union-attr]
        values = critic.score(critic.model(input_ids=whole).last_hidden_state)[0, :, 0]
        for t in range(size):
            advantage, target = experience.advantages[row, t], experience.returns[row, t]
            logprob = logprobs[prompt + t - 1, ids[prompt + t]]
            ratio = (logprob - experience.old_logprobs[row, t]).exp()
            policy_loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
            entropy = -(logprobs[prompt + t - 1].exp() * logprobs[prompt + t - 1]).sum()
            k2 = (logprob - experience.ref_logprobs[row, t]) ** 2 / 2
            total = total - entropy_coef * entropy + k2_coef * k2
            value, old = values[prompt + t - 1], experience.old_values[row, t]
            clipped = old + (value - old).clamp(-0.2, 0.2)
            total = total + policy_loss + 0.1 * 0.5 * torch.maximum((value - target) ** 2, (clipped - target) ** 2)
    return total / int(experience.response_mask.sum())


@pytest.mark.parametrize(("entropy_coef", "k2_coef"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.05)])
def test_gradient_is_that_of_the_definition_for_any_micro_batch_size(
    ppo: MakePPO,
    prompts: MakePrompts,
    trainer: MakeTrainer,
    reward_model: str,
    entropy_coef: float,
    k2_coef: float,
) -> None:
    gradients: dict[str, list[Tensor]] = {}

    class Probe(PPOModule):
        def update(self, experience: Experience) -> UpdateSums:
            fixed = fixed_experience()
            parameters = [*self.policy.parameters(), *self.critic.parameters()]  # type: ignore[union-attr]
            loss = loss_by_definition(self, fixed, temperature=0.7, entropy_coef=entropy_coef, k2_coef=k2_coef)
            gradients["definition"] = list(torch.autograd.grad(loss, parameters))
            for size in (1, 2, 3, 4):
                self.zero_grad()
                sums = UpdateSums(self.device)
                groups = torch.tensor([2, 0, 3, 1]).split(size)
                approx_kl = self.accumulate_gradients([fixed.select(rows) for rows in groups], sums)
                gradients[f"micro-batches of {size}"] = [p.grad.clone() for p in parameters if p.grad is not None]
                torch.testing.assert_close(sums.metrics(fixed)["train/loss"], loss.detach(), rtol=1e-5, atol=0)
                torch.testing.assert_close(approx_kl, sums.metrics(fixed)["train/approx_kl"], rtol=1e-5, atol=0)
                assert 0 < sums.metrics(fixed)["train/clip_fraction"] < 1
            self.zero_grad()
            return super().update(experience)

    sampling = SamplingConfig(max_new_tokens=4, temperature=0.7)
    module = ppo(
        Probe,
        sampling=sampling,
        critic=SeparateCritic(reward_model),
        ppo_epochs=1,
        policy_objective=ClippedObjective(entropy_coef=entropy_coef),
        kl=FixedKL(k2_coef, estimator="k2", place="loss"),
    )
    trainer(max_steps=1).fit(module, datamodule=prompts())
    expected = torch.cat([gradient.flatten() for gradient in gradients.pop("definition")])
    assert expected.norm() > 0.1
    assert len(gradients) == 4
    for found in gradients.values():
        flat = torch.cat([gradient.flatten() for gradient in found])
        assert (flat - expected).norm() / expected.norm() < 1e-5


def test_max_tokens_per_microbatch_changes_no_result(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, weights: Weights, stops: list[str]
) -> None:
    results = []
    for tokens in (1, 40, 2048):
        module = ppo(
            max_tokens_per_microbatch=tokens,
            sampling=SamplingConfig(max_new_tokens=6, stop_tokens=stops),
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        )
        trainer(max_steps=2).fit(module, datamodule=prompts(16))
        results.append(weights(module))
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("max_grad_norm", "steps"), [(1e-3, True), (None, False)])
def test_gradients_are_clipped_by_their_common_norm(
    ppo: MakePPO,
    prompts: MakePrompts,
    trainer: MakeTrainer,
    weights: Weights,
    max_grad_norm: float | None,
    steps: bool,
) -> None:
    module = ppo(
        ppo_epochs=1,
        minibatch_size=8,
        max_grad_norm=max_grad_norm,
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
    )
    module.configure_model()
    before, run = weights(module), trainer(max_steps=1)
    run.fit(module, datamodule=prompts())
    moved = sum(((tensor - before[name]) ** 2).sum() for name, tensor in weights(module).items()) ** 0.5
    norm = float(run.callback_metrics["train/grad_norm"])
    assert norm > 0.1
    assert float(moved) == pytest.approx(1e-3 if steps else norm, rel=1e-2)


def test_the_critic_can_have_a_learning_rate_of_its_own(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, weights: Weights, reward_model: str
) -> None:
    """AdamW's first step moves every weight that has a gradient by the learning rate."""
    module = ppo(critic=SeparateCritic(reward_model, learning_rate=0.05), ppo_epochs=1, minibatch_size=8)
    module.configure_model()
    before, run = weights(module), trainer(max_steps=1)
    run.fit(module, datamodule=prompts())
    moved = {name: (tensor - before[name]).abs().max().item() for name, tensor in weights(module).items()}
    assert moved["policy.lm_head.weight"] == pytest.approx(1e-3, rel=1e-2)
    assert moved["critic.scalar.model.score.weight"] == pytest.approx(0.05, rel=1e-2)
    assert run.callback_metrics["train/lr"] == pytest.approx(1e-3)
    assert run.callback_metrics["train/lr_critic"] == pytest.approx(0.05)


def test_batch_plan(ppo: MakePPO, language_model: str) -> None:
    module = ppo(minibatch_size=4, max_tokens_per_microbatch=18)
    lengths = torch.tensor([9, 2, 7, 4, 5, 6, 3, 8])
    plans = [module.batch_plan(lengths, epoch=epoch) for epoch in (0, 0, 1)]
    orders = [torch.cat([group for minibatch in plan for group in minibatch]).tolist() for plan in plans]
    for plan, order in zip(plans, orders, strict=True):
        for minibatch in plan:
            tokens = [int(lengths[group].sum()) for group in minibatch]
            assert max(tokens) <= 18
            # No micro-batch could have taken the next one's first row too.
            follows = [int(lengths[group[0]]) for group in minibatch[1:]]
            assert all(has + more > 18 for has, more in zip(tokens, follows, strict=False))
        assert sorted(order) == list(range(8))
        for minibatch in plan:  # longest first, so that a micro-batch pads little
            assert torch.equal(lengths[torch.cat(minibatch)], lengths[torch.cat(minibatch)].sort(descending=True)[0])
    assert orders[0] == orders[1] != orders[2]
    module.counters["iterations"] += 1
    later = torch.cat([group for minibatch in module.batch_plan(lengths, epoch=0) for group in minibatch])
    assert later.tolist() not in orders


def test_every_epoch_shuffles_anew(ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer) -> None:
    epochs: list[int] = []

    class Watched(PPOModule):
        def batch_plan(self, lengths: Tensor, *, epoch: int) -> list[list[Tensor]]:
            epochs.append(epoch)
            return super().batch_plan(lengths, epoch=epoch)

    trainer(max_steps=1).fit(ppo(Watched, ppo_epochs=3), datamodule=prompts())
    assert epochs[-3:] == [0, 1, 2]
    assert set(epochs[:-3]) == {0}  # old log-probabilities are computed in the groups of the first


def test_the_old_pass_has_the_groups_of_the_first_update(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer
) -> None:
    """Matrix products of another shape may round otherwise, and the first ratio would be off 1 on some machines."""
    plans: list[list[list[int]]] = []
    passes: list[list[int]] = []

    class Watched(PPOModule):
        def batch_plan(self, lengths: Tensor, *, epoch: int) -> list[list[Tensor]]:
            plan = super().batch_plan(lengths, epoch=epoch)
            plans.append([group.tolist() for minibatch in plan for group in minibatch])
            return plan

        def score(self, *args: Any, groups: Sequence[Tensor], **kwargs: Any) -> Rollout:
            passes.extend(group.tolist() for group in groups)
            return super().score(*args, groups=groups, **kwargs)

    trainer(max_steps=1).fit(ppo(Watched, ppo_epochs=1), datamodule=prompts())
    assert passes == plans[-1]
    assert max(map(len, passes)) > 1


# --- the rollout ------------------------------------------------------------------------------------------------------


def watched(rollouts: list[Rollout]) -> type[PPOModule]:
    class Watched(PPOModule):
        def score(self, *args: Any, **kwargs: Any) -> Rollout:
            rollouts.append(super().score(*args, **kwargs))
            return rollouts[-1]

    return Watched


def test_the_temperature_divides_all_logits_alike(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, language_model: str
) -> None:
    rollouts: list[Rollout] = []
    module = ppo(watched(rollouts), sampling=SamplingConfig(max_new_tokens=6, temperature=0.5))
    run = trainer(max_steps=1)
    run.fit(module, datamodule=prompts())
    assert run.callback_metrics["rollout/sampler_gap"] < 1e-5
    [rollout], start = rollouts, AutoModelForCausalLM.from_pretrained(language_model)
    for row in range(8):
        prompt = int(rollout.sequences.prompt_lengths[row])
        ids = rollout.sequences.input_ids[row, : prompt + 6]
        with torch.no_grad():
            logprobs = (start(input_ids=ids[None]).logits[0] / 0.5).log_softmax(dim=-1)
        expected = logprobs[torch.arange(prompt - 1, prompt + 5), ids[prompt:]]
        torch.testing.assert_close(rollout.old_logprobs[row], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rollout.ref_logprobs[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("precision", "noise"), [("32-true", 1e-5), ("bf16-mixed", 0.05)])
def test_each_rollout_is_by_the_newest_weights(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, recorder: Any, precision: str, noise: float
) -> None:
    """What the sampler says of its tokens agrees with the policy of the moment, which has moved by then."""
    module = ppo(optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
    run = trainer(max_steps=3, precision=precision, logger=recorder, log_every_n_steps=1)
    run.fit(module, datamodule=prompts(24))
    assert max(recorder.values["rollout/sampler_gap"]) < noise
    assert recorder.values["rollout/kl"][2] > 1


@pytest.mark.parametrize("cached", [True, False])
def test_each_minibatch_sees_the_newest_weights_under_autocast(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, cached: bool
) -> None:
    """Also where autocast keeps its low-precision copies; with those of before, the second epoch has ratio 1 again."""

    class Autocast(PPOModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
                super().training_step(batch, batch_idx)

    run = trainer(max_steps=1, precision="bf16-mixed")
    module = ppo(Autocast, minibatch_size=8, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
    run.fit(module, datamodule=prompts())
    assert run.callback_metrics["train/approx_kl"] > 0.01


def test_every_iteration_draws_anew(ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer) -> None:
    """Same prompts, same weights, other responses."""
    rollouts: list[Rollout] = []
    module = ppo(watched(rollouts), optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    trainer(max_steps=2).fit(module, datamodule=prompts(8))
    assert rollouts[0].prompts == rollouts[1].prompts
    assert not set(rollouts[0].responses) & set(rollouts[1].responses)


def test_another_sampler_gives_the_same_run(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, weights: Weights
) -> None:
    results = []
    for sampler in (None, TransformersSampler()):
        module = ppo(sampler=sampler)
        trainer(max_steps=2).fit(module, datamodule=prompts(16))
        results.append(weights(module))
    assert equal(*results)


# --- what it is for ---------------------------------------------------------------------------------------------------


def test_the_policy_learns_to_emit_rewarded_tokens(
    ppo: MakePPO, prompts: MakePrompts, trainer: MakeTrainer, recorder: Any
) -> None:
    """An eighth of the vocabulary is rewarded; at the start about a fifth of the tokens come from it."""
    module = ppo(
        kl=FixedKL(0.01),
        critic=SeparateCritic(learning_rate=3e-3),
        minibatch_size=16,
        ppo_epochs=4,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0),
    )
    run = trainer(max_steps=18, logger=recorder, log_every_n_steps=1)
    run.fit(module, datamodule=prompts(32, rollout_batch_size=32))
    assert recorder.values["rollout/score"][0] < 0.4
    assert min(recorder.values["rollout/score"][-3:]) > 0.9
    assert abs(recorder.values["train/explained_variance"][0]) < 0.05  # a new critic says the same of everything
    assert recorder.values["train/value_loss"][-1] < recorder.values["train/value_loss"][0] / 3

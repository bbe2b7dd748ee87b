"""PPO for language models: policy, value and reference in one LightningModule, one iteration a training step."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from rlhf_lightning.algorithm.advantages import GAE, AdvantageEstimator
from rlhf_lightning.algorithm.critics import Critic, SeparateCritic
from rlhf_lightning.algorithm.experience import Experience, estimate_experience
from rlhf_lightning.algorithm.kl import FixedKL, KLControl
from rlhf_lightning.algorithm.objectives import ClippedObjective, ClippedValueObjective, MinibatchSize, PolicyObjective
from rlhf_lightning.algorithm.score_transforms import ScoreTransform, load_transforms
from rlhf_lightning.data.collate import PromptBatch
from rlhf_lightning.distributed import global_sum, world_size
from rlhf_lightning.functional.losses import ValueLoss, token_mean_weights
from rlhf_lightning.functional.sequences import token_groups
from rlhf_lightning.models.causal_lm import ResponsePass, response_pass
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.offload import OffloadedModels, return_freed_memory
from rlhf_lightning.modules.manual import accumulating, clip_and_step, counted_as_one_step
from rlhf_lightning.modules.nonfinite import placed
from rlhf_lightning.modules.ppo_checks import (
    check_configuration,
    check_critic_parts,
    check_first_minibatch,
    check_numbers,
    check_sampler,
)
from rlhf_lightning.modules.ppo_report import Stopwatch, UpdateSums, rollout_metrics, sample_rows, told_numbers
from rlhf_lightning.modules.rollout_module import RolloutModule
from rlhf_lightning.rollout.collect import Rollout
from rlhf_lightning.rollout.reward_sources import RewardSource
from rlhf_lightning.rollout.sampler import Sampler, SamplingConfig
from rlhf_lightning.seeding import derive_seed, derived_generator, run_seed


class PPOModule(RolloutModule):
    """Tune a language model towards a reward by PPO, staying near the model it started from.

    One training step is one iteration: roll out, score, estimate advantages, update, log once. Optimization is manual;
    ``trainer.global_step`` counts iterations. With a critic-free ``advantages`` the same module is GRPO
    (``GroupRelative``), RLOO (``LeaveOneOut``) or REINFORCE++ (``GlobalBaseline``).

    Args:
        policy: Hugging Face folder or hub name of the model to be tuned.
        reward: Where scores come from: ``RewardModel``, ``FunctionReward``, ``WeightedSum`` or a class of your own.
        reference: Folder or hub name of the frozen reference; ``null`` takes a copy of the policy as it starts.
        lora: Adapters that the policy is trained by, in place of all its weights; the reference, unless another is
            named, is then the policy without them, over the same weights. ``null`` trains all weights.
        critic: Where values come from, ``SeparateCritic`` or ``TrunkCritic``; ``null`` is ``SeparateCritic()``, which
            starts from the policy, and none where ``advantages`` needs none.
        advantages: Advantage estimator; ``null`` is ``GAE()``.
        kl: KL control; ``null`` is ``FixedKL()``.
        score_transforms: What is done to scores before they are paid, in order, such as ``ScoreClip`` and
            ``MissingEOSPenalty``; ``null`` is nothing.
        sampling: What to sample; its temperature divides the training logits too.
        sampler: What samples; ``null`` is ``CachedSampler()``.
        policy_objective: What the policy minimises; ``null`` is ``ClippedObjective()``.
        value_objective: What the critic minimises; ``null`` is ``ClippedValueObjective()``.
        ppo_epochs: Passes over each rollout, at least 1; more learn more from it and move further from it.
        minibatch_size: Responses of all processes in one optimizer step; divides the rollout batch.
        max_tokens_per_microbatch: Tokens, prompts included, in one forward pass of a process, at most; a longer
            sequence goes alone. More is faster and needs more memory; results change by
            rounding alone, which bf16-mixed shows.
        gradient_checkpointing: True keeps of each layer its input alone and computes the rest again backwards: a third
            to a half more time in training passes, for a small part of their memory. Results stay the same.
        offload_frozen: True lets reference and reward model leave memory while nothing is scored: from a GPU to the
            host's memory, on a processor to a file in the run's folder. Results stay the same.
        max_grad_norm: Gradients are clipped to this common norm; ``null`` turns it off.
        max_nonfinite: Steps that may be skipped because a loss, a gradient or a rollout is not finite, in the whole
            run, before it is stopped; 0 stops at the first.
        optimizer: Called with the parameter groups ``policy`` and ``critic``.
        lr_scheduler: Called with the optimizer, stepped once an iteration; ``null`` keeps the learning rate.

    References:
        Schulman et al. 2017, "Proximal Policy Optimization Algorithms"; Ouyang et al. 2022, "Training language models
        to follow instructions with human feedback".
    """

    def __init__(
        self,
        policy: str,
        reward: RewardSource,
        reference: str | None = None,
        lora: LoRA | None = None,
        critic: Critic | None = None,
        advantages: AdvantageEstimator | None = None,
        kl: KLControl | None = None,
        score_transforms: list[ScoreTransform] | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        sampler: Sampler | None = None,
        policy_objective: PolicyObjective | None = None,
        value_objective: ClippedValueObjective | None = None,
        ppo_epochs: int = 4,
        minibatch_size: int = 4,
        max_tokens_per_microbatch: int = 2048,
        gradient_checkpointing: bool = False,
        offload_frozen: bool = False,
        max_grad_norm: float | None = 1.0,
        max_nonfinite: int = 10,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(
            params, lr=1e-5, eps=1e-5, weight_decay=0.0, fused=True
        ),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        check_numbers(ppo_epochs, minibatch_size, max_tokens_per_microbatch, max_grad_norm)
        advantages = advantages or GAE()
        check_critic_parts(advantages, {"critic": critic, "value_objective": value_objective})
        super().__init__(
            policy,
            reward,
            reference=reference,
            lora=lora,
            critic=critic or (SeparateCritic() if advantages.needs_critic else None),
            sampling=sampling,
            sampler=sampler,
            max_tokens_per_microbatch=max_tokens_per_microbatch,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )
        # By value, as a subclass may have other arguments; objects stay out, which a weights-only load would refuse.
        kept = {"policy": policy, "reference": reference, "ppo_epochs": ppo_epochs, "minibatch_size": minibatch_size}
        self.save_hyperparameters({**kept, "max_grad_norm": max_grad_norm})
        self.automatic_optimization = False
        self.nonfinite.allow(max_nonfinite)
        self.advantages, self.kl, self.score_transforms = advantages, kl or FixedKL(), score_transforms or []
        self.policy_objective = policy_objective or ClippedObjective()
        self.value_objective = value_objective or ClippedValueObjective()
        self.ppo_epochs, self.minibatch_size, self.max_grad_norm = ppo_epochs, minibatch_size, max_grad_norm
        self.gradient_checkpointing, self.offload_frozen = gradient_checkpointing, offload_frozen
        self._self_checked = False

    @property
    def warming_up(self) -> bool:
        """Whether the critic learns alone in this iteration."""
        return self.critic is not None and self.counters["iterations"] < self.critic.warmup_iterations

    def on_fit_start(self) -> None:
        """Refuse what cannot work before time is spent on it."""
        super().on_fit_start()
        check_configuration(self)
        if self.offload_frozen:
            trained = [self.policy, *([] if self.critic is None else [self.critic])]
            frozen = self.frozen_modules().values()
            self._offloaded = OffloadedModels(frozen, self.trainer.default_root_dir, beside=trained)
        self._self_checked = False
        self.train()

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Run one iteration."""
        watch = Stopwatch(self.device, profiler=getattr(self.trainer, "profiler", None))
        with watch("rollout"), placed(self):
            samples, sequences = self.sample(
                batch, seed=self._seed("rollout"), row_ids=self._row_ids(batch, 0), report="rollout"
            )
            self.sampler.release()
        with watch("score"):
            plan = [group for minibatch in self.batch_plan(sequences.lengths, epoch=0) for group in minibatch]
            rollout = self.score(batch, samples, sequences, groups=plan, report="score")
            if not self.nonfinite.admits_all(told_numbers(rollout), self):
                self._skip_iteration(rollout)
                return
            experience = self.estimate(rollout)
        if not self._self_checked:
            checks = check_first_minibatch(self, rollout, experience)
            self._log_once(checks | check_sampler(self, samples, rollout))
            self._self_checked = True
        with watch("update"):
            sums = self.update(experience)
            self.nonfinite.refuse_weights(self)
            self._optimizer().zero_grad(set_to_none=True)  # as large as the weights, and of no use to the next rollout
            return_freed_memory()
        self._finish_iteration(rollout, experience, sums, watch)

    def estimate(self, rollout: Rollout) -> Experience:
        """Turn scores into token rewards, and those into advantages and returns."""
        return estimate_experience(
            rollout, kl=self.kl, advantages=self.advantages, score_transforms=self.score_transforms
        )

    def batch_plan(self, lengths: Tensor, *, epoch: int) -> list[list[Tensor]]:
        """Return the minibatches of an epoch, each as the row numbers of its micro-batches.

        Args:
            lengths: Tokens of each response with its prompt, shape (batch,).
            epoch: Counts from 0; the order follows from run seed, iteration and epoch.
        """
        generator = derived_generator(run_seed(), "minibatch", self.counters["iterations"], epoch)
        order = torch.randperm(len(lengths), generator=generator).to(lengths.device)
        minibatches = order.split(self.minibatch_size // world_size())
        budget = min(self.max_tokens_per_microbatch, self.memory.tokens or self.max_tokens_per_microbatch)
        return [[rows[group] for group in token_groups(lengths[rows], budget)] for rows in minibatches]

    def update(self, experience: Experience) -> UpdateSums:
        """Train on a rollout: epochs of shuffled minibatches, one optimizer step each."""
        optimizer, sums, phase = self._optimizer(), UpdateSums(self.device), self._phase("update")
        admits = functools.partial(self.nonfinite.admits, module=self)
        with counted_as_one_step(optimizer):
            for epoch in range(self.ppo_epochs):
                plan = self.batch_plan(experience.sequences.lengths, epoch=epoch)
                for number, minibatch in enumerate(plan):
                    approx_kl = self._gradients_of(experience, minibatch, sums)
                    if self._moved_too_far(approx_kl):
                        sums.stopped_early = True
                        self.nonfinite.forget()
                        return sums
                    sums.add_step(clip_and_step(optimizer, self._trainable(), self.max_grad_norm, admits=admits))
                    phase(epoch * len(plan) + number + 1, self.ppo_epochs * len(plan))
        return sums

    def _gradients_of(self, experience: Experience, minibatch: Sequence[Tensor], sums: UpdateSums) -> Tensor:
        """Backpropagate a minibatch; where memory runs out, do so anew, in smaller micro-batches.

        What was added up before is dropped with the gradients. Several processes could not agree on that in the middle
        of a backward pass.
        """
        take_back = sums.mark()

        def attempt(micro_batches: list[Tensor]) -> Tensor:
            take_back()
            self._optimizer().zero_grad(set_to_none=True)
            return self.accumulate_gradients([experience.select(rows) for rows in micro_batches], sums)

        return self.memory.whole(minibatch, experience.sequences.lengths, attempt, may=lambda: world_size() == 1)

    def accumulate_gradients(self, micro_batches: Sequence[Experience], sums: UpdateSums) -> Tensor:
        """Backpropagate the loss of one minibatch, micro-batch by micro-batch.

        Each token's weight is that in the minibatch of *all* processes (times their number, as gradients are averaged
        over them), so that neither cut changes the gradient.

        Returns:
            Mean ``approx_kl`` of this process's tokens times their share in all, nats, a scalar.
        """
        masks = [part.response_mask for part in micro_batches]
        tokens = torch.stack([mask.sum() for mask in masks]).sum().float()
        rows = torch.full_like(tokens, float(sum(map(len, masks))))
        size = MinibatchSize(*(global_sum(torch.stack([tokens, rows])) / world_size()))
        advantages = self.advantages.of_minibatch([part.advantages for part in micro_batches], masks)
        before = sums.sums["approx_kl"].clone()
        for number, (part, estimate) in enumerate(zip(micro_batches, advantages, strict=True), start=1):
            with accumulating(self, last=number == len(micro_batches)):
                for loss in self._losses(part, estimate, size, sums):
                    self.manual_backward(loss)
        sums.minibatches += 1
        if self.warming_up:  # without a gradient, the optimizer leaves weights and moments alone
            for parameter in self.policy.parameters():
                parameter.grad = None
        return (sums.sums["approx_kl"] - before) / size.num_tokens

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters and the state of the KL control and of the score transforms."""
        super().on_save_checkpoint(checkpoint)
        transforms = [{"class": type(each).__name__, "state": each.state_dict()} for each in self.score_transforms]
        checkpoint["ppo"] = {"counters": dict(self.counters), "kl": self.kl.state_dict(), "transforms": transforms}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them over."""
        super().on_load_checkpoint(checkpoint)
        self.counters = dict(checkpoint["ppo"]["counters"])
        self.kl.load_state_dict(checkpoint["ppo"]["kl"])
        resuming = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if self.score_transforms or resuming:  # else nothing is paid
            load_transforms(self.score_transforms, checkpoint["ppo"]["transforms"])

    def configure_optimizers(self) -> Any:
        """Build one optimizer with a group for the policy and, where there is one, one for the critic."""
        groups: list[dict[str, Any]] = [{"params": _trained(self.policy), "name": "policy"}]
        if self.critic is not None:
            groups.append({"params": _trained(self.critic), "name": "critic"})
            if self.critic.learning_rate is not None:
                groups[1]["lr"] = self.critic.learning_rate
        return self._optimizer_of(groups)

    def _losses(self, part: Experience, advantages: Tensor, size: MinibatchSize, sums: UpdateSums) -> Iterator[Tensor]:
        """Yield what is to be differentiated, one after the other: the policy's loss, then the critic's.

        So the activations of only one of them exist at a time. Together where the critic reads the policy's pass, and
        with several processes, which exchange the gradients of all weights in one backward pass.
        """
        objective = self.policy_objective
        output = response_pass(
            self.policy,
            part.sequences,
            temperature=self.sampling.temperature,
            with_entropy=True,
            entropy_gradient=objective.entropy_coef > 0,
        )
        weights = objective.normalization.weights(part.response_mask, size)
        policy_loss = objective.loss(
            logprobs=output.logprobs,
            old_logprobs=part.old_logprobs,
            advantages=advantages,
            response_mask=part.response_mask,
            token_weights=weights,
        )
        loss = policy_loss.loss
        if objective.entropy_coef and output.entropy is not None:
            loss = loss - objective.entropy_coef * (weights * output.entropy).sum()
        kl_loss = None
        if self.kl.loss_coef:
            kl_loss = self.kl.loss_coef * (weights * self.kl.estimate(output.logprobs, part.ref_logprobs)).sum()
            loss = loss + kl_loss
        apart = self.critic is not None and not self.critic.reads_policy and world_size() == 1
        if apart:
            yield loss
            loss = loss.detach()
        value_loss = self._value_loss(part, output, size)
        if value_loss is not None:
            loss = loss + self.value_objective.coef * value_loss.loss
        yield loss
        sums.add_micro_batch(loss, policy_loss, value_loss, kl_loss, output.entropy, part.response_mask)

    def _value_loss(self, part: Experience, output: ResponsePass, size: MinibatchSize) -> ValueLoss | None:
        if self.critic is None:
            return None
        return self.value_objective.loss(
            values=self.critic.values(part.sequences, output),
            old_values=part.old_values,
            returns=part.returns,
            response_mask=part.response_mask,
            token_weights=token_mean_weights(part.response_mask, num_tokens=size.num_tokens),
        )

    def _moved_too_far(self, approx_kl: Tensor) -> bool:
        """Tell, in all processes alike, whether the policy has left the rollout's by more than the target."""
        target = self.policy_objective.target_kl
        return target is not None and bool(global_sum(approx_kl) / world_size() > target)

    def _finish_iteration(self, rollout: Rollout, experience: Experience, sums: UpdateSums, watch: Stopwatch) -> None:
        policy_learnt = not self.warming_up  # as it was in this iteration, before that is counted
        metrics: dict[str, Tensor | float] = {}
        metrics |= rollout_metrics(rollout, prefix="rollout", rewards=experience.rewards)
        metrics |= sums.metrics(experience, values=self.critic is not None, kl_loss=self.kl.loss_coef > 0)
        episodes, tokens = self._count(rollout, updates=sums.steps)
        metrics["rollout/kl_coef"] = self.kl.coef
        if policy_learnt:
            self.kl.update(float(metrics["rollout/kl"]), episodes)
        metrics |= watch.metrics(tokens)
        self._report(rollout, metrics)

    def _skip_iteration(self, rollout: Rollout) -> None:
        """Count an iteration from which nothing is learnt, and report what it found as it is."""
        with counted_as_one_step(self._optimizer()):
            pass
        self._count(rollout, updates=0)
        self._report(rollout, dict(rollout_metrics(rollout, prefix="rollout")))

    def _count(self, rollout: Rollout, *, updates: int) -> tuple[int, int]:
        """Count an iteration, and return the responses and the response tokens of all its processes."""
        tokens = int(rollout.sequences.response_lengths.sum())
        done = torch.tensor([len(rollout.responses), tokens], device=self.device)
        episodes, tokens = global_sum(done).tolist()
        for name, amount in (("iterations", 1), ("episodes", episodes), ("tokens", tokens), ("updates", updates)):
            self.counters[name] += amount
        return episodes, tokens

    def _report(self, rollout: Rollout, metrics: dict[str, Tensor | float]) -> None:
        """Log an iteration, with what stands in every one, and end it."""
        for group in self._optimizer().param_groups:
            metrics["train/lr" if group["name"] == "policy" else f"train/lr_{group['name']}"] = group["lr"]
        metrics |= {f"progress/{name}": float(n) for name, n in self.counters.items()}
        watched = {name: metrics.pop(name) for name in ("rollout/score", "rollout/kl")}
        self.log_dict(watched, prog_bar=True)
        self.log_dict(metrics)
        self.samples = sample_rows(rollout)
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
            scheduler.step()

    def _log_once(self, metrics: dict[str, Tensor]) -> None:
        """Log what is known once; ``self.log`` would repeat it to the end of the epoch."""
        for logger in self.loggers:
            logger.log_metrics({name: float(value) for name, value in metrics.items()}, step=self.global_step)

    def _optimizer(self) -> LightningOptimizer:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        return optimizer

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimizer().param_groups for parameter in group["params"]]

    def _seed(self, purpose: str) -> int:
        return derive_seed(run_seed(), purpose, self.counters["iterations"])


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]

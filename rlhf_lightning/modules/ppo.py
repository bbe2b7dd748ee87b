"""PPO for language models: policy, value and reference in one LightningModule, one iteration a training step."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from rlhf_lightning.algorithm.advantages import GAE
from rlhf_lightning.algorithm.critics import SeparateCritic
from rlhf_lightning.algorithm.experience import Experience, estimate_experience
from rlhf_lightning.algorithm.kl import FixedKL, KLControl
from rlhf_lightning.algorithm.objectives import ClippedObjective, ClippedValueObjective
from rlhf_lightning.data.collate import PromptBatch
from rlhf_lightning.distributed import global_sum, world_size
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.models.causal_lm import response_pass
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.modules.base import ModelModule
from rlhf_lightning.modules.manual import accumulating, clip_and_step, counted_as_one_step
from rlhf_lightning.modules.ppo_checks import check_configuration, check_first_minibatch
from rlhf_lightning.modules.ppo_report import Stopwatch, UpdateSums, rollout_metrics, sample_rows
from rlhf_lightning.rollout.collect import Rollout, Scorers, length_sorted, score_samples
from rlhf_lightning.rollout.decoding import CachedSampler
from rlhf_lightning.rollout.reward_sources import RewardSource
from rlhf_lightning.rollout.sampler import Sampler, Samples, SamplingConfig, resolve_stop_ids
from rlhf_lightning.seeding import derive_seed, derived_generator, run_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PPOModule(ModelModule):
    """Tune a language model towards a reward by PPO, staying near the model it started from.

    One training step is one iteration: roll out, score, estimate advantages, update, log once. Optimization is manual;
    ``trainer.global_step`` counts iterations.

    Args:
        policy: Hugging Face folder or hub name of the model to be tuned.
        reward: Where scores come from: ``RewardModel``, ``FunctionReward``, ``WeightedSum`` or a class of your own.
        reference: Folder or hub name of the frozen reference; ``null`` takes a copy of the policy as it starts.
        critic: Where values come from; ``null`` is ``SeparateCritic()``, which starts from the policy.
        advantages: Advantage estimator; ``null`` is ``GAE()``.
        kl: KL control; ``null`` is ``FixedKL()``.
        sampling: What to sample; its temperature divides the training logits too.
        sampler: What samples; ``null`` is ``CachedSampler()``.
        policy_objective: What the policy minimises; ``null`` is ``ClippedObjective()``.
        value_objective: What the critic minimises; ``null`` is ``ClippedValueObjective()``.
        ppo_epochs: Passes over each rollout, at least 1; more learn more from it and move further from it.
        minibatch_size: Responses of all processes in one optimizer step; divides the rollout batch.
        micro_batch_size: Responses in one forward pass of a process; changes memory and speed, never a result.
        max_grad_norm: Gradients are clipped to this common norm; ``null`` turns it off.
        optimizer: Called with the parameter groups ``policy`` and ``critic``.
        lr_scheduler: Called with the optimizer, stepped once an iteration; ``null`` keeps the learning rate.

    References:
        Schulman et al. 2017, "Proximal Policy Optimization Algorithms"; Ouyang et al. 2022, "Training language models
        to follow instructions with human feedback".
    """

    batch_type = PromptBatch
    export_prefix = "policy."

    def __init__(
        self,
        policy: str,
        reward: RewardSource,
        reference: str | None = None,
        critic: SeparateCritic | None = None,
        advantages: GAE | None = None,
        kl: KLControl | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        sampler: Sampler | None = None,
        policy_objective: ClippedObjective | None = None,
        value_objective: ClippedValueObjective | None = None,
        ppo_epochs: int = 4,
        minibatch_size: int = 4,
        micro_batch_size: int = 16,
        max_grad_norm: float | None = 1.0,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(
            params, lr=1e-5, eps=1e-5, weight_decay=0.0, fused=True
        ),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(policy, optimizer, lr_scheduler)
        for name, value in (
            ("ppo_epochs", ppo_epochs),
            ("minibatch_size", minibatch_size),
            ("micro_batch_size", micro_batch_size),
        ):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise UserError(f"max_grad_norm is {max_grad_norm}; it must be above 0, or null for none.")
        if sampling.temperature == 0:
            raise UserError("sampling.temperature is 0; PPO needs responses drawn at random, so a value above 0.")
        # By value, as a subclass may have other arguments; objects stay out, which a weights-only load would refuse.
        kept = {"policy": policy, "reference": reference, "ppo_epochs": ppo_epochs, "minibatch_size": minibatch_size}
        self.save_hyperparameters({**kept, "max_grad_norm": max_grad_norm})
        self.automatic_optimization = False
        self.reference_name = reference
        self.reward, self.critic = reward, critic or SeparateCritic()
        self.advantages, self.kl = advantages or GAE(), kl or FixedKL()
        self.sampling, self.sampler = sampling, sampler or CachedSampler()
        self.policy_objective = policy_objective or ClippedObjective()
        self.value_objective = value_objective or ClippedValueObjective()
        self.ppo_epochs, self.minibatch_size, self.micro_batch_size = ppo_epochs, minibatch_size, micro_batch_size
        self.max_grad_norm = max_grad_norm
        self.counters = {"iterations": 0, "episodes": 0, "tokens": 0, "updates": 0}
        self.samples: list[dict[str, Any]] = []
        self.val_samples: list[dict[str, Any]] = []
        self._sampler_ready_for: tuple[torch.device, torch.dtype] | None = None
        self._self_checked = False
        self._rows_evaluated = 0

    @property
    def exported_model(self) -> "PreTrainedModel":
        """The policy."""
        return self.policy

    def frozen_modules(self) -> dict[str, nn.Module]:
        """Reference and reward are never trained."""
        return {name: getattr(self, name) for name in ("reference", "reward") if hasattr(self, name)}

    def configure_model(self) -> None:
        """Load policy, reference, critic and reward, once."""
        if hasattr(self, "policy"):
            return
        self.policy = load_causal_lm(self.model_name)
        start = load_causal_lm(self.reference_name) if self.reference_name else copy.deepcopy(self.policy)
        self.reference = start.eval().requires_grad_(False)
        self.critic.setup(self.model_name)
        self.reward.setup(self.tokenizer)
        self.reward.eval().requires_grad_(False)
        self.stop_ids = resolve_stop_ids(self.tokenizer, self.sampling.stop_tokens)

    def setup(self, stage: str) -> None:
        """Expect other weights than a copy for sampling may hold; one made in inference mode could not take them."""
        super().setup(stage)
        self._sampler_ready_for = None

    def teardown(self, stage: str) -> None:
        """Let the sampler go; the next stage sets it up anew."""
        self.sampler.close()

    def on_fit_start(self) -> None:
        """Refuse what cannot work before time is spent on it."""
        check_configuration(self)
        self._self_checked = False
        self.train()

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Run one iteration."""
        watch = Stopwatch(self.device, profiler=getattr(self.trainer, "profiler", None))
        with watch("rollout"):
            samples, sequences = self.sample(
                batch, seed=self._seed("rollout"), row_ids=self._row_ids(batch, 0), report="rollout"
            )
        with watch("score"):
            plan = [group for minibatch in self.batch_plan(sequences.lengths, epoch=0) for group in minibatch]
            rollout = self.score(batch, samples, sequences, groups=plan, report="score")
            experience = self.estimate(rollout)
        if not self._self_checked:
            self._log_once(check_first_minibatch(self, rollout, experience))
            self._self_checked = True
        with watch("update"):
            sums = self.update(experience)
        self._finish_iteration(rollout, experience, sums, watch)

    def sample(
        self, batch: PromptBatch, *, seed: int, row_ids: Sequence[int], report: str | None = None
    ) -> tuple[Samples, SequenceBatch]:
        """Let the policy respond to prompts.

        Args:
            batch: Left-padded prompts.
            seed: Fixes all draws.
            row_ids: Number of each prompt among those of all processes.
            report: Name under which the progress bar shows this phase.

        Returns:
            The samples, and prompts and responses together as a ``SequenceBatch``.
        """
        self._prepare_sampler()
        with torch.autocast(self.device.type, enabled=False):
            samples = self.sampler.sample(
                batch.input_ids,
                batch.attention_mask,
                config=self.sampling,
                stop_ids=self.stop_ids,
                seed=seed,
                row_ids=row_ids,
                progress=self._phase(report),
            )
        self.sampler.release()
        return samples, SequenceBatch.join(batch.input_ids, batch.attention_mask, samples.tokens, samples.lengths)

    def score(
        self,
        batch: PromptBatch,
        samples: Samples,
        sequences: SequenceBatch,
        *,
        groups: Sequence[Tensor],
        report: str | None = None,
    ) -> Rollout:
        """Compute old and reference log-probabilities, values and scores of the samples.

        Args:
            batch: The prompts.
            samples: What the sampler returned.
            sequences: Both together.
            groups: Rows of each forward pass; those of the first epoch make its first ratios exactly 1.
            report: Name under which the progress bar shows this phase.
        """
        return score_samples(
            samples,
            sequences=sequences,
            groups=groups,
            scorers=Scorers(self.policy, self.reference, self.critic, self.reward, self.sampling.temperature),
            prompts=batch.prompts,
            rows=batch.rows,
            tokenizer=self.tokenizer,
            progress=self._phase(report),
        )

    def estimate(self, rollout: Rollout) -> Experience:
        """Turn scores into token rewards, and those into advantages and returns."""
        return estimate_experience(rollout, kl=self.kl, advantages=self.advantages)

    def batch_plan(self, lengths: Tensor, *, epoch: int) -> list[list[Tensor]]:
        """Return the minibatches of an epoch, each as the row numbers of its micro-batches.

        Args:
            lengths: Tokens of each response with its prompt, shape (batch,).
            epoch: Counts from 0; the order follows from run seed, iteration and epoch.
        """
        generator = derived_generator(run_seed(), "minibatch", self.counters["iterations"], epoch)
        order = torch.randperm(len(lengths), generator=generator).to(lengths.device)
        minibatches = order.split(self.minibatch_size // world_size())
        return [[rows[group] for group in length_sorted(lengths[rows], self.micro_batch_size)] for rows in minibatches]

    def update(self, experience: Experience) -> UpdateSums:
        """Train on a rollout: epochs of shuffled minibatches, one optimizer step each."""
        optimizer, sums, phase = self._optimizer(), UpdateSums(self.device), self._phase("update")
        with counted_as_one_step(optimizer):
            for epoch in range(self.ppo_epochs):
                plan = self.batch_plan(experience.sequences.lengths, epoch=epoch)
                for number, micro_batches in enumerate(plan):
                    optimizer.zero_grad(set_to_none=True)
                    self.accumulate_gradients([experience.select(rows) for rows in micro_batches], sums)
                    sums.add_step(clip_and_step(optimizer, self._trainable(), self.max_grad_norm))
                    phase(epoch * len(plan) + number + 1, self.ppo_epochs * len(plan))
        return sums

    def accumulate_gradients(self, micro_batches: Sequence[Experience], sums: UpdateSums) -> None:
        """Backpropagate the loss of one minibatch, micro-batch by micro-batch.

        Each micro-batch's loss is its tokens' sum over the token count of the minibatch in *all* processes (times their
        number, as gradients are averaged over them), so that neither cut changes the gradient.
        """
        tokens = torch.stack([part.response_mask.sum() for part in micro_batches]).sum().float()
        num_tokens = global_sum(tokens) / world_size()
        for number, part in enumerate(micro_batches, start=1):
            with accumulating(self, last=number == len(micro_batches)):
                self.manual_backward(self._loss(part, num_tokens, sums))

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Log score, KL and length of responses to held-out prompts; the draws are the same each time."""
        rollout, experience = self._evaluate(batch)
        metrics = rollout_metrics(
            rollout, experience, prefix="val", names=("score", "kl", "response_length", "finished_fraction")
        )
        # Weighted by the rows of all processes: Lightning averages the weights as whole numbers, rounded down.
        rows = int(global_sum(torch.tensor(len(batch.prompts), device=self.device)))
        self.log_dict(metrics, on_epoch=True, batch_size=rows, sync_dist=True)
        self.val_samples += sample_rows(rollout, experience)

    def on_validation_epoch_start(self) -> None:
        """Forget the samples of the validation before, and number the prompts anew."""
        self.val_samples, self._rows_evaluated = [], 0

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Do the same as in validation."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return prompt, response, score, KL and length of each row."""
        return sample_rows(*self._evaluate(batch))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters and the state of the KL control."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["ppo"] = {"counters": dict(self.counters), "kl": self.kl.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them over."""
        super().on_load_checkpoint(checkpoint)
        self.counters = dict(checkpoint["ppo"]["counters"])
        self.kl.load_state_dict(checkpoint["ppo"]["kl"])

    def configure_optimizers(self) -> Any:
        """Build one optimizer with a group for the policy and one for the critic."""
        policy = {"params": list(self.policy.parameters()), "name": "policy"}
        critic: dict[str, Any] = {"params": list(self.critic.parameters()), "name": "critic"}
        if self.critic.learning_rate is not None:
            critic["lr"] = self.critic.learning_rate
        return self._optimizer_of([policy, critic])

    def _evaluate(self, batch: PromptBatch) -> tuple[Rollout, Experience]:
        seed, rows = derive_seed(run_seed(), "validation"), self._row_ids(batch, self._rows_evaluated)
        self._rows_evaluated += len(rows)
        samples, sequences = self.sample(batch, seed=seed, row_ids=rows)
        order = torch.arange(len(rows), device=self.device)
        rollout = self.score(batch, samples, sequences, groups=order.split(self.micro_batch_size))
        return rollout, self.estimate(rollout)

    def _loss(self, part: Experience, num_tokens: Tensor, sums: UpdateSums) -> Tensor:
        output = response_pass(self.policy, part.sequences, temperature=self.sampling.temperature, with_entropy=True)
        policy_loss = self.policy_objective.loss(
            logprobs=output.logprobs,
            old_logprobs=part.old_logprobs,
            advantages=part.advantages,
            response_mask=part.response_mask,
            num_tokens=num_tokens,
        )
        value_loss = self.value_objective.loss(
            values=self.critic.values(part.sequences),
            old_values=part.old_values,
            returns=part.returns,
            response_mask=part.response_mask,
            num_tokens=num_tokens,
        )
        loss = policy_loss.loss + self.value_objective.coef * value_loss.loss
        sums.add_micro_batch(loss, policy_loss, value_loss, output.entropy, num_tokens, part.response_mask)
        return loss

    def _finish_iteration(self, rollout: Rollout, experience: Experience, sums: UpdateSums, watch: Stopwatch) -> None:
        metrics: dict[str, Tensor | float] = {}
        metrics |= rollout_metrics(rollout, experience, prefix="rollout") | sums.metrics(experience)
        episodes, tokens = global_sum(
            torch.tensor([len(rollout.responses), int(experience.response_mask.sum())], device=self.device)
        ).tolist()
        for name, amount in (("iterations", 1), ("episodes", episodes), ("tokens", tokens), ("updates", sums.steps)):
            self.counters[name] += amount
        metrics["rollout/kl_coef"] = self.kl.coef
        self.kl.update(float(metrics["rollout/kl"]), episodes)
        for group in self._optimizer().param_groups:
            metrics["train/lr" if group["name"] == "policy" else f"train/lr_{group['name']}"] = group["lr"]
        metrics |= watch.metrics(tokens) | {f"progress/{name}": float(n) for name, n in self.counters.items()}
        watched = {name: metrics.pop(name) for name in ("rollout/score", "rollout/kl")}
        self.log_dict(watched, prog_bar=True)
        self.log_dict(metrics)
        self.samples = sample_rows(rollout, experience)
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
            scheduler.step()

    def _log_once(self, metrics: dict[str, Tensor]) -> None:
        """Log what is known once; ``self.log`` would repeat it to the end of the epoch."""
        for logger in self.loggers:
            logger.log_metrics({name: float(value) for name, value in metrics.items()}, step=self.global_step)

    def _row_ids(self, batch: PromptBatch, before: int) -> list[int]:
        """Number prompts over all processes, which take turns in the data; ``before`` were this process's earlier."""
        rows = range(before, before + len(batch.prompts))
        return [row * self.trainer.world_size + self.global_rank for row in rows]

    def _optimizer(self) -> LightningOptimizer:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        return optimizer

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimizer().param_groups for parameter in group["params"]]

    def _seed(self, purpose: str) -> int:
        return derive_seed(run_seed(), purpose, self.counters["iterations"])

    def _prepare_sampler(self) -> None:
        mixed = self.trainer.precision == "bf16-mixed"
        ready_for = (self.device, torch.bfloat16 if mixed else torch.float32)
        if self._sampler_ready_for != ready_for:
            self.sampler.setup(self.policy, dtype=ready_for[1])
            self._sampler_ready_for = ready_for
        self.sampler.sync(self.policy.named_parameters(), version=self.counters["updates"])

    def _phase(self, name: str | None) -> Any:
        """Return a function that tells the progress bar how far a phase is."""
        show = getattr(self.trainer.progress_bar_callback, "phase", None)
        if name is None or show is None:
            return lambda done, total: None
        return lambda done, total: show(name, done, total)

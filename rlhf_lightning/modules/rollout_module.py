"""What a module needs whose policy answers prompts and is judged by a reward: sampling, scoring, evaluation."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from rlhf_lightning.algorithm.critics import Critic
from rlhf_lightning.data.collate import PromptBatch
from rlhf_lightning.distributed import global_sum
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import SequenceBatch, token_groups
from rlhf_lightning.models.loading import load_causal_lm, load_reference
from rlhf_lightning.models.lora import LoRA, adapted_layers, add_adapters, merged_parameters, share_frozen_weights
from rlhf_lightning.models.memory_limit import MemoryLimit
from rlhf_lightning.models.offload import OffloadedModels
from rlhf_lightning.modules.base import ModelModule
from rlhf_lightning.modules.failures import failures_saved
from rlhf_lightning.modules.ppo_report import rollout_metrics, sample_rows
from rlhf_lightning.rollout.collect import Rollout, Scorers, score_samples
from rlhf_lightning.rollout.decoding import CachedSampler
from rlhf_lightning.rollout.reward_sources import RewardSource
from rlhf_lightning.rollout.sampler import Sampler, Samples, SamplingConfig, resolve_stop_ids
from rlhf_lightning.rollout.stop_strings import resolve_stop_strings
from rlhf_lightning.seeding import derive_seed, run_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RolloutModule(ModelModule):
    """Base of the modules that learn from their own responses.

    Args:
        policy: Hugging Face folder or hub name of the model to be tuned.
        reward: Where scores come from.
        reference: Folder or hub name of the frozen reference; ``None`` takes a copy of the policy as it starts.
        critic: Where values come from; ``None`` is none.
        lora: Adapters of the policy; ``None`` trains all of it.
        sampling: What to sample.
        sampler: What samples; ``None`` is ``CachedSampler()``.
        max_tokens_per_microbatch: Tokens in one forward pass of a process.
        optimizer: Called with the parameter groups.
        lr_scheduler: Called with the optimizer.
    """

    batch_type = PromptBatch
    export_prefix = "policy."

    def __init__(
        self,
        policy: str,
        reward: RewardSource,
        *,
        reference: str | None,
        critic: Critic | None,
        lora: LoRA | None,
        sampling: SamplingConfig,
        sampler: Sampler | None,
        max_tokens_per_microbatch: int,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__(policy, optimizer, lr_scheduler)
        self.lora = lora
        given: object = reward  # from Python it may be anything
        if not isinstance(given, RewardSource):
            kind = type(given).__name__
            raise UserError(f"reward is a {kind}, not a RewardSource; of a function make one by FunctionReward(...).")
        if sampling.temperature == 0:
            raise UserError("sampling.temperature is 0; PPO needs responses drawn at random, so a value above 0.")
        self.reference_name, self.reward, self.critic = reference, reward, critic
        self.sampling, self.sampler = sampling, sampler or CachedSampler()
        self.max_tokens_per_microbatch = max_tokens_per_microbatch
        self.memory = MemoryLimit("max_tokens_per_microbatch")
        self.counters = {"iterations": 0, "episodes": 0, "tokens": 0, "updates": 0}
        self.samples: list[dict[str, Any]] = []
        self.val_samples: list[dict[str, Any]] = []
        self._sampler_ready_for: tuple[torch.device, torch.dtype] | None = None
        self._rows_evaluated = 0
        self._offloaded: OffloadedModels | None = None

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
        self.policy = add_adapters(load_causal_lm(self.model_name), self.lora)
        self.reference = load_reference(self.reference_name, self.policy)
        if self.critic is not None:
            self.critic.setup(self.model_name, self.policy)
        self.reward.setup(self.tokenizer)
        self.reward.eval().requires_grad_(False)
        if adapted_layers(self):
            share_frozen_weights(self)
        self.stop_ids = resolve_stop_ids(self.tokenizer, self.sampling.stop_tokens)
        self.stop_strings = resolve_stop_strings(self.tokenizer, self.sampling.stop_strings)

    def setup(self, stage: str) -> None:
        """Expect other weights than a copy for sampling may hold; one made in inference mode could not take them."""
        super().setup(stage)
        self._sampler_ready_for = None

    def teardown(self, stage: str) -> None:
        """Let the sampler go; the next stage sets it up anew."""
        self.sampler.close()

    def sample(
        self, batch: PromptBatch, *, seed: int, row_ids: Sequence[int], report: str | None = None
    ) -> tuple[Samples, SequenceBatch]:
        """Let the policy respond to prompts; ``sampler.release()`` is left to the caller, who may have more of them.

        Args:
            batch: Left-padded prompts.
            seed: Fixes all draws.
            row_ids: Number of each prompt among those of all processes.
            report: Name under which the progress bar shows this phase.

        Returns:
            The samples, and prompts and responses together as a ``SequenceBatch``.
        """
        self._prepare_sampler()
        training = self.policy.training
        self.policy.eval()  # in train mode one whose activations are checkpointed takes no cache
        with torch.autocast(self.device.type, enabled=False):
            samples = self.sampler.sample(
                batch.input_ids,
                batch.attention_mask,
                config=self.sampling,
                stop_ids=self.stop_ids,
                seed=seed,
                row_ids=row_ids,
                progress=self._phase(report),
                stop_strings=self.stop_strings,
            )
        self.policy.train(training)
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

        Outside of training no values are asked for.

        Args:
            batch: The prompts.
            samples: What the sampler returned.
            sequences: Both together.
            groups: Rows of each forward pass; those of the first epoch make its first ratios exactly 1.
            report: Name under which the progress bar shows this phase.
        """
        critic = self.critic if self.trainer.training else None
        with self._frozen_at_hand(), failures_saved(self):
            return score_samples(
                samples,
                sequences=sequences,
                groups=groups,
                scorers=Scorers(self.policy, self.reference, critic, self.reward, self.sampling.temperature),
                prompts=batch.prompts,
                rows=batch.rows,
                tokenizer=self.tokenizer,
                group_size=batch.group_size,
                progress=self._phase(report),
                memory=self.memory,
            )

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Log score, KL and length of responses to held-out prompts; the draws are the same each time."""
        rollout = self._evaluate(batch)
        names = ("score", "kl", "response_length", "finished_fraction", "repetition")
        metrics = rollout_metrics(rollout, prefix="val", names=names)
        # Weighted by the rows of all processes: Lightning averages the weights as whole numbers, rounded down.
        rows = int(global_sum(torch.tensor(len(batch.prompts), device=self.device)))
        self.log_dict(metrics, on_epoch=True, batch_size=rows, sync_dist=True)
        self.val_samples += sample_rows(rollout)

    def on_validation_epoch_start(self) -> None:
        """Forget the samples of the validation before, and number the prompts anew."""
        self.val_samples, self._rows_evaluated = [], 0

    def on_validation_epoch_end(self) -> None:
        """Let the sampler free what it kept from one batch to the next."""
        self.sampler.release()

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Do the same as in validation."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return prompt, response, score, KL and length of each row."""
        return sample_rows(self._evaluate(batch))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Have the frozen models at hand, of which a checkpoint holds a digest."""
        with self._frozen_at_hand():
            super().on_save_checkpoint(checkpoint)

    def _frozen_at_hand(self) -> AbstractContextManager[None]:
        return nullcontext() if self._offloaded is None else self._offloaded.at_hand()

    def _evaluate(self, batch: PromptBatch) -> Rollout:
        seed, rows = derive_seed(run_seed(), "validation"), self._row_ids(batch, self._rows_evaluated)
        self._rows_evaluated += len(rows)
        samples, sequences = self.sample(batch, seed=seed, row_ids=rows)
        groups = token_groups(sequences.lengths, self.max_tokens_per_microbatch)
        return self.score(batch, samples, sequences, groups=groups)

    def _row_ids(self, batch: PromptBatch, before: int) -> list[int]:
        """Number rows over all processes, which take turns in the prompts; ``before`` were this process's earlier."""
        places = (divmod(row, batch.group_size) for row in range(before, before + len(batch.prompts)))
        world_size, rank = self.trainer.world_size, self.global_rank
        return [(prompt * world_size + rank) * batch.group_size + place for prompt, place in places]

    def _prepare_sampler(self) -> None:
        mixed = self.trainer.precision == "bf16-mixed"
        ready_for = (self.device, torch.bfloat16 if mixed else torch.float32)
        if self._sampler_ready_for != ready_for:
            self.sampler.setup(self.policy, dtype=ready_for[1])
            self._sampler_ready_for = ready_for
        self.sampler.sync(merged_parameters(self.policy), version=self.counters["updates"])

    def _phase(self, name: str | None) -> Any:
        """Return a function that tells the progress bar how far a phase is."""
        show = getattr(self.trainer.progress_bar_callback, "phase", None)
        if name is None or show is None:
            return lambda done, total: None
        return lambda done, total: show(name, done, total)

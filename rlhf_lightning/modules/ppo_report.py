"""What a PPO iteration reports: one masked mean for each name, over all micro-batches, minibatches and processes."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_lightning.distributed import global_mean_var, global_sum, world_size
from rlhf_lightning.functional.losses import PolicyLoss, ValueLoss
from rlhf_lightning.functional.masked import masked_sum
from rlhf_lightning.functional.repetition import repeated_fraction
from rlhf_lightning.rollout.collect import Rollout

if TYPE_CHECKING:
    from rlhf_lightning.algorithm.experience import Experience

_LOSSES = ("loss", "policy_loss", "value_loss", "kl_loss")
_TOKEN_SUMS = ("ratio", "approx_kl", "clip_fraction", "guarded_fraction", "value_clip_fraction", "entropy")


class UpdateSums:
    """What an update adds up, kept on the device so that no step waits for it.

    Args:
        device: Where the sums are kept.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = {name: torch.zeros((), device=device) for name in (*_LOSSES, *_TOKEN_SUMS)}
        self.tokens = torch.zeros((), device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.minibatches = self.steps = self.taken = 0
        self.stopped_early = False

    @torch.no_grad()
    def add_micro_batch(
        self,
        loss: Tensor,
        policy_loss: PolicyLoss,
        value_loss: ValueLoss | None,
        kl_loss: Tensor | None,
        entropy: Tensor | None,
        response_mask: Tensor,
    ) -> None:
        """Add what one micro-batch reports; its losses come as its part of the minibatch's."""
        self.tokens = self.tokens + response_mask.sum()
        for name, amount in (
            ("loss", loss),
            ("policy_loss", policy_loss.loss),
            ("ratio", policy_loss.ratio_sum),
            ("approx_kl", policy_loss.approx_kl_sum),
            ("clip_fraction", policy_loss.clipped_sum),
            ("guarded_fraction", policy_loss.guarded_sum),
        ):
            self.sums[name] = self.sums[name] + amount
        if value_loss is not None:
            self.sums["value_loss"] = self.sums["value_loss"] + value_loss.loss
            self.sums["value_clip_fraction"] = self.sums["value_clip_fraction"] + value_loss.clipped_sum
        if kl_loss is not None:
            self.sums["kl_loss"] = self.sums["kl_loss"] + kl_loss
        if entropy is not None:
            self.sums["entropy"] = self.sums["entropy"] + masked_sum(entropy, response_mask)

    def mark(self) -> Callable[[], None]:
        """Return what takes back all micro-batches added after it."""
        sums, tokens = dict(self.sums), self.tokens  # of tensors that are never changed in place

        def back() -> None:
            self.sums, self.tokens = dict(sums), tokens

        return back

    @torch.no_grad()
    def add_step(self, grad_norm: Tensor | None) -> None:
        """Take note of an optimizer step by the norm of its gradient; ``None`` is a step that was skipped."""
        if grad_norm is not None:
            self.grad_norm += grad_norm
            self.taken += 1
        self.steps += 1

    def metrics(self, experience: "Experience", *, values: bool = True, kl_loss: bool = False) -> dict[str, Tensor]:
        """Return the means, losses over minibatches and all else over the tokens of all processes, by name in the log.

        Args:
            experience: What the update trained on.
            values: False leaves out what only a critic has.
            kl_loss: True tells the KL's part of the loss, where it has one.
        """
        totals = dict(
            zip([*self.sums, "tokens"], global_sum(torch.stack([*self.sums.values(), self.tokens])), strict=True)
        )
        means = {name: totals[name] / (self.minibatches * world_size()) for name in _LOSSES}
        means |= {name: totals[name] / totals["tokens"] for name in _TOKEN_SUMS}
        for name in ("ratio", "approx_kl"):  # whose sums leave out what was guarded
            means[name] = totals[name] / (totals["tokens"] - totals["guarded_fraction"])
        means["grad_norm"] = self.grad_norm / max(1, self.taken)
        means["stopped_early"] = torch.full_like(self.grad_norm, float(self.stopped_early))
        if values:
            means["explained_variance"] = explained_variance(experience)
        else:
            means = {name: mean for name, mean in means.items() if not name.startswith("value_")}
        if not kl_loss:
            del means["kl_loss"]
        return {f"train/{name}": value for name, value in means.items()}


def explained_variance(experience: "Experience") -> Tensor:
    """Return 1 - Var(returns - values) / Var(returns) over all processes: 1 is a perfect critic, 0 a constant one."""
    mask = experience.response_mask
    _, residual = global_mean_var(experience.returns - experience.old_values, mask)
    _, total = global_mean_var(experience.returns, mask)
    return 1 - residual / total


def rollout_metrics(
    rollout: Rollout, *, prefix: str, rewards: Tensor | None = None, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Return means over the responses of all processes.

    Args:
        rollout: The responses.
        rewards: Reward of each token, where it is known, shape (batch, response).
        prefix: ``rollout`` or ``val``.
        names: Those wanted; ``None`` takes all.
    """
    mask = rollout.sequences.response_mask
    gap = torch.where(mask, rollout.old_logprobs - rollout.sampler_logprobs, 0.0)
    rows = {
        "score": rollout.scores.total,
        "kl": (rollout.old_logprobs - rollout.ref_logprobs).sum(dim=1),
        "response_length": mask.sum(dim=1).float(),
        "finished_fraction": rollout.finished.float(),
        "repetition": repeated_fraction(rollout.sequences.response_tokens, mask),
        "sampler_gap": gap.abs().sum(dim=1) / mask.sum(dim=1),
    }
    if rewards is not None:
        rows["rewards"] = rewards.sum(dim=1)
    parts = rollout.scores.parts if len(rollout.scores.parts) > 1 else {}
    rows |= {f"score_{name}": part for name, part in parts.items()}
    count = torch.full((), float(len(mask)), device=mask.device)
    totals = global_sum(torch.stack([*(row.float().sum() for row in rows.values()), count]))
    means = dict(zip(rows, totals[:-1] / totals[-1], strict=True))
    # From the mean, and not as E[s²] - E[s]², which loses all digits where scores lie far from zero.
    squares = global_sum((rollout.scores.total.float() - means["score"]).square().sum())
    means["score_std"] = (squares / totals[-1]).sqrt()
    means["kl_per_token"] = means["kl"] / means["response_length"]
    return {f"{prefix}/{name}": value for name, value in means.items() if names is None or name in names}


def told_numbers(rollout: Rollout) -> dict[str, Tensor]:
    """Return all that an update learns from, by name: each score, the log-probabilities and the values."""
    scores = {f"score_{name}": part for name, part in rollout.scores.parts.items()} | {"score": rollout.scores.total}
    names = ("old_logprobs", "ref_logprobs", "old_values")
    return scores | {name: getattr(rollout, name) for name in names}


def sample_rows(rollout: Rollout) -> list[dict[str, Any]]:
    """Return prompt, response, score, KL (nats), length (tokens) and finished flag of each response, as plain data."""
    kl = (rollout.old_logprobs - rollout.ref_logprobs).sum(dim=1).tolist()
    lengths = rollout.sequences.response_lengths.tolist()
    columns = (
        rollout.prompts,
        rollout.responses,
        rollout.scores.total.tolist(),
        kl,
        lengths,
        rollout.finished.tolist(),
    )
    keys = ("prompt", "response", "score", "kl", "length", "finished")
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


class Stopwatch:
    """Seconds of each phase of an iteration.

    Args:
        device: A CUDA device is waited for, so that its work is counted where it was asked for.
        profiler: Lightning's profiler, which is told of the phases too.
    """

    def __init__(self, device: torch.device, profiler: Any = None) -> None:
        self.device, self.seconds, self.profiler = device, dict[str, float](), profiler

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time what happens inside."""
        start = self._now()
        try:
            with contextlib.nullcontext() if self.profiler is None else self.profiler.profile(f"ppo/{phase}"):
                yield
        finally:
            self.seconds[phase] = self._now() - start

    def metrics(self, tokens: int) -> dict[str, float]:
        """Return the seconds of each phase and the response tokens a second of the whole iteration."""
        times = {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
        return times | {"time/tokens_per_s": tokens / sum(self.seconds.values())}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

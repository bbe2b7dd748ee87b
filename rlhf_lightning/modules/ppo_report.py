"""What a PPO iteration reports: one masked mean for each name, over all micro-batches, minibatches and processes."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_lightning.distributed import global_mean_var, global_sum
from rlhf_lightning.functional.losses import PolicyLoss, ValueLoss
from rlhf_lightning.functional.masked import masked_sum
from rlhf_lightning.rollout.collect import Rollout

if TYPE_CHECKING:
    from rlhf_lightning.algorithm.experience import Experience

_SUMS = ("loss", "policy_loss", "value_loss", "ratio", "approx_kl", "clip_fraction", "value_clip_fraction", "entropy")


class UpdateSums:
    """Sums over the tokens of an update, kept on the device so that no step waits for them.

    Args:
        device: Where they are kept.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = {name: torch.zeros((), device=device) for name in _SUMS}
        self.tokens = torch.zeros((), device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.steps = 0

    @torch.no_grad()
    def add_micro_batch(
        self,
        loss: Tensor,
        policy_loss: PolicyLoss,
        value_loss: ValueLoss,
        entropy: Tensor | None,
        num_tokens: Tensor,
        response_mask: Tensor,
    ) -> None:
        """Add what one micro-batch reports; losses come divided by ``num_tokens`` and are multiplied back."""
        self.tokens += response_mask.sum()
        for name, amount in (
            ("loss", loss * num_tokens),
            ("policy_loss", policy_loss.loss * num_tokens),
            ("value_loss", value_loss.loss * num_tokens),
            ("ratio", policy_loss.ratio_sum),
            ("approx_kl", policy_loss.approx_kl_sum),
            ("clip_fraction", policy_loss.clipped_sum),
            ("value_clip_fraction", value_loss.clipped_sum),
        ):
            self.sums[name] += amount
        if entropy is not None:
            self.sums["entropy"] += masked_sum(entropy, response_mask)

    @torch.no_grad()
    def add_step(self, grad_norm: Tensor) -> None:
        """Take note of an optimizer step, or of one that was skipped for a gradient that is not finite."""
        finite = torch.isfinite(grad_norm)
        self.grad_norm += torch.where(finite, grad_norm, 0.0)
        self.skipped += (~finite).float()
        self.steps += 1

    def metrics(self, experience: "Experience") -> dict[str, Tensor]:
        """Return the means over all tokens of all processes, under their names in the log."""
        totals = global_sum(torch.stack([*self.sums.values(), self.tokens]))
        means = dict(zip(self.sums, totals[:-1] / totals[-1], strict=True))
        means["grad_norm"] = self.grad_norm / (self.steps - self.skipped).clamp(min=1)
        means["skipped_steps"] = self.skipped
        means["explained_variance"] = explained_variance(experience)
        return {f"train/{name}": value for name, value in means.items()}


def explained_variance(experience: "Experience") -> Tensor:
    """Return 1 - Var(returns - values) / Var(returns) over all processes: 1 is a perfect critic, 0 a constant one."""
    mask = experience.response_mask
    _, residual = global_mean_var(experience.returns - experience.old_values, mask)
    _, total = global_mean_var(experience.returns, mask)
    return 1 - residual / total


def rollout_metrics(
    rollout: Rollout, experience: "Experience", *, prefix: str, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Return means over the responses of all processes.

    Args:
        rollout: The responses.
        experience: Their KL and rewards.
        prefix: ``rollout`` or ``val``.
        names: Those wanted; ``None`` takes all.
    """
    mask = experience.response_mask
    gap = torch.where(mask, rollout.old_logprobs - rollout.sampler_logprobs, 0.0)
    rows = {
        "score": rollout.scores.total,
        "score_squared": rollout.scores.total.square(),
        "rewards": experience.rewards.sum(dim=1),
        "kl": (rollout.old_logprobs - rollout.ref_logprobs).sum(dim=1),
        "response_length": mask.sum(dim=1).float(),
        "finished_fraction": rollout.finished.float(),
        "sampler_gap": gap.abs().sum(dim=1) / mask.sum(dim=1),
    }
    parts = rollout.scores.parts if len(rollout.scores.parts) > 1 else {}
    rows |= {f"score_{name}": part for name, part in parts.items()}
    count = torch.full((), float(len(mask)), device=mask.device)
    totals = global_sum(torch.stack([*(row.float().sum() for row in rows.values()), count]))
    means = dict(zip(rows, totals[:-1] / totals[-1], strict=True))
    means["score_std"] = (means.pop("score_squared") - means["score"].square()).clamp(min=0).sqrt()
    means["kl_per_token"] = means["kl"] / means["response_length"]
    return {f"{prefix}/{name}": value for name, value in means.items() if names is None or name in names}


def sample_rows(rollout: Rollout, experience: "Experience") -> list[dict[str, Any]]:
    """Return prompt, response, score, KL (nats), length (tokens) and finished flag of each response, as plain data."""
    kl = (rollout.old_logprobs - rollout.ref_logprobs).sum(dim=1).tolist()
    lengths = experience.response_mask.sum(dim=1).tolist()
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

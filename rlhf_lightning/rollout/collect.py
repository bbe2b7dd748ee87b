"""One rollout: prompts in, all that an update needs out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.models.causal_lm import response_logprobs, response_pass
from rlhf_lightning.models.memory_limit import MemoryLimit
from rlhf_lightning.rollout.reward_sources import Prompt, RewardSource, Scores, ScoringBatch
from rlhf_lightning.rollout.sampler import Progress, Samples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rollout:
    """Responses with everything that was computed before the first step; tensors are on the device.

    Attributes:
        sequences: Prompts and responses.
        finished: True where the response stopped by itself, shape (batch,), bool.
        scores: What the reward source says of each response.
        old_logprobs: By the policy that sampled, teacher-forced, nats, shape (batch, response).
        ref_logprobs: By the reference, shape (batch, response).
        old_values: By the critic, shape (batch, response); zeros where there is none.
        sampler_logprobs: What the sampler itself reports, shape (batch, response); a diagnostic.
        prompts: As text or chat messages.
        responses: As text.
        group_size: Responses to each prompt, which stand together.
    """

    sequences: SequenceBatch
    finished: Tensor
    scores: Scores
    old_logprobs: Tensor
    ref_logprobs: Tensor
    old_values: Tensor
    sampler_logprobs: Tensor
    prompts: list[Prompt]
    responses: list[str]
    group_size: int = 1


@dataclass(frozen=True)
class Scorers:
    """The models that look at a rollout.

    Attributes:
        policy: The policy that sampled.
        reference: Its frozen start.
        critic: Anything with ``values(SequenceBatch, ResponsePass)``, or ``None``.
        reward: The reward source.
        temperature: Divides the logits of policy and reference.
    """

    policy: nn.Module
    reference: nn.Module
    critic: Any
    reward: RewardSource
    temperature: float


@torch.no_grad()
def score_samples(
    samples: Samples,
    *,
    sequences: SequenceBatch,
    groups: Sequence[Tensor],
    scorers: Scorers,
    prompts: list[Prompt],
    rows: list[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    group_size: int = 1,
    progress: Progress | None = None,
    memory: MemoryLimit | None = None,
) -> Rollout:
    """Compute old, reference and critic outputs on the real tokens, and the scores.

    Args:
        samples: What the sampler returned.
        sequences: Prompts and samples together.
        groups: Rows of each forward pass; together all rows, each once.
        scorers: The models.
        prompts: As text or chat messages.
        rows: The other columns of each prompt's row.
        tokenizer: The policy's; turns responses into text without special tokens.
        group_size: Responses to each prompt, which stand together.
        progress: Called with rows done and rows in all.
        memory: Cuts groups smaller where memory runs out; ``None`` does so for these alone.
    """
    mask = sequences.response_mask
    old, ref, values = (torch.zeros(mask.shape, device=mask.device) for _ in range(3))
    done = 0

    def read(group: Tensor) -> None:
        nonlocal done
        part = sequences.select(group)
        width = int(part.response_lengths.max())
        policy_pass = response_pass(scorers.policy, part, temperature=scorers.temperature)
        old[group, :width] = policy_pass.logprobs
        ref[group, :width] = response_logprobs(scorers.reference, part, temperature=scorers.temperature)
        if scorers.critic is not None:
            values[group, :width] = scorers.critic.values(part, policy_pass)
        done += len(group)
        if progress is not None:
            progress(done, len(mask))

    (memory or MemoryLimit("groups")).each(groups, sequences.lengths, read)
    responses = decode_responses(tokenizer, sequences)
    scores = scorers.reward.score(ScoringBatch(sequences, samples.finished, prompts, responses, rows))
    return Rollout(
        sequences=sequences,
        finished=samples.finished,
        scores=scores,
        old_logprobs=old,
        ref_logprobs=ref,
        old_values=values,
        sampler_logprobs=samples.logprobs,
        prompts=prompts,
        responses=responses,
        group_size=group_size,
    )


def decode_responses(tokenizer: "PreTrainedTokenizerBase", sequences: SequenceBatch) -> list[str]:
    """Return the responses as text, without special tokens."""
    pairs = zip(sequences.response_tokens.tolist(), sequences.response_lengths.tolist(), strict=True)
    return tokenizer.batch_decode([tokens[:length] for tokens, length in pairs], skip_special_tokens=True)

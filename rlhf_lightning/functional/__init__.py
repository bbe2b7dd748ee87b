"""Pure tensor maths: every formula of the package as a function of tensors and numbers."""

from rlhf_lightning.functional.advantages import gae
from rlhf_lightning.functional.kl import kl_k1, kl_k2, kl_k3
from rlhf_lightning.functional.logprobs import entropy_from_logits, logprobs_from_logits
from rlhf_lightning.functional.losses import ppo_policy_loss, ppo_value_loss, preference_loss
from rlhf_lightning.functional.masked import masked_mean, masked_sum, masked_var, whiten
from rlhf_lightning.functional.rewards import (
    clip_scores,
    merge_moments,
    missing_eos_penalty,
    missing_eos_score,
    normalize_scores,
    token_rewards,
)
from rlhf_lightning.functional.sequences import (
    SequenceBatch,
    first_true_index,
    length_mask,
    pad_sequences,
    position_ids_from_mask,
    response_lengths,
)

__all__ = [
    "SequenceBatch",
    "clip_scores",
    "entropy_from_logits",
    "first_true_index",
    "gae",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "length_mask",
    "logprobs_from_logits",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "merge_moments",
    "missing_eos_penalty",
    "missing_eos_score",
    "normalize_scores",
    "pad_sequences",
    "position_ids_from_mask",
    "ppo_policy_loss",
    "ppo_value_loss",
    "preference_loss",
    "response_lengths",
    "token_rewards",
    "whiten",
]

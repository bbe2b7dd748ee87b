"""RLHF for people who work with PyTorch Lightning and Hugging Face."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_lightning.algorithm.advantages import GAE
    from rlhf_lightning.algorithm.critics import SeparateCritic
    from rlhf_lightning.algorithm.kl import AdaptiveKL, FixedKL
    from rlhf_lightning.algorithm.objectives import ClippedObjective, ClippedValueObjective
    from rlhf_lightning.data.preferences import PreferenceDataModule
    from rlhf_lightning.data.prompts import PromptDataModule
    from rlhf_lightning.data.text import DemonstrationDataModule
    from rlhf_lightning.modules.ppo import PPOModule
    from rlhf_lightning.modules.reward import RewardModule
    from rlhf_lightning.modules.sft import SFTModule
    from rlhf_lightning.rollout.decoding import CachedSampler, TransformersSampler
    from rlhf_lightning.rollout.reward_sources import FunctionReward, RewardModel, RewardSource, WeightedSum
    from rlhf_lightning.rollout.sampler import SamplingConfig

__version__ = "0.1.0"

# Imported when first asked for: `import rlhf_lightning` itself must not wait for torch.
_HOMES = {
    "GAE": "algorithm.advantages",
    "SeparateCritic": "algorithm.critics",
    "AdaptiveKL": "algorithm.kl",
    "FixedKL": "algorithm.kl",
    "ClippedObjective": "algorithm.objectives",
    "ClippedValueObjective": "algorithm.objectives",
    "PreferenceDataModule": "data.preferences",
    "PromptDataModule": "data.prompts",
    "DemonstrationDataModule": "data.text",
    "PPOModule": "modules.ppo",
    "RewardModule": "modules.reward",
    "SFTModule": "modules.sft",
    "CachedSampler": "rollout.decoding",
    "TransformersSampler": "rollout.decoding",
    "FunctionReward": "rollout.reward_sources",
    "RewardModel": "rollout.reward_sources",
    "RewardSource": "rollout.reward_sources",
    "WeightedSum": "rollout.reward_sources",
    "SamplingConfig": "rollout.sampler",
}

__all__ = [
    "GAE",
    "AdaptiveKL",
    "CachedSampler",
    "ClippedObjective",
    "ClippedValueObjective",
    "DemonstrationDataModule",
    "FixedKL",
    "FunctionReward",
    "PPOModule",
    "PreferenceDataModule",
    "PromptDataModule",
    "RewardModel",
    "RewardModule",
    "RewardSource",
    "SFTModule",
    "SamplingConfig",
    "SeparateCritic",
    "TransformersSampler",
    "WeightedSum",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

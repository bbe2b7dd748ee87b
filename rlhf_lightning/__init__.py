"""RLHF for people who work with PyTorch Lightning and Hugging Face."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_lightning.algorithm.advantages import GAE, AdvantageEstimator, GlobalBaseline, GroupRelative, LeaveOneOut
    from rlhf_lightning.algorithm.critics import Critic, SeparateCritic, TrunkCritic
    from rlhf_lightning.algorithm.kl import AdaptiveKL, FixedKL
    from rlhf_lightning.algorithm.objectives import (
        ClippedObjective,
        ClippedValueObjective,
        FixedLength,
        SequenceMean,
        TokenMean,
    )
    from rlhf_lightning.algorithm.preference_losses import (
        HingeLoss,
        IPOLoss,
        PreferenceLoss,
        RobustLoss,
        SigmoidLoss,
    )
    from rlhf_lightning.algorithm.score_transforms import (
        MissingEOSPenalty,
        MissingEOSScore,
        RunningNormalization,
        ScoreClip,
        ScoreTransform,
    )
    from rlhf_lightning.data.preferences import PreferenceDataModule
    from rlhf_lightning.data.prompts import PromptDataModule
    from rlhf_lightning.data.text import DemonstrationDataModule
    from rlhf_lightning.data.unpaired import UnpairedDataModule
    from rlhf_lightning.evaluation.answer_sets import LikelihoodSet, PairSet
    from rlhf_lightning.evaluation.likelihood import evaluate_likelihood
    from rlhf_lightning.evaluation.pair_margins import evaluate_pairs
    from rlhf_lightning.evaluation.reward_pairs import evaluate_rewards
    from rlhf_lightning.models.lora import LoRA
    from rlhf_lightning.modules.dpo import DPOModule
    from rlhf_lightning.modules.kto import KTOModule
    from rlhf_lightning.modules.ppo import PPOModule
    from rlhf_lightning.modules.rating import RatingModule
    from rlhf_lightning.modules.reward import RewardModule
    from rlhf_lightning.modules.sft import SFTModule
    from rlhf_lightning.rollout.decoding import CachedSampler, TransformersSampler
    from rlhf_lightning.rollout.reward_model import RewardModel
    from rlhf_lightning.rollout.reward_sources import FunctionReward, RewardSource, TokenFunctionReward, WeightedSum
    from rlhf_lightning.rollout.sampler import SamplingConfig

__version__ = "0.1.0"

# Imported when first asked for: `import rlhf_lightning` itself must not wait for torch.
_HOMES = {
    "AdvantageEstimator": "algorithm.advantages",
    "GAE": "algorithm.advantages",
    "GlobalBaseline": "algorithm.advantages",
    "GroupRelative": "algorithm.advantages",
    "LeaveOneOut": "algorithm.advantages",
    "Critic": "algorithm.critics",
    "SeparateCritic": "algorithm.critics",
    "TrunkCritic": "algorithm.critics",
    "AdaptiveKL": "algorithm.kl",
    "FixedKL": "algorithm.kl",
    "ClippedObjective": "algorithm.objectives",
    "ClippedValueObjective": "algorithm.objectives",
    "FixedLength": "algorithm.objectives",
    "SequenceMean": "algorithm.objectives",
    "TokenMean": "algorithm.objectives",
    "HingeLoss": "algorithm.preference_losses",
    "IPOLoss": "algorithm.preference_losses",
    "PreferenceLoss": "algorithm.preference_losses",
    "RobustLoss": "algorithm.preference_losses",
    "SigmoidLoss": "algorithm.preference_losses",
    "MissingEOSPenalty": "algorithm.score_transforms",
    "MissingEOSScore": "algorithm.score_transforms",
    "RunningNormalization": "algorithm.score_transforms",
    "ScoreClip": "algorithm.score_transforms",
    "ScoreTransform": "algorithm.score_transforms",
    "PreferenceDataModule": "data.preferences",
    "PromptDataModule": "data.prompts",
    "DemonstrationDataModule": "data.text",
    "UnpairedDataModule": "data.unpaired",
    "LikelihoodSet": "evaluation.answer_sets",
    "PairSet": "evaluation.answer_sets",
    "evaluate_likelihood": "evaluation.likelihood",
    "evaluate_pairs": "evaluation.pair_margins",
    "evaluate_rewards": "evaluation.reward_pairs",
    "LoRA": "models.lora",
    "DPOModule": "modules.dpo",
    "KTOModule": "modules.kto",
    "PPOModule": "modules.ppo",
    "RatingModule": "modules.rating",
    "RewardModule": "modules.reward",
    "SFTModule": "modules.sft",
    "CachedSampler": "rollout.decoding",
    "TransformersSampler": "rollout.decoding",
    "FunctionReward": "rollout.reward_sources",
    "RewardModel": "rollout.reward_model",
    "RewardSource": "rollout.reward_sources",
    "TokenFunctionReward": "rollout.reward_sources",
    "WeightedSum": "rollout.reward_sources",
    "SamplingConfig": "rollout.sampler",
}

__all__ = [
    "GAE",
    "AdaptiveKL",
    "AdvantageEstimator",
    "CachedSampler",
    "ClippedObjective",
    "ClippedValueObjective",
    "Critic",
    "DPOModule",
    "DemonstrationDataModule",
    "FixedKL",
    "FixedLength",
    "FunctionReward",
    "GlobalBaseline",
    "GroupRelative",
    "HingeLoss",
    "IPOLoss",
    "KTOModule",
    "LeaveOneOut",
    "LikelihoodSet",
    "LoRA",
    "MissingEOSPenalty",
    "MissingEOSScore",
    "PPOModule",
    "PairSet",
    "PreferenceDataModule",
    "PreferenceLoss",
    "PromptDataModule",
    "RatingModule",
    "RewardModel",
    "RewardModule",
    "RewardSource",
    "RobustLoss",
    "RunningNormalization",
    "SFTModule",
    "SamplingConfig",
    "ScoreClip",
    "ScoreTransform",
    "SeparateCritic",
    "SequenceMean",
    "SigmoidLoss",
    "TokenFunctionReward",
    "TokenMean",
    "TransformersSampler",
    "TrunkCritic",
    "UnpairedDataModule",
    "WeightedSum",
    "evaluate_likelihood",
    "evaluate_pairs",
    "evaluate_rewards",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

"""What happens beside training: progress, samples, charts, guards, predictions and the exported model."""

from rlhf_lightning.callbacks.charts import ChartLayout
from rlhf_lightning.callbacks.collapse import KLBudget, LengthDrift, RepetitionGuard, RewardDivergence
from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.callbacks.likelihood import EvaluateLikelihood
from rlhf_lightning.callbacks.predictions import PredictionFile
from rlhf_lightning.callbacks.progress import PhaseProgressBar
from rlhf_lightning.callbacks.samples import SampleTable
from rlhf_lightning.callbacks.summary import ModelLine
from rlhf_lightning.callbacks.unfinished import UnfinishedWarning

__all__ = [
    "ChartLayout",
    "EvaluateLikelihood",
    "ExportModel",
    "KLBudget",
    "LengthDrift",
    "ModelLine",
    "PhaseProgressBar",
    "PredictionFile",
    "RepetitionGuard",
    "RewardDivergence",
    "SampleTable",
    "UnfinishedWarning",
]

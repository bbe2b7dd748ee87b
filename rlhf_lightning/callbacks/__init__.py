"""What happens beside training: progress, samples, charts and the exported model."""

from rlhf_lightning.callbacks.charts import ChartLayout
from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.callbacks.progress import PhaseProgressBar
from rlhf_lightning.callbacks.samples import SampleTable

__all__ = ["ChartLayout", "ExportModel", "PhaseProgressBar", "SampleTable"]

"""What the modules share: a tokenizer, plain Hugging Face folders out, checkpoints that need no other file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from rlhf_lightning.models.export import CHECKPOINT_KEY, pack_model, write_model_folder
from rlhf_lightning.models.loading import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelModule(LightningModule):
    """Base of the modules that train one model to be exported.

    Args:
        model_name: Folder or hub name that the tokenizer comes from.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimizer, stepped once a training step; ``None`` keeps the learning rate.
    """

    #: Where the exported model's weights stand in the state dict.
    export_prefix: str

    def __init__(self, model_name: str, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
        super().__init__()
        self.model_name = model_name
        self.optimizer_factory, self.lr_scheduler_factory = optimizer, lr_scheduler
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.model_name)
        return self._tokenizer

    @property
    def exported_model(self) -> "PreTrainedModel":
        """The model that this module trains, as transformers knows it."""
        raise NotImplementedError

    def frozen_modules(self) -> dict[str, nn.Module]:
        """Return the sub-modules that are never trained, by attribute name; they stay out of checkpoints."""
        return {}

    def export_model(self, directory: str | Path) -> None:
        """Write the trained model as a Hugging Face folder.

        Args:
            directory: Folder to write into.
        """
        self.configure_model()
        write_model_folder(directory, self.exported_model, self.tokenizer)

    def train(self, mode: bool = True) -> "ModelModule":
        """Set the mode; frozen models stay in eval mode."""
        super().train(mode)
        for module in self.frozen_modules().values():
            module.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen models out, and add what an export needs."""
        prefixes = tuple(f"{name}." for name in self.frozen_modules())
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if not key.startswith(prefixes)}
        checkpoint[CHECKPOINT_KEY] = pack_model(self.export_prefix, self.exported_model, self.tokenizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the frozen models' own weights back, so that loading stays strict."""
        for name, module in self.frozen_modules().items():
            for key, value in module.state_dict().items():
                checkpoint["state_dict"][f"{name}.{key}"] = value

    def configure_optimizers(self) -> Any:
        """Build the optimizer over the trainable parameters, and the schedule."""
        return self._with_schedule(self.optimizer_factory([p for p in self.parameters() if p.requires_grad]))

    def _with_schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        if self.lr_scheduler_factory is None:
            return optimizer
        scheduler = self.lr_scheduler_factory(optimizer)
        if hasattr(scheduler, "set_total_steps"):
            scheduler.set_total_steps(int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _log_learning_rate(self) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        self.log("train/lr", optimizer.param_groups[0]["lr"])

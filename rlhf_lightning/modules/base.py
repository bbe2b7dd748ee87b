"""What the modules share: a tokenizer, plain Hugging Face folders out, checkpoints that need no other file."""

import hashlib
import logging
import re
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from lightning import LightningModule
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from rlhf_lightning.checkpoint_files import CHECKPOINT_KEY, check_file, refuse_newer_format
from rlhf_lightning.distributed import world_size
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.models.export import pack_model, write_model_folder
from rlhf_lightning.models.gradients import adding_in_place
from rlhf_lightning.models.loading import load_config, load_tokenizer
from rlhf_lightning.models.lora import adapter_settings, describe_adapters
from rlhf_lightning.models.packed import checkpoint_trained_models
from rlhf_lightning.modules.data_checks import check_batch, check_data
from rlhf_lightning.modules.nonfinite import (
    NonFiniteSteps,
    SkippedStepsLog,
    gradient_norm,
    refuse_nonfinite,
    trained_weights,
)
from rlhf_lightning.modules.restarts import count_begun_epoch
from rlhf_lightning.modules.training_record import training_record

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("rlhf_lightning")


class ModelModule(LightningModule):
    """Base of the modules that train one model to be exported.

    Args:
        model_name: Folder or hub name that the tokenizer comes from.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimizer, stepped once a training step; ``None`` keeps the learning rate.
    """

    #: Class of the batches that it reads.
    batch_type: type
    #: Whether it makes use of how much better the chosen response of a pair is.
    uses_margins = False
    #: Whether activations are computed again backwards.
    gradient_checkpointing = False
    #: Where the exported model's weights stand in the state dict.
    export_prefix: str

    def __init__(self, model_name: str, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
        super().__init__()
        self.model_name = model_name
        self.optimizer_factory, self.lr_scheduler_factory = optimizer, lr_scheduler
        self.nonfinite = NonFiniteSteps()
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

    def start_config(self) -> "PretrainedConfig":
        """Return the config of the model that is to be trained, without loading its weights."""
        return load_config(self.model_name)

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Self:
        """Make a module with the weights of a checkpoint, as Lightning does; objects are to be given again.

        Raises:
            UserError: If the file is damaged, or an argument is missing that checkpoints do not hold, such as the
                reward of a PPOModule.
        """
        path = kwargs.get("checkpoint_path", args[0] if args else None)
        if isinstance(path, str | Path) and "://" not in str(path) and not Path(path).is_dir():
            check_file(Path(path))
        try:
            return super().load_from_checkpoint(*args, **kwargs)
        except TypeError as refusal:
            missing = re.findall(r"'(\w+)'", str(refusal)) if "required positional argument" in str(refusal) else []
            if not missing:
                raise
            raise UserError(
                f"{cls.__name__}.load_from_checkpoint: a checkpoint does not hold {' and '.join(missing)}; give it "
                f"again: load_from_checkpoint(path, {', '.join(f'{name}=...' for name in missing)})."
            ) from refusal

    def setup(self, stage: str) -> None:
        """Refuse data that this module cannot read, before its weights are loaded."""
        check_data(self, getattr(self.trainer, "datamodule", None))
        if type(self).frozen_modules is not ModelModule.frozen_modules:
            # Lightning asks whether modules in eval mode are meant to be so: these are.
            warnings.filterwarnings("ignore", message="Found .* module\\(s\\) in eval mode")

    def on_fit_start(self) -> None:
        """Set up the checkpointing of activations, and say where steps will be lost in the weights' rounding.

        Raises:
            UserError: If a weight, trained or frozen, is not finite.
        """
        refuse_nonfinite(
            self.state_dict(),
            "{} before training; the model folder or checkpoint that it comes from is damaged, or its training has "
            "diverged. Give another.",
        )
        self.nonfinite.begin()
        if self.gradient_checkpointing:
            checkpoint_trained_models(self)
        if str(self.trainer.precision) in ("bf16-true", "16-true"):
            log.warning(
                "trainer.precision is %s: weights of so few digits round small steps to nothing (AdamW's at 1e-6 move "
                "0.4 %% of them); bf16-mixed keeps them in float32.",
                self.trainer.precision,
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Refuse a batch of another kind before it ends in an error further down, and put Lightning's counts right."""
        check_batch(self, batch)
        count_begun_epoch(self.trainer)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass; large gradients are added where they arise, unless processes exchange them."""
        with adding_in_place() if world_size() == 1 else nullcontext():
            super().backward(loss, *args, **kwargs)

    def on_before_backward(self, loss: Tensor) -> None:
        """Take note of the loss."""
        self.nonfinite.watch(loss)

    def configure_callbacks(self) -> list[Callback]:
        """Have the number of skipped steps logged."""
        return [SkippedStepsLog()]

    def on_train_end(self) -> None:
        """Refuse to end well a run in which no step was taken, or whose last one ended in weights that are not finite.

        Raises:
            UserError: In that case; no model is exported then.
        """
        self.nonfinite.refuse_nothing_learnt()
        self.nonfinite.refuse_weights(self)

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

    def training_record(self) -> dict[str, Any]:
        """Return what a card tells of the run beside its config; nothing without a Trainer or an exported model."""
        has_model = type(self).exported_model is not ModelModule.exported_model
        return training_record(self) if has_model and self._trainer is not None else {}

    def texts(self, batch: SequenceBatch) -> tuple[list[str], list[str]]:
        """Return prompt and response of each row as the model reads them, special tokens included."""
        prompts, responses = [], []
        rows = zip(batch.input_ids.tolist(), batch.prompt_lengths.tolist(), batch.lengths.tolist(), strict=True)
        for ids, prompt_length, length in rows:
            prompts.append(str(self.tokenizer.decode(ids[:prompt_length])))
            responses.append(str(self.tokenizer.decode(ids[prompt_length:length])))
        return prompts, responses

    def train(self, mode: bool = True) -> "ModelModule":
        """Set the mode; frozen models stay in eval mode."""
        super().train(mode)
        for module in self.frozen_modules().values():
            module.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen models out, and add what an export needs.

        Raises:
            UserError: If a weight is not finite, so that no such checkpoint takes the place of a good one.
        """
        refuse_nonfinite(
            trained_weights(self),
            f"{{}} after {checkpoint['global_step']} steps, so no checkpoint is written; lower the learning rate or "
            "clip the gradients, and go on from the one before.",
        )
        state, prefixes = checkpoint["state_dict"], self._frozen_prefixes()
        checkpoint["state_dict"] = {key: value for key, value in state.items() if not key.startswith(prefixes)}
        packed = pack_model(self.export_prefix, self.exported_model, self.tokenizer)
        frozen = {name: fingerprint(module) for name, module in self.frozen_modules().items()}
        checkpoint[CHECKPOINT_KEY] = packed | {
            "frozen": frozen,
            "adapters": adapter_settings(self),
            "module": type(self).__name__,
            "nonfinite_steps": self.nonfinite.count,
            "record": self.training_record(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the frozen models' own weights back, so that loading stays strict.

        Raises:
            UserError: If the checkpoint holds other tensors than this module or was written by a newer version of this
                package, or a fit would be taken up beside other frozen models than it began with.
        """
        if CHECKPOINT_KEY not in checkpoint:
            raise UserError("the checkpoint was not written by rlhf_lightning; give one of a run's checkpoints/.")
        refuse_newer_format(checkpoint)
        self._refuse_other_adapters(checkpoint[CHECKPOINT_KEY].get("adapters", {}))
        self.nonfinite.count = checkpoint[CHECKPOINT_KEY].get("nonfinite_steps", 0)
        for name, module in self.frozen_modules().items():
            for key, value in module.state_dict().items():
                checkpoint["state_dict"][f"{name}.{key}"] = value
        if self.strict_loading:
            self._refuse_other_tensors(checkpoint["state_dict"])
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._refuse_other_frozen(checkpoint[CHECKPOINT_KEY]["frozen"])
        self._refuse_other_shared(checkpoint["state_dict"])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, or forget gradients that are not finite: without one, an optimizer leaves weight and moments alone.

        Lightning calls this last before each step, also where nothing is to be clipped. Norms are clipped here, as it
        refuses fused optimizers under bf16-mixed, for the sake of float16. The latter's loss scale overflows now and
        then, and its scaler skips such steps itself; of them only the loss is looked at.
        """
        plugin, by_norm = self.trainer.precision_plugin, gradient_clip_algorithm in (None, "norm")
        scaled = getattr(plugin, "scaler", None) is not None
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.zeros((), device=self.device) if scaled else gradient_norm(parameters)
        admitted = self.nonfinite.admits(norm, self)
        if scaled or (admitted and not (by_norm and type(plugin) in (Precision, MixedPrecision))):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif not admitted:
            for parameter in parameters:
                parameter.grad = None
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def configure_optimizers(self) -> Any:
        """Build the optimizer over the trainable parameters, and the schedule."""
        return self._optimizer_of([p for p in self.parameters() if p.requires_grad])

    def _optimizer_of(self, parameters: list[Any]) -> Any:
        """Build the optimizer over parameters, or groups of them, and the schedule."""
        try:
            optimizer = self.optimizer_factory(parameters)
        except (TypeError, ValueError) as refusal:
            raise UserError(f"the optimizer refuses its arguments: {refusal}.") from refusal
        if self.lr_scheduler_factory is None:
            return optimizer
        scheduler = self.lr_scheduler_factory(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UserError(
                "lr_scheduler is ReduceLROnPlateau, which waits for a metric; take one that goes by steps, such as "
                "LinearDecay."
            )
        if hasattr(scheduler, "set_total_steps"):
            scheduler.set_total_steps(self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _frozen_prefixes(self) -> tuple[str, ...]:
        return tuple(f"{name}." for name in self.frozen_modules())

    def _refuse_other_adapters(self, loaded: dict[str, list[float]]) -> None:
        own = adapter_settings(self)
        if own != loaded:
            raise UserError(
                f"the checkpoint was trained with {describe_adapters(loaded)}, but this {type(self).__name__} has "
                f"{describe_adapters(own)}; give it the same lora."
            )

    def _refuse_other_frozen(self, fingerprints: dict[str, str]) -> None:
        for name, module in self.frozen_modules().items():
            if fingerprints.get(name) != fingerprint(module):
                raise UserError(
                    f"the {name} is not the one that the checkpoint was trained with; resume with the same models, or "
                    "start a new run from the exported model folder."
                )

    def _refuse_other_tensors(self, loaded: dict[str, Tensor]) -> None:
        own = self.state_dict()
        shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (own, loaded)]
        wrong = [name for name in {**own, **loaded} if shapes[0].get(name) != shapes[1].get(name)]
        if wrong:
            raise UserError(
                f"the checkpoint does not fit this {type(self).__name__}: {len(wrong)} tensors are missing, unknown or "
                f"of another shape, such as {wrong[0]!r}; give one that was written with the same module and models."
            )

    def _refuse_other_shared(self, loaded: dict[str, Tensor]) -> None:
        """Refuse what would load one set of weights, which models share here, with different numbers."""
        groups: dict[int, list[str]] = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            groups.setdefault(id(tensor), []).append(name)
        for first, *others in groups.values():
            for other in others:
                if not {first, other} <= loaded.keys() or torch.equal(loaded[first].cpu(), loaded[other].cpu()):
                    continue
                raise UserError(
                    f"{first} and {other} share weights here, but differ in the checkpoint; it was trained with other "
                    "models, give it those."
                )

    def _log_learning_rate(self) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        self.log("train/lr", optimizer.param_groups[0]["lr"])


def fingerprint(module: nn.Module) -> str:
    """Return a digest of a module's weights: their names, shapes and the sums of their bits, the same on any device.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> fingerprint(layer) == fingerprint(layer), fingerprint(layer) == fingerprint(nn.Linear(2, 2))
        (True, False)
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        bits = tensor.detach().flatten().view(integers[tensor.element_size()]).sum(dtype=torch.int64)
        digest.update(f"{name} {tuple(tensor.shape)} {int(bits)};".encode())
    return digest.hexdigest()

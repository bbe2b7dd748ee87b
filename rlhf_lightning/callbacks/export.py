"""The trained model as a folder that is whole or not there."""

import logging
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from rlhf_lightning.checkpoint_files import sync_to_disk
from rlhf_lightning.errors import UserError

logger = logging.getLogger("rlhf_lightning")


class ExportModel(pl.Callback):
    """Writes the trained model as a Hugging Face folder when ``fit`` ends well.

    The folder is written under another name beside it and then renamed, so that whoever sees it sees all of it; an
    earlier one stays until the new one is complete. Nothing is written after an error, an interruption or a
    ``fast_dev_run``: that the folder is there says that the run is complete. Beside the model stands its card,
    ``README.md``, with the settings and curves of the run.

    Args:
        directory: Where to write, relative to the run's folder (``trainer.default_root_dir``).
    """

    def __init__(self, directory: str = "model") -> None:
        self.directory = directory

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that there will be something to export, before any time is spent, and put right what a kill left.

        Raises:
            UserError: If the module has no ``export_model``.
        """
        if stage != "fit":
            return
        if not callable(getattr(pl_module, "export_model", None)):
            name = type(pl_module).__name__
            msg = f"ExportModel: {name} has no method export_model(directory); write one or remove the callback."
            raise UserError(msg)
        if trainer.is_global_zero:
            recover_folder(self._target(trainer))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the folder; only in the first process, only when training ended by itself."""
        if not trainer.is_global_zero or trainer.fast_dev_run or trainer.received_sigterm:  # type: ignore[attr-defined]
            return
        target = self._target(trainer)
        unfinished = target.with_name(f".{target.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        module: Any = pl_module
        module.export_model(unfinished)
        _write_card(trainer, module, unfinished)
        replace_folder(unfinished, target)
        logger.info("model written to %s", target)

    def _target(self, trainer: pl.Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.directory


def _write_card(trainer: pl.Trainer, module: Any, folder: Path) -> None:
    """Write the card of a module that records its run; a trained model is not lost for a card that fails."""
    from rlhf_lightning.model_card.card import write_card
    from rlhf_lightning.model_card.records import kept_settings, records_of_run

    try:
        record: dict[str, Any] = getattr(module, "training_record", dict)()
        if not record:  # a module of another kind
            return
        records = records_of_run(
            Path(trainer.default_root_dir),
            module=type(module).__name__,
            model_class=type(module.exported_model).__name__,
            step=trainer.global_step,
            record=record,
            settings=kept_settings(module.hparams_initial, getattr(trainer.datamodule, "hparams_initial", {})),  # type: ignore[attr-defined]
        )
        write_card(folder, records)
    except Exception:
        logger.exception("the model card could not be written; the model itself is whole")


def replace_folder(finished: Path, target: Path) -> None:
    """Move a folder to a name that may be taken; the old one is removed only afterwards.

    Args:
        finished: A complete folder on the same file system.
        target: Its final name.
    """
    for path in (*finished.rglob("*"), finished):
        sync_to_disk(path)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    finished.rename(target)
    sync_to_disk(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Put right what a process left that was killed within :func:`replace_folder` or before it.

    Args:
        target: The final name; if it is missing and the old folder was moved aside, that comes back.
    """
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(target.with_name(f".{target.name}.unfinished"), ignore_errors=True)

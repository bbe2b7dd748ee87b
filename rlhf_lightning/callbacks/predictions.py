"""What ``predict`` finds, as a file: one JSON object for each row of the data, in its order."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter

from rlhf_lightning.errors import UserError
from rlhf_lightning.loggers import JSONLines

logger = logging.getLogger("rlhf_lightning")


def prediction_rows(prediction: Any) -> list[dict[str, Any]]:
    """Turn what ``predict_step`` returned for a batch into one dict for each of its rows.

    Args:
        prediction: A list of dicts: the rows themselves. A dict of columns (tensors or lists of one length): row i has
            the i-th entry of each. A tensor or a list: row i has its i-th entry, under ``prediction``. ``None``: no
            rows. Anything else is one row.

    Raises:
        UserError: If columns are of unequal lengths.

    Example:
        >>> prediction_rows({"chosen": torch.tensor([0.5, 2.0]), "rejected": torch.tensor([0.25, 1.0])})
        [{'chosen': 0.5, 'rejected': 0.25}, {'chosen': 2.0, 'rejected': 1.0}]
        >>> prediction_rows(torch.tensor([3, 5]))
        [{'prediction': 3}, {'prediction': 5}]
    """
    if prediction is None:
        return []
    if isinstance(prediction, Mapping):
        columns = {str(name): _entries(column) for name, column in prediction.items()}
        lengths = {name: None if column is None else len(column) for name, column in columns.items()}
        if None in lengths.values():  # a dict of single values describes the batch as a whole
            return [{str(name): value for name, value in prediction.items()}]
        if len(set(lengths.values())) > 1:
            raise UserError(f"predict_step returned columns of unequal lengths: {lengths}; give each row one entry.")
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    entries = _entries(prediction)
    return [
        {str(k): v for k, v in entry.items()} if isinstance(entry, Mapping) else {"prediction": entry}
        for entry in ([prediction] if entries is None else entries)
    ]


def _entries(column: Any) -> Sequence[Any] | None:
    """Return the entries of a column as plain data, or ``None`` where it has none, as a single number has."""
    if isinstance(column, torch.Tensor):
        return column.tolist() if column.dim() else None
    return column if isinstance(column, list | tuple) else None


class PredictionFile(BasePredictionWriter):
    """Writes what ``predict`` finds to ``predictions.jsonl``: one JSON object for each row of the data, in its order.

    What a row holds is what the module's ``predict_step`` returns for it (see :func:`prediction_rows`). Each process
    writes the rows of its batches as they come to a file of its own; at the end the first one puts them together in the
    order of the data, of which Lightning and our data modules give every n-th row to each of n processes. With several
    dataloaders those of the first come first. The file appears when it is complete; an earlier one is kept as
    ``predictions.1.jsonl``, ``predictions.2.jsonl``, ...

    Args:
        filename: The file, relative to the run's folder (``trainer.default_root_dir``).
    """

    def __init__(self, filename: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="batch")
        self.filename = filename
        self._parts: dict[int, JSONLines] = {}

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove what a killed run left half-written."""
        self._parts = {}
        for part in self._path(trainer).parent.glob(self._part_name("*", trainer.global_rank, trainer.world_size)):
            part.unlink()

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the rows of a batch."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if dataloader_idx not in self._parts:
            name = self._part_name(dataloader_idx, trainer.global_rank, trainer.world_size)
            self._parts[dataloader_idx] = JSONLines(self._path(trainer).with_name(name))
        self._parts[dataloader_idx].write(*prediction_rows(prediction))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the parts of all processes together."""
        trainer.strategy.barrier("PredictionFile")
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path, size = self._path(trainer), trainer.world_size
        loaders = range(len(trainer.num_predict_batches))
        parts = [[path.with_name(self._part_name(n, rank, size)) for rank in range(size)] for n in loaders]
        unfinished = path.with_name(f".{path.name}.unfinished")
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        count = 0
        with unfinished.open("w", encoding="utf-8") as file:
            for line in itertools.chain.from_iterable(map(_in_turn, parts)):
                count += file.write(line) > 0
        for part in itertools.chain.from_iterable(parts):
            part.unlink(missing_ok=True)
        if path.exists():
            path.rename(next_free(path))
        unfinished.rename(path)
        logger.info("%d predictions written to %s", count, path)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no parts behind."""
        for part in self._parts.values():
            part.path.unlink(missing_ok=True)

    def _path(self, trainer: pl.Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.filename

    def _part_name(self, dataloader: int | str, rank: int, world_size: int) -> str:
        return f".{Path(self.filename).name}.{dataloader}.{rank}-of-{world_size}"


def _in_turn(paths: Iterable[Path]) -> Iterator[str]:
    """Yield the first line of each file, then the second of each, and so on; a missing file has none."""
    files: list[IO[str]] = [path.open(encoding="utf-8") for path in paths if path.exists()]
    try:
        for lines in itertools.zip_longest(*files):
            yield from (line for line in lines if line is not None)
    finally:
        for file in files:
            file.close()


def next_free(path: Path) -> Path:
    """Return ``name.1.suffix``, ``name.2.suffix``, ...: the first that no file has."""
    number = 1
    while (taken := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return taken

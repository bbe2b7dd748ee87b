import json
import math
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from rlhf_lightning.loggers import JSONLines, JSONLLogger, read_metrics, to_json

# The loader below starts anew on resume, which is of no matter here.
pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).pow(2).mean()
        self.log("train/loss", loss)
        self.log("train/batch", float(self.trainer.fit_loop.epoch_loop.total_batch_idx))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.layer(batch).pow(2).mean(), batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, max_steps: int, ckpt_path: Path | None = None) -> None:
    trainer = pl.Trainer(
        max_steps=max_steps,
        default_root_dir=folder,
        logger=JSONLLogger(folder),
        log_every_n_steps=1,
        val_check_interval=2,
        num_sanity_val_steps=0,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ModelCheckpoint(folder, "at_{step}", every_n_train_steps=2, save_top_k=-1, enable_version_counter=False)
        ],
    )
    data: DataLoader[Tensor] = DataLoader(list(torch.ones(8, 1)), batch_size=2)  # type: ignore[arg-type]
    trainer.fit(Regression(), data, data, ckpt_path=ckpt_path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_a_trainer_writes_one_valid_line_for_each_step_and_validation(tmp_path: Path) -> None:
    fit(tmp_path, 4)
    rows = lines(tmp_path / "metrics.jsonl")
    train = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in train] == [0, 1, 2, 3]
    assert [row["train/batch"] for row in train] == [0, 1, 2, 3]
    assert [row["step"] for row in rows if "val/loss" in row] == [1, 3]
    assert all(0 <= row["time"] < 100 for row in rows)


def test_rows_of_one_step_are_joined_when_read(tmp_path: Path) -> None:
    fit(tmp_path, 4)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert ["val/loss" in row for row in rows] == [False, True, False, True]


def test_a_resumed_run_appends_and_replaces_what_it_repeated(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    checkpoint = Path(shutil.copy(tmp_path / "at_step=2.ckpt", tmp_path / "resume.ckpt"))
    first = (tmp_path / "metrics.jsonl").read_text()
    fit(tmp_path, 4, checkpoint)
    once = lines(tmp_path / "metrics.jsonl")
    fit(tmp_path, 3, checkpoint)  # back to 2, and stopped earlier than before
    content = (tmp_path / "metrics.jsonl").read_text()
    assert content.startswith(first)
    assert [row["step"] for row in once if "train/loss" in row] == [0, 1, 2, 3]
    assert [row["train/batch"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    times = [row["time"] for row in lines(tmp_path / "metrics.jsonl")]
    assert times == sorted(times)


def test_numbers_that_are_not_finite_come_back(tmp_path: Path) -> None:
    logger = JSONLLogger(tmp_path)
    logger.log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf, "d": torch.tensor(1.5)}, step=0)
    (row,) = lines(logger.path)  # fails on a bare NaN
    assert (row["a"], row["b"], row["c"], row["d"]) == ("NaN", "Infinity", "-Infinity", 1.5)
    (row,) = read_metrics(logger.path)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_a_line_cut_by_a_kill_is_dropped_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JSONLLogger(tmp_path).log_metrics({"a": 1.0}, step=0)
    whole = path.read_text()
    path.write_text(whole + '{"step": 1, "time": 0.')
    assert [row["step"] for row in read_metrics(path)] == [0]
    JSONLLogger(tmp_path).log_metrics({"a": 2.0}, step=1)
    assert path.read_text().startswith(whole)
    assert [(row["step"], row["a"]) for row in read_metrics(path)] == [(0, 1.0), (1, 2.0)]


def test_time_goes_on_where_the_last_launch_ended(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "time": 3600.0}\n')
    JSONLLogger(tmp_path).log_metrics({"a": 1.0}, step=8)
    assert 3600 <= lines(tmp_path / "metrics.jsonl")[-1]["time"] < 3660


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    JSONLLogger(tmp_path).log_metrics({"a": 1.0}, step=0)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_text_keeps_its_letters_and_stays_on_one_line(tmp_path: Path) -> None:
    lines_file = JSONLines(tmp_path / "deep" / "samples.jsonl")
    lines_file.write({"prompt": "Grüße\n\u2028|", "path": tmp_path}, {"prompt": "b"})
    content = (tmp_path / "deep" / "samples.jsonl").read_text(encoding="utf-8")
    assert "Grüße" in content
    assert [json.loads(line)["prompt"] for line in content.split("\n")[:-1]] == ["Grüße\n\u2028|", "b"]


def test_nested_values_become_plain() -> None:
    assert to_json({1: (torch.tensor(2), None, True, Path("x"))}) == {"1": [2, None, True, "x"]}

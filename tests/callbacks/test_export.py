import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from rlhf_lightning.callbacks import ExportModel
from rlhf_lightning.callbacks.export import recover_folder, replace_folder
from rlhf_lightning.errors import UserError


class Untold(pl.LightningModule):
    """A module without ``export_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Exportable(Untold):
    """Writes its weight; may fail or be stopped on the way."""

    def __init__(self, trouble: str = "") -> None:
        super().__init__()
        self.trouble = trouble

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trouble == "step":
            raise RuntimeError(self.trouble)
        if self.trouble == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)

    def export_model(self, directory: str | Path) -> None:
        Path(directory).mkdir()
        (Path(directory) / "weights").write_text(str(self.layer.weight.item()))
        if self.trouble == "export":
            raise OSError(28, "No space left on device")
        (Path(directory) / "sub").mkdir()
        (Path(directory) / "sub" / "config").write_text("{}")


def fit(folder: Path, module: pl.LightningModule, **options: Any) -> None:
    data: DataLoader[Any] = DataLoader(list(range(3)), batch_size=1)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        **{"max_epochs": 1, **options},
        default_root_dir=folder,
        callbacks=[ExportModel()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, data)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def old_model(folder: Path) -> Path:
    """Write the model of an earlier run."""
    (folder / "model").mkdir()
    (folder / "model" / "old").write_text("old")
    return folder / "model"


def test_the_end_of_fit_writes_the_trained_model(tmp_path: Path) -> None:
    module = Exportable()
    before = module.layer.weight.item()
    fit(tmp_path, module)
    assert files(tmp_path) == ["model/sub/config", "model/weights"]
    # Gradient 1 for the weight, learning rate 0.1, three steps.
    assert float((tmp_path / "model" / "weights").read_text()) == pytest.approx(before - 0.3, abs=1e-6)


class Recording(Exportable):
    """A module that says what it has done, as those of the package do."""

    @property
    def exported_model(self) -> torch.nn.Module:
        return self.layer

    def training_record(self) -> dict[str, Any]:
        if self.trouble == "record":
            raise RuntimeError("no record")
        return {"hardware": "an abacus"}


def test_the_model_has_its_card(tmp_path: Path) -> None:
    fit(tmp_path, Recording())
    assert files(tmp_path) == ["model/README.md", "model/sub/config", "model/weights"]
    assert "| Hardware | an abacus |" in (tmp_path / "model" / "README.md").read_text()


def test_a_card_that_fails_costs_no_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, Recording("record"))
    assert files(tmp_path) == ["model/sub/config", "model/weights"]
    assert "the model card could not be written; the model itself is whole" in caplog.text
    assert "no record" in caplog.text


def test_an_earlier_model_is_replaced_as_a_whole(tmp_path: Path) -> None:
    old_model(tmp_path)
    fit(tmp_path, Exportable())
    assert files(tmp_path) == ["model/sub/config", "model/weights"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("trouble", "error"), [("step", RuntimeError), ("export", OSError), ("signal", SIGTERMException)]
)
def test_what_ends_badly_leaves_the_earlier_model(tmp_path: Path, trouble: str, error: type[BaseException]) -> None:
    old_model(tmp_path)
    with pytest.raises(error):
        fit(tmp_path, Exportable(trouble))
    assert files(tmp_path / "model") == ["old"]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    fit(tmp_path, Exportable(), fast_dev_run=1)
    assert not (tmp_path / "model").exists()


def test_a_module_that_cannot_be_exported_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Untold has no method export_model"):
        fit(tmp_path, Untold())


def test_a_half_written_folder_of_a_killed_run_is_cleared_and_never_taken(tmp_path: Path) -> None:
    (tmp_path / ".model.unfinished").mkdir()
    (tmp_path / ".model.unfinished" / "stale").write_text("x")
    fit(tmp_path, Exportable())
    assert files(tmp_path) == ["model/sub/config", "model/weights"]


def test_a_kill_between_the_two_renames_is_put_right(tmp_path: Path) -> None:
    old_model(tmp_path).rename(tmp_path / ".model.old")
    recover_folder(tmp_path / "model")
    assert files(tmp_path) == ["model/old"]


def test_a_kill_before_the_old_one_is_removed_is_put_right(tmp_path: Path) -> None:
    old_model(tmp_path).rename(tmp_path / ".model.old")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "new").write_text("new")
    recover_folder(tmp_path / "model")
    assert files(tmp_path) == ["model/new"]


def test_replace_folder_needs_no_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a").write_text("a")
    replace_folder(tmp_path / "made", tmp_path / "model")
    assert files(tmp_path) == ["model/a"]

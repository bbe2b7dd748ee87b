import importlib
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.data import DataLoader

from rlhf_lightning.callbacks import ChartLayout
from rlhf_lightning.callbacks.charts import CHARTS, RESULTS


class SFTModule(pl.LightningModule):
    def __init__(
        self, model: str = "tiny", kl: dict[str, Any] | None = None, betas: tuple[float, float] = (0.9, 0.95)
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.layer(torch.ones(1, 1)).sum()
        self.log("train/loss", loss)
        self.log("val/loss", 3.0)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Mine(SFTModule):
    pass


class Foreign(pl.LightningModule):
    training_step = SFTModule.training_step
    configure_optimizers = SFTModule.configure_optimizers

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)


def fit(folder: Path, module: pl.LightningModule, callback: ChartLayout | None = None) -> EventAccumulator:
    data: DataLoader[Any] = DataLoader(list(range(3)), batch_size=1)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        max_epochs=1,
        default_root_dir=folder,
        callbacks=[callback or ChartLayout()],
        logger=TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, data)
    return EventAccumulator(str(folder)).Reload()


def charts_of(events: EventAccumulator) -> dict[str, list[str]]:
    (event,) = events.Tensors("custom_scalars__config__")
    page = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    (category,) = page.category
    return {chart.title: list(chart.multiline.tag) for chart in category.chart}


def hparams_of(events: EventAccumulator, name: str) -> Any:
    content = events.summary_metadata[f"_hparams_/{name}"].plugin_data.content
    data = HParamsPluginData.FromString(content)
    return getattr(data, name)


def test_a_subclass_gets_the_charts_of_its_kind_and_each_names_one_curve(tmp_path: Path) -> None:
    events = fit(tmp_path, Mine())
    charts = charts_of(events)
    assert list(charts) == list(CHARTS["SFTModule"])
    patterns = next(iter(charts.values()))
    tags = [*events.Tags()["scalars"], "train/loss_epoch", "val/loss_other"]
    assert [tag for pattern in patterns for tag in tags if re.match(pattern, tag)] == ["train/loss", "val/loss"]


def test_charts_of_ones_own_replace_them(tmp_path: Path) -> None:
    events = fit(tmp_path, SFTModule(), ChartLayout(charts={"mine": ["a/b.c"]}))
    assert charts_of(events) == {"mine": [r"a/b\.c$"]}


def test_hyperparameters_stand_beside_real_results(tmp_path: Path) -> None:
    events = fit(tmp_path, SFTModule(kl={"class_path": "FixedKL", "init_args": {"coef": 0.05}}))
    start = hparams_of(events, "session_start_info").hparams
    assert start["model"].string_value == "tiny"
    assert start["kl/init_args/coef"].number_value == 0.05
    assert start["betas"].string_value == "(0.9, 0.95)"
    experiment = hparams_of(events, "experiment")
    assert [info.name.tag for info in experiment.metric_infos] == RESULTS["SFTModule"]
    assert hparams_of(events, "session_end_info").status == 1  # STATUS_SUCCESS


def test_no_value_is_made_up(tmp_path: Path) -> None:
    events = fit(tmp_path, SFTModule())
    assert "hp_metric" not in events.Tags()["scalars"]
    assert [(event.step, event.value) for event in events.Scalars("val/loss")] == [(0, 3.0), (1, 3.0), (2, 3.0)]


def test_a_module_that_is_not_known_gets_no_page(tmp_path: Path) -> None:
    tags = fit(tmp_path, Foreign()).Tags()
    assert "custom_scalars__config__" not in tags["tensors"]


@pytest.mark.parametrize("name", CHARTS)
def test_the_charts_are_those_of_modules_that_exist(name: str) -> None:
    module = importlib.import_module(f"rlhf_lightning.modules.{name.removesuffix('Module').lower()}")
    assert issubclass(getattr(module, name), pl.LightningModule)
    assert set(RESULTS[name]) <= {tag for tags in CHARTS[name].values() for tag in tags}

"""The warning where no response comes to its end."""

import logging
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from rlhf_lightning.callbacks import UnfinishedWarning


class Logs(pl.LightningModule):
    """Logs the given shares of finished responses, one a step."""

    def __init__(self, rollouts: list[float], validation: float | None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.rollouts, self.validation = rollouts, validation

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.rollouts:
            self.log("rollout/finished_fraction", self.rollouts[batch_idx])
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.validation is not None:
            self.log("val/finished_fraction", self.validation)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("rollouts", "validation", "warned"),
    [
        ([0.0, 0.0, 0.0], 0.5, ["rollout"]),
        ([0.1, 0.0, 0.2], 0.0, ["rollout", "validation"]),
        ([0.1, 0.2, 1.0], 0.01, []),
        ([], None, []),  # a module that samples nothing
    ],
)
def test_it_warns_once_where_none_is_finished(
    rollouts: list[float], validation: float | None, warned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[UnfinishedWarning()],
    )
    data: DataLoader[Any] = DataLoader(list(range(3)), batch_size=1)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, logger="rlhf_lightning"):
        trainer.fit(Logs(rollouts, validation), data, data)
    said = [record.getMessage() for record in caplog.records if record.name == "rlhf_lightning"]
    assert [line.split(" ended")[0] for line in said] == [f"no response of this {kind}" for kind in warned]
    assert all("model.sampling.max_new_tokens" in line and "model.sampling.stop_tokens" in line for line in said)

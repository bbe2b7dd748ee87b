"""Two processes keep, fail to keep and stop at the same checkpoint.

This file is also the program that the processes run; see test_two_processes.py.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rlhf_lightning.checkpointing import RunCheckpoint
from rlhf_lightning.distributed import leave_group
from rlhf_lightning.errors import UserError

STEPS = 5


class OneWeight(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight.square().sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Score(Callback):
    """Logs another score in each process: the first one's is best at step 2, the second one's at step 4."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = ((1.0, 3.0, 2.0, 0.0, 0.0), (0.0, 1.0, 2.0, 3.0, 0.0))[trainer.global_rank]
        pl_module.log("val/score", values[trainer.global_step - 1], sync_dist=False)


class At(Callback):
    """Does something within a step of one of the processes."""

    def __init__(self, step: int, rank: int, act: Callable[[], Any]) -> None:
        self.step, self.rank, self.act = step, rank, act

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if (trainer.global_step, trainer.global_rank) == (self.step - 1, self.rank):
            self.act()


class TerminatedLate(Callback):
    """The first process gets SIGTERM at the end of training, while the second waits for it in an exchange."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGTERM)


def no_file_may_grow() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def run(folder: Path, *callbacks: Callback) -> dict[str, Any]:
    """Train; return how it ended, and the step of each checkpoint then."""
    trainer = Trainer(
        default_root_dir=folder,
        callbacks=[*callbacks],
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        val_check_interval=1,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data: DataLoader[Tensor] = DataLoader(torch.zeros(STEPS, 1))  # type: ignore[arg-type]
    ending: str | int | None = None
    try:
        trainer.fit(OneWeight(), data, data)
    except UserError as refusal:
        ending = str(refusal)
    except SystemExit as stop:
        ending = stop.code
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    torch.distributed.barrier()
    kept = sorted((folder / "checkpoints").iterdir())
    steps = {path.name: torch.load(path, weights_only=True)["global_step"] for path in kept}
    return {"ending": ending, "steps": steps, "best": trainer.checkpoint_callback.best.step}  # type: ignore[union-attr]


def main(folder: Path) -> dict[str, dict[str, Any]]:
    asked = At(3, rank=1, act=lambda: os.kill(os.getpid(), signal.SIGUSR1))
    terminated = At(3, rank=0, act=lambda: os.kill(os.getpid(), signal.SIGTERM))
    return {
        "best": run(folder / "best", Score(), RunCheckpoint(monitor="val/score", keep=1)),
        "full": run(folder / "full", At(4, rank=0, act=no_file_may_grow), RunCheckpoint(every_n_steps=1)),
        "requeued": run(folder / "requeued", asked, RunCheckpoint()),
        "terminated": run(folder / "terminated", terminated, RunCheckpoint()),
        "terminated_late": run(folder / "late", TerminatedLate(), RunCheckpoint()),
    }


@pytest.mark.slow
def test_both_agree_on_what_is_best_on_a_failed_save_and_on_when_to_stop(
    run_processes: Callable[[str, int, list[str]], None], tmp_path: Path
) -> None:
    run_processes(__file__, 2, [str(tmp_path)])
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for result in (first, second):
        assert result["best"] == {"ending": None, "steps": {"best.ckpt": 2, "last.ckpt": 5}, "best": 2}
        assert result["full"]["steps"] == {"last.ckpt": 3, "step-2.ckpt": 2}
        assert result["requeued"]["steps"] == {"last.ckpt": 3}
        assert result["terminated"]["steps"] == {"last.ckpt": 3}
        assert result["terminated_late"]["steps"] == {"last.ckpt": 5}
    whose = (first["full"]["ending"], second["full"]["ending"])
    for ending, reason in zip(whose, ("File too large", "another process could not write it"), strict=True):
        assert "the checkpoint of step 4 cannot be written" in ending
        assert reason in ending
    # Lightning kills the first process when one that it started fails: the second ends with 0.
    assert (first["requeued"]["ending"], second["requeued"]["ending"]) == (138, 0)
    for how in ("terminated", "terminated_late"):
        assert (first[how]["ending"], second[how]["ending"]) == (143, 0)


if __name__ == "__main__":
    results = main(Path(sys.argv[2]))
    leave_group()
    torch.save(results, Path(sys.argv[2], f"{os.environ['LOCAL_RANK']}.pt"))

"""What a run keeps of itself, and when."""

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rlhf_lightning.checkpoint_files import RUN_KEY
from rlhf_lightning.checkpointing import RunCheckpoint
from rlhf_lightning.errors import UserError
from rlhf_lightning.loggers import JSONLLogger, read_metrics
from rlhf_lightning.taking_up import (
    LAST_CHECKPOINT,
    resolve_checkpoint,
)


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


def train(folder: Path, *callbacks: Any, steps: int = 5, ckpt_path: str | None = None, **settings: Any) -> None:
    trainer = Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"limit_val_batches": 0, "num_sanity_val_steps": 0, **settings},
    )
    data: DataLoader[Tensor] = DataLoader(torch.zeros(steps, 1))  # type: ignore[arg-type]
    trainer.fit(OneWeight(), data, data, ckpt_path=folder / ckpt_path if ckpt_path else None, weights_only=True)


def test_last_checkpoint_is_of_the_end(tmp_path: Path) -> None:
    train(tmp_path, RunCheckpoint())
    saved = torch.load(tmp_path / LAST_CHECKPOINT, weights_only=True)
    assert saved["global_step"] == 5
    assert saved["state_dict"]["weight"].item() == pytest.approx(0.8**5)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["last.ckpt"]


class Watch(RunCheckpoint):
    """Notes the step of each checkpoint once it is in place."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.steps: list[int] = []

    def _save(self, trainer: Trainer, *, counted: bool = False) -> None:
        super()._save(trainer, counted=counted)
        self.steps.append(torch.load(self._path(trainer), weights_only=True)["global_step"])


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"every_n_steps": 2, "every_n_minutes": 0}, [2, 4, 5]),
        ({"every_n_steps": 0, "every_n_minutes": 0}, [5]),
        ({"every_n_steps": 0, "every_n_minutes": 1e-9}, [1, 2, 3, 4, 5]),
    ],
)
def test_checkpoints_follow_the_count_and_the_clock(
    settings: dict[str, float], steps: list[int], tmp_path: Path
) -> None:
    watch = Watch(**settings)
    train(tmp_path, watch)
    assert watch.steps == steps


def test_half_written_checkpoint_of_a_killed_run_is_swept_and_never_taken(tmp_path: Path) -> None:
    half = tmp_path / LAST_CHECKPOINT.parent / ".last.ckpt.unfinished"
    half.parent.mkdir()
    half.write_bytes(b"half")
    assert resolve_checkpoint("auto", tmp_path) is None
    train(tmp_path, RunCheckpoint())
    assert [path.name for path in half.parent.iterdir()] == ["last.ckpt"]


class CtrlC(Callback):
    """Presses Ctrl-C in one hook after so many steps, and counts what is validated."""

    def __init__(self, hook: str, step: int = 2, times: int = 1) -> None:
        self.step, self.times, self.validated = step, times, 0
        setattr(self, hook, self.press)

    def press(self, trainer: Trainer, *args: Any) -> None:
        while trainer.global_step == self.step and self.times:
            self.times -= 1
            os.kill(os.getpid(), signal.SIGINT)

    def on_validation_batch_end(self, *args: Any) -> None:
        self.validated += 1


def interrupt(folder: Path, ctrl_c: CtrlC, **settings: Any) -> Any:
    """Train with a key press, and return the status that the process would end with."""
    with pytest.raises(SystemExit) as ending:
        train(folder, ctrl_c, RunCheckpoint(**settings), limit_val_batches=2, val_check_interval=3)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return ending.value.code


@pytest.mark.parametrize(
    ("hook", "pressed_at", "saved", "validated"),
    [
        ("on_train_batch_start", 1, 2, 0),  # within the second step
        ("on_train_batch_start", 2, 3, 2),  # within the third step, which has a validation
        ("on_validation_start", 3, 3, 2),
        ("on_train_batch_start", 4, 5, 2),  # within the last step
        ("on_train_end", 5, 5, 2),
    ],
)
def test_ctrl_c_ends_the_step_with_its_validation_and_saves(
    hook: str, pressed_at: int, saved: int, validated: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ctrl_c = CtrlC(hook, pressed_at)
    assert interrupt(tmp_path, ctrl_c, every_n_steps=3) == 130
    checkpoint = torch.load(tmp_path / LAST_CHECKPOINT, weights_only=True)
    assert checkpoint["global_step"] == saved
    assert checkpoint["state_dict"]["weight"].item() == pytest.approx(0.8**saved)
    assert ctrl_c.validated == validated
    assert caplog.messages[-2:] == [
        "finishing this step, then saving; press Ctrl-C again to stop at once",
        f"checkpoint of step {saved}: {tmp_path / LAST_CHECKPOINT}; --ckpt_path auto takes it up",
    ]


@pytest.mark.parametrize(("every_n_steps", "kept"), [(0, "no checkpoint was written"), (1, "checkpoint of step 2: ")])
def test_second_ctrl_c_stops_at_once_and_saves_nothing(
    every_n_steps: int, kept: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupt(tmp_path, CtrlC("on_before_zero_grad", times=2), every_n_steps=every_n_steps)
    assert (tmp_path / LAST_CHECKPOINT).exists() == bool(every_n_steps)
    assert caplog.messages[-1].startswith(kept)


def test_second_ctrl_c_while_it_is_saved_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    pressed = CtrlC("on_train_batch_start")
    again = CtrlC("on_save_checkpoint", step=3)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, pressed, again, RunCheckpoint(every_n_steps=2))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert torch.load(tmp_path / LAST_CHECKPOINT, weights_only=True)["global_step"] == 2


def test_request_of_the_system_says_what_is_kept_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ctrl_c = CtrlC("on_train_batch_start", times=0)
    ctrl_c.on_train_batch_start = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore[method-assign]
    with pytest.raises(SIGTERMException) as ending:
        train(tmp_path, ctrl_c, RunCheckpoint())
    assert ending.value.code is None
    assert caplog.messages[-1].startswith("checkpoint of step 1: ")


@pytest.mark.parametrize(("every_n_steps", "kept"), [(0, "no checkpoint was written"), (1, "checkpoint of step 1: ")])
def test_a_failure_says_what_is_kept(
    every_n_steps: int, kept: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failing = CtrlC("on_train_batch_start", times=0)

    def fail(trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == 1:
            raise UserError("the reward service is down")

    failing.on_train_batch_start = fail  # type: ignore[method-assign]
    with pytest.raises(UserError, match="service is down"):
        train(tmp_path, failing, RunCheckpoint(every_n_steps=every_n_steps))
    assert caplog.messages[-1].startswith(kept)


def test_handler_is_put_back_after_a_good_end_and_after_an_error(tmp_path: Path) -> None:
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            seen.append(signal.getsignal(signal.SIGINT))
            if trainer.default_root_dir.endswith("bad"):
                raise RuntimeError("a bug")

    train(tmp_path / "good", Look(), RunCheckpoint(), steps=1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(RuntimeError, match="a bug"):
        train(tmp_path / "bad", Look(), RunCheckpoint(), steps=1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(tmp_path / "without", Look(), steps=1, enable_checkpointing=False)
    assert [handler is signal.default_int_handler for handler in seen] == [False, False, True]


def test_negative_interval_is_refused() -> None:
    with pytest.raises(UserError, match="every_n_steps -1"):
        RunCheckpoint(every_n_steps=-1)


class Score(Callback):
    """Logs what the validations and steps are said to have come to."""

    def __init__(self, *values: float, name: str = "val/score") -> None:
        self.values, self.name = values, name

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log(self.name, self.values[trainer.global_step - 1])


def steps_of(folder: Path) -> dict[str, int]:
    found = sorted((folder / "checkpoints").iterdir())
    return {path.name: torch.load(path, weights_only=True)["global_step"] for path in found}


EACH: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 1}


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 4)])
def test_best_checkpoint_is_that_of_the_best_validation(mode: Any, best: int, tmp_path: Path) -> None:
    train(tmp_path, Score(1.0, 3.0, 2.0, 0.5, float("nan")), RunCheckpoint(monitor="val/score", mode=mode), **EACH)
    assert steps_of(tmp_path)["best.ckpt"] == best
    assert steps_of(tmp_path)["last.ckpt"] == 5
    kept = torch.load(tmp_path / "checkpoints/best.ckpt", weights_only=True)[RUN_KEY]["best"]
    assert kept == {"monitor": "val/score", "mode": mode, "value": 3.0 if mode == "max" else 0.5, "step": best}


def test_what_was_best_is_remembered_after_a_kill(tmp_path: Path) -> None:
    first = Score(1.0, 3.0, 2.0)  # and no fourth
    with pytest.raises(IndexError):
        train(tmp_path, first, RunCheckpoint(monitor="val/score", every_n_steps=1), **EACH)
    again = RunCheckpoint(monitor="val/score", every_n_steps=1)
    train(tmp_path, Score(0, 0, 0, 2.5, 2.9), again, ckpt_path="checkpoints/last.ckpt", **EACH)
    assert steps_of(tmp_path) == {"best.ckpt": 2, "last.ckpt": 5, "step-4.ckpt": 4}
    other = RunCheckpoint(monitor="val/score", mode="min", every_n_steps=1)
    train(tmp_path, Score(0, 0, 0, 9.0, 9.5), other, ckpt_path="checkpoints/step-4.ckpt", **EACH)
    assert steps_of(tmp_path)["best.ckpt"] == 5  # another measure begins anew


def test_metric_that_is_not_logged_is_refused_once_it_could_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"monitor is 'val/scor', and no metric is called so. Did you mean 'val/score'"):
        train(tmp_path, Score(1.0), RunCheckpoint(monitor="val/scor"), **EACH)
    with pytest.raises(UserError, match="keep is 0"):
        RunCheckpoint(keep=0)
    with pytest.raises(UserError, match="mode is 'best'; it must be 'max' or 'min'"):
        RunCheckpoint(mode="best")  # type: ignore[arg-type]


def test_best_that_never_was_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, RunCheckpoint(monitor="val/score"))
    assert "no best checkpoint: val/score was never logged" in caplog.text


class FullDisk(Callback):
    """Lets no file grow beyond a kilobyte from a step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def test_full_disk_takes_one_line_and_leaves_the_earlier_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            UserError, match=r"checkpoint of step 4 cannot be written into '.*': File too large \(.* free"
        ):
            train(tmp_path, FullDisk(4), RunCheckpoint(every_n_steps=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert steps_of(tmp_path) == {"last.ckpt": 3, "step-2.ckpt": 2}  # and no half file
    assert caplog.messages[-1].startswith("checkpoint of step 3: ")
    train(tmp_path, RunCheckpoint(), ckpt_path="checkpoints/last.ckpt")
    assert steps_of(tmp_path) == {"last.ckpt": 5, "step-3.ckpt": 3}


def test_a_user_that_logs_behind_the_save_loses_nothing(tmp_path: Path) -> None:
    class LogsLate(OneWeight):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("early", float(batch_idx))
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("late", float(batch_idx))

    data: DataLoader[Tensor] = DataLoader(torch.zeros(4, 1))  # type: ignore[arg-type]
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    trainer = Trainer(
        default_root_dir=tmp_path,
        logger=JSONLLogger(tmp_path),
        callbacks=RunCheckpoint(every_n_steps=2),
        log_every_n_steps=1,
        **settings,
    )
    trainer.fit(LogsLate(), data)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["early"], row["late"]) for row in rows] == [(n, n, n) for n in range(4)]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len([line for line in lines if "early" in line]) == 4


class AskedToRequeue(Callback):
    """Gets SLURM's signal within the step behind so many."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_request_to_be_queued_again_ends_the_step_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slurm = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0"}
    slurm |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "1"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    script = f"#!/bin/sh\n(echo $@; ls {tmp_path}/run/checkpoints) > {tmp_path}/asked\n"
    (tmp_path / "scontrol").write_text(script)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    asked = AskedToRequeue(2)
    with pytest.raises(SystemExit) as ending:
        train(tmp_path / "run", asked, RunCheckpoint())
    assert ending.value.code == 138
    assert (tmp_path / "asked").read_text().split() == ["requeue", "77", "last.ckpt"]
    assert steps_of(tmp_path / "run") == {"last.ckpt": 3}  # Lightning would have saved within the step, as hpc_ckpt_1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints"]
    assert "SLURM job 77 is queued again" in caplog.messages
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_request_to_be_queued_again_outside_of_slurm_asks_nobody(tmp_path: Path) -> None:
    asked = AskedToRequeue(0)
    with pytest.raises(SystemExit) as ending:
        train(tmp_path, asked, RunCheckpoint())
    assert ending.value.code == 138
    assert steps_of(tmp_path) == {"last.ckpt": 1}

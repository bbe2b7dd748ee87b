import io
import re
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from rlhf_lightning.callbacks import PhaseProgressBar, progress

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
PHASES = {"rollout": 4, "score": 2, "update": 4}


class Iterations(pl.LightningModule):
    """Manual optimization with phases, as in PPO."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        bar = self.trainer.progress_bar_callback
        assert isinstance(bar, PhaseProgressBar)
        for name, parts in PHASES.items():
            for part in range(parts):
                bar.phase(name, part + 1, parts)
        self.log_dict({"rollout/score": batch_idx / 4, "rollout/kl": 2.0, "time/tokens_per_s": 400.0})
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.step()
        if batch_idx == 1:
            self.print("hello")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        bar = self.trainer.progress_bar_callback
        assert isinstance(bar, PhaseProgressBar)
        bar.phase("rollout", 1, 2)
        self.log("val/score", 7.0, batch_size=1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/score", 7.0, batch_size=1)

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        return 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Automatic(Iterations):
    """Automatic optimization, as in SFT."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:  # type: ignore[override]
        loss = self.layer(torch.ones(1, 1)).sum() * 0 + 0.25
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=1)
        return loss


class Unsized(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Terminal(io.StringIO):
    """A standard output that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def data(batches: int) -> "DataLoader[Any]":
    return DataLoader(list(range(batches)), batch_size=1)  # type: ignore[arg-type]


def make_trainer(bar: PhaseProgressBar, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{"max_epochs": 1, **options},
        callbacks=[bar],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        accelerator="cpu",
    )


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return what was printed, without times."""
    return [re.sub(r" +\d+:\d\d( +\S+ left)?$", "", line) for line in capsys.readouterr().out.splitlines()]


def frames_of(
    monkeypatch: pytest.MonkeyPatch, module: pl.LightningModule, columns: int = 100, **options: Any
) -> list[str]:
    """Fit in a terminal that redraws at every chance, and return every state of the line."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    make_trainer(PhaseProgressBar(refresh_seconds=0.0), **options).fit(module, data(4), data(2))
    return [frame.rstrip() for frame in re.split(r"[\r\n]", terminal.getvalue()) if frame.strip()]


def test_a_tiny_negative_value_shows_no_minus() -> None:
    assert progress.describe_metrics({"rollout/score": -1.0, "rollout/kl": torch.tensor(-1e-7)}) == [
        "score -1.000",
        "kl 0.00",
    ]


def test_without_a_terminal_one_line_for_the_first_iteration_and_one_for_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_trainer(PhaseProgressBar(), max_epochs=2).fit(Iterations(), data(4))
    assert lines_of(capsys) == [
        "iteration 1/8  (12%)  score 0.000  kl 2.00  400 tok/s",
        "hello",
        "hello",
        "iteration 8/8  (100%)  score 0.750  kl 2.00  400 tok/s",
    ]


def test_without_a_terminal_long_iterations_print_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(PhaseProgressBar(line_seconds=0.0)).fit(Iterations(), data(4))
    lines = lines_of(capsys)
    assert lines[0] == "iteration 0/4 rollout 25%  (3%)"  # a quarter of the first half of the first of four
    assert lines[5] == "iteration 0/4 score 100%  (15%)"
    assert "iteration 3/4 update 50%" in "".join(lines)
    assert "\r" not in "".join(lines)


def test_a_terminal_is_redrawn_in_place_and_left_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = frames_of(monkeypatch, Iterations())
    assert re.fullmatch(r"iteration 1/4  rollout 50%  +\|█.* *\|  score 0.000  kl 2.00  400 tok/s .* left", frames[14])
    assert "hello" in frames
    assert re.fullmatch(
        r"iteration 4/4 .*\|█+\|  score 0.750  kl 2.00  400 tok/s  val score 7.000  \d:\d\d", frames[-1]
    )


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_line_is_never_longer_than_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    assert max(map(len, frames_of(monkeypatch, Iterations(), columns))) <= columns


def test_80_columns_hold_score_kl_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    (frame, *_) = [
        line for line in frames_of(monkeypatch, Iterations(), 80) if line.startswith("iteration 3/4  rollout")
    ]
    assert re.search(r"score 0.500  kl 2.00  400 tok/s .*left$", frame)


def test_the_bar_only_moves_forward_and_validation_does_not_move_it(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = frames_of(monkeypatch, Iterations(), 200, val_check_interval=2)
    shares = [frame.count("█") for frame in frames if frame.startswith("iteration 1/4")]
    assert shares == sorted(shares)
    assert shares[-1] > shares[0]
    validating = [frame for frame in frames if " val " in frame.split("|")[0]]
    assert any("val rollout 50%" in frame for frame in validating)
    assert len({frame.split("|")[1] for frame in validating if frame.startswith("iteration 2/4")}) == 1


def test_other_modules_show_loss_and_count_batches(capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(PhaseProgressBar(), max_steps=3, max_epochs=-1, accumulate_grad_batches=2).fit(Automatic(), data(4))
    lines = lines_of(capsys)
    assert lines[0] == "batch 1/6  (17%)  loss 0.2500"
    assert lines[-1] == "batch 6/6  (100%)  loss 0.2500"


def test_a_run_without_end_shows_no_total(capsys: pytest.CaptureFixture[str]) -> None:
    endless: DataLoader[Any] = DataLoader(Unsized(), batch_size=None)
    make_trainer(PhaseProgressBar()).fit(Automatic(), endless)
    assert lines_of(capsys) == ["batch 1  loss 0.2500", "batch 3  loss 0.2500"]


def test_a_resumed_run_starts_where_it_stood(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    trainer = make_trainer(PhaseProgressBar(), max_steps=1)
    trainer.fit(Iterations(), data(4))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    capsys.readouterr()
    make_trainer(PhaseProgressBar(), max_epochs=2).fit(Iterations(), data(4), ckpt_path=tmp_path / "one.ckpt")
    assert lines_of(capsys)[0].startswith("iteration 2/8")


def test_redraws_are_throttled_however_often_a_phase_is_reported() -> None:
    bar = PhaseProgressBar(refresh_seconds=3600)
    drawn = []
    bar._draw = lambda: (drawn.append(1), setattr(bar, "_drawn_at", time.monotonic()))  # type: ignore[assignment,method-assign,func-returns-value]
    begin = time.monotonic()
    for part in range(10_000):
        bar.phase("rollout", part, 10_000)
    assert not drawn
    assert time.monotonic() - begin < 1.0  # 0.1 ms a call at the very most


def test_validate_test_and_predict_have_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(PhaseProgressBar())
    trainer.validate(Iterations(), data(2), verbose=False)
    trainer.test(Iterations(), data(3), verbose=False)
    trainer.predict(Iterations(), data(4))
    assert lines_of(capsys) == [
        "validating: batch 2/2  (100%)  val score 7.000",
        "testing: batch 3/3  (100%)  val score 7.000",
        "predicting: batch 4/4  (100%)",
    ]


def test_a_disabled_bar_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    bar = PhaseProgressBar(line_seconds=0.0)
    trainer = make_trainer(bar)
    trainer.fit_loop.max_epochs = 1
    bar.disable()
    bar.phase("rollout", 1, 2)
    bar.on_train_batch_end(trainer)
    assert capsys.readouterr().out == ""


def test_a_terminal_without_cursor_movement_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setenv("TERM", "dumb")
    assert not progress.is_interactive()
    monkeypatch.setenv("TERM", "xterm")
    assert progress.is_interactive()

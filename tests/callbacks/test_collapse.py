"""Guards act when they are told to, not before, and count on in a run that is taken up."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from rlhf_lightning.callbacks import KLBudget, LengthDrift, RepetitionGuard, RewardDivergence
from rlhf_lightning.callbacks.collapse import CollapseGuard
from rlhf_lightning.errors import UserError


class Logs(pl.LightningModule):
    """Logs given metrics: one row a step, one a validation."""

    def __init__(self, steps: Sequence[dict[str, float]], validations: Sequence[dict[str, float]] = ()) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.steps, self.validations, self.validated = steps, validations, 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log_dict(self.steps[self.global_step])
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.log_dict(self.validations[self.validated])
            self.validated += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(guard: CollapseGuard, module: Logs, folder: Path, **options: Any) -> pl.Trainer:
    """Train as many steps as the module has rows, and validate after each two of them where it has some."""
    ckpt_path = options.pop("ckpt_path", None)
    trainer = pl.Trainer(
        max_steps=len(module.steps),
        val_check_interval=2,
        limit_val_batches=1.0 if module.validations else 0,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[guard],
        **options,
    )
    data: DataLoader[Any] = DataLoader(list(range(len(module.steps))), batch_size=1)  # type: ignore[arg-type]
    trainer.fit(module, data, data, ckpt_path=ckpt_path)
    return trainer


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings so far."""
    return [record.getMessage() for record in caplog.records if record.name == "rlhf_lightning"]


def rows(name: str, *values: float) -> list[dict[str, float]]:
    """Return a row for each value of one metric."""
    return [{name: value} for value in values]


@pytest.mark.parametrize(
    ("guard", "metric", "values", "steps", "words"),
    [
        (
            KLBudget(5, patience=2),
            "rollout/kl",
            [1, 6, 4, 6, 5.1, 1],
            5,
            "rollout/kl is 5.1 nats, above the budget of 5",
        ),
        (KLBudget(5, patience=1), "rollout/kl", [5, 5, 5], 3, None),
        (RepetitionGuard(0.5, "stop", 1), "rollout/repetition", [0.5, 0.51, 0], 2, "51% of the 4-grams"),
        (LengthDrift(2, 2, "stop", 1), "rollout/response_length", [8, 12, 20, 5, 4.9, 9], 5, "4.9 tokens where"),
        (LengthDrift(2, 2, "stop", 1), "rollout/response_length", [8, 12, 20.1, 9], 3, "iterations had 10"),
        (KLBudget(5, patience=1), "train/loss", [9, 9], 2, None),  # a run that has no such metric
    ],
)
def test_a_run_ends_when_it_is_time(
    guard: CollapseGuard,
    metric: str,
    values: list[float],
    steps: int,
    words: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = fit(guard, Logs(rows(metric, *values)), tmp_path)
    assert trainer.global_step == steps
    if words is None:
        assert said(caplog) == []
        return
    (warning,) = said(caplog)
    assert warning.startswith(f"{type(guard).__name__} at step {steps}: ")
    assert words in warning
    assert warning.endswith("the run ends here.")


def test_a_warning_comes_once_until_all_is_well_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Logs(rows("rollout/kl", 9, 9, 9, 9, 1, 9, 9, 9))
    trainer = fit(KLBudget(5, "warn", patience=2), module, tmp_path)
    assert trainer.global_step == 8
    assert [line.split(":")[0] for line in said(caplog)] == ["KLBudget at step 2", "KLBudget at step 7"]


SCORES = [{"rollout/score": value, "rollout/score_std": 1.0} for value in (0, 2, 2, 4, 4, 6, 6, 8, 8, 10)]


def test_held_out_reward_that_falls_while_that_of_training_rises_ends_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoints").mkdir()
    best = tmp_path / "checkpoints" / "best.ckpt"
    best.touch()
    module = Logs(SCORES, rows("val/score", 3, 4, 3.9, 3.7, 3.7))  # the third lies within min_drop
    trainer = fit(RewardDivergence(min_drop=0.2, patience=2), module, tmp_path)
    assert trainer.global_step == 10
    expected = "val/score fell from 4 to 3.7 while rollout/score rose from 3 to 9; the run ends here."
    assert said(caplog) == [f"RewardDivergence at step 10: {expected} The best checkpoint is {best}."]


@pytest.mark.parametrize(
    ("training", "held_out"),
    [
        (SCORES, [3, 4, 3, 4.1, 3]),  # never twice in a row
        (list(reversed(SCORES)), [3, 4, 3, 2, 1]),  # both fall: it learns nothing, but fools nobody
        (SCORES, [1, 2, 3, 4, 5]),
    ],
)
def test_else_it_goes_on(
    training: list[dict[str, float]], held_out: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guard = RewardDivergence(min_drop=0.2, patience=2)
    assert fit(guard, Logs(training, rows("val/score", *held_out)), tmp_path).global_step == 10
    assert said(caplog) == []


@pytest.mark.parametrize(
    ("guard", "training", "held_out"),
    [
        (lambda: KLBudget(5, patience=3), rows("rollout/kl", 1, 1, 6, 6, 6, 6), []),
        (lambda: LengthDrift(2, 3, "stop", 2), rows("rollout/response_length", 4, 5, 6, 12, 12, 12), []),
        (lambda: RewardDivergence(patience=1), SCORES[:6], rows("val/score", 2, 3, 1)),
    ],
)
def test_a_run_that_is_taken_up_ends_where_it_would_have(
    guard: Any, training: list[dict[str, float]], held_out: list[dict[str, float]], tmp_path: Path
) -> None:
    straight = fit(guard(), Logs(training, held_out), tmp_path)
    assert straight.should_stop
    cut = guard()
    first = fit(cut, Logs(training[:4], held_out[:2]), tmp_path)
    path = tmp_path / "cut.ckpt"
    first.save_checkpoint(path)
    module = Logs(training, held_out)
    module.validated = len(held_out[:2])
    again = fit(guard(), module, tmp_path, ckpt_path=path)
    assert (again.global_step, again.should_stop) == (straight.global_step, True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: KLBudget(0), "budget is 0"),
        (lambda: KLBudget(float("nan")), "budget is nan"),
        (lambda: KLBudget(1, action="halt"), "action is 'halt'; it must be warn or stop"),  # type: ignore[arg-type]
        (lambda: KLBudget(1, patience=0), "patience is 0"),
        (lambda: RepetitionGuard(0), "limit is 0"),
        (lambda: LengthDrift(1), "factor is 1"),
        (lambda: LengthDrift(2, 0), "first is 0"),
        (lambda: RewardDivergence(-1), "min_drop is -1"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()

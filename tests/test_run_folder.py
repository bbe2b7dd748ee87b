from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelSummary

from rlhf_lightning.errors import UserError
from rlhf_lightning.run_folder import (
    RunCheckpoint,
    claim_run_dir,
    run_callbacks,
    run_loggers,
    set_aside_logs,
)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "WORLD_SIZE", "SLURM_NTASKS", "RLHF_LIGHTNING_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_unnamed_runs_take_the_first_free_number(tmp_path: Path) -> None:
    (tmp_path / "ppo-2").mkdir()
    assert [claim_run_dir(None, "ppo", root=tmp_path).name for _ in range(3)] == ["ppo-1", "ppo-3", "ppo-4"]
    assert claim_run_dir(tmp_path / "named", "ppo", root=tmp_path) == tmp_path / "named"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run_dir '.*file' cannot be made a folder: File exists"):
        claim_run_dir(tmp_path / "file", "ppo")


def test_processes_of_one_run_share_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = claim_run_dir(None, "ppo", root=tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert claim_run_dir(None, "ppo", root=tmp_path) == first


def test_processes_started_from_outside_must_name_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--run_dir"):
        claim_run_dir(None, "ppo", root=tmp_path)
    assert claim_run_dir(tmp_path / "named", "ppo", root=tmp_path).is_dir()


def names_of(command: str, **settings: Any) -> list[str]:
    return [type(callback).__name__ for callback in run_callbacks(command, settings)]


def test_callbacks_of_a_run_depend_on_what_is_run() -> None:
    always = ["UnfinishedWarning", "ModelLine", "PhaseProgressBar"]
    assert names_of("fit") == [*always, "SampleTable", "ChartLayout", "ExportModel", "RunCheckpoint"]
    assert names_of("test") == [*always, "SampleTable", "ChartLayout"]
    assert names_of("predict") == [*always, "SampleTable", "ChartLayout", "PredictionFile"]
    assert names_of("fit", fast_dev_run=True) == [*always, "RunCheckpoint"]
    assert "ModelLine" not in names_of("fit", enable_model_summary=False)
    assert "ModelLine" not in names_of("fit", callbacks=[ModelSummary()])
    assert "RunCheckpoint" not in names_of("fit", enable_checkpointing=False)
    assert "RunCheckpoint" not in names_of("fit", callbacks=RunCheckpoint(every_n_steps=1))
    assert "PhaseProgressBar" not in names_of("fit", enable_progress_bar=False)


def test_loggers_write_directly_into_the_folder(tmp_path: Path) -> None:
    assert {Path(str(logger.log_dir)) for logger in run_loggers(tmp_path) if logger.log_dir} == {tmp_path}


def test_logs_without_a_checkpoint_are_set_aside_whole(tmp_path: Path) -> None:
    for start in ("first", "second"):
        (tmp_path / "metrics.jsonl").write_text(start)
        (tmp_path / "events.out.tfevents.1").write_text(start)
        (tmp_path / "config.yaml").write_text("stays")
        set_aside_logs(tmp_path)
    kept = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert kept == {
        "config.yaml": "stays",
        "earlier-1/metrics.jsonl": "first",
        "earlier-1/events.out.tfevents.1": "first",
        "earlier-2/metrics.jsonl": "second",
        "earlier-2/events.out.tfevents.1": "second",
    }

"""Pipelines of two trainings and a comparison, with models of a few thousand parameters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file

from rlhf_lightning.__main__ import main

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
TRAINER = {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False}
DATA = {
    "class_path": "DemonstrationDataModule",
    "init_args": {
        "source": "builtin:demo/train",
        "limit": 16,
        "batch_size": 4,
        "max_length": 64,
        "max_prompt_length": 32,
    },
}
SFT: dict[str, Any] = {"class_path": "SFTModule", "init_args": {"model": "builtin:demo"}}
COMPARE = {"prompts": "builtin:demo/eval_prompts", "limit": 2, "sampling": {"max_new_tokens": 3}, "device": "cpu"}


class BreakOnce(Callback):
    """Stands for a process that is killed at some step, the first time."""

    def __init__(self, marker: str, step: int) -> None:
        self.marker, self.step = marker, step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not Path(self.marker).exists():
            Path(self.marker).touch()
            raise RuntimeError("killed")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline of first -> second -> compare in the working directory."""
    monkeypatch.chdir(tmp_path)
    first = {"pretrained": False, "config_overrides": TINY}
    save("first.yaml", {"model": {**SFT, "init_args": {**SFT["init_args"], **first}}, "data": DATA, "trainer": TRAINER})
    save("second.yaml", {"model": SFT, "data": DATA, "trainer": TRAINER})
    save("compare.yaml", {"models": {}, **COMPARE})
    stages = [
        {"name": "first", "command": "fit", "config": "first.yaml"},
        {"name": "second", "command": "fit", "config": "second.yaml", "set": {"model.model": "{run_dir}/first/model"}},
        {
            "name": "compare",
            "command": "compare",
            "config": "compare.yaml",
            "set": {"models.first": "{run_dir}/first/model", "models.second": "{run_dir}/second/model"},
        },
    ]
    save("pipeline.yaml", {"run_dir": "runs", "stages": stages})
    return tmp_path


def save(name: str, content: Any) -> None:
    Path(name).write_text(yaml.safe_dump(content))


def change(name: str, *path: str, to: Any) -> None:
    content = yaml.safe_load(Path(name).read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    save(name, content)


def pipeline(*more: str) -> int:
    return main(["pipeline", "--config", "pipeline.yaml", *more])


def runs_of(*names: str, root: str = "runs") -> list[str]:
    return [json.loads(Path(root, name, "stage.json").read_text())["run"] for name in names]


@pytest.mark.usefixtures("folder")
def test_pipeline_runs_skips_and_repeats_what_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline() == 0
    out = capsys.readouterr().out
    assert out.rstrip().splitlines()[-3:-1] == [
        "report: runs/compare/report.html",
        "markdown: runs/compare/report.md",
    ]
    assert Path("runs/compare/report.html").exists()
    first, second = runs_of("first", "second")
    before = load_file("runs/first/model/model.safetensors")
    after = load_file("runs/second/model/model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)

    assert pipeline() == 0
    again = capsys.readouterr().out
    assert again.count("finished earlier, skipped") == 3
    assert "report: runs/compare/report.html" in again
    assert runs_of("first", "second") == [first, second]

    change("second.yaml", "trainer", "max_steps", to=2)
    assert pipeline() == 0
    told = capsys.readouterr().out
    assert "second: has other inputs than before; its old folder is kept as runs/second.old-1" in told
    assert "compare: an earlier stage has run again; its old folder is kept as runs/compare.old-1" in told
    assert runs_of("first") == [first]
    assert runs_of("second") != [second]
    assert runs_of("second.old-1") == [second]


@pytest.mark.usefixtures("folder")
def test_interrupted_stage_is_taken_up_and_ends_as_if_it_never_was(capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [
        {"class_path": "RunCheckpoint", "init_args": {"every_n_steps": 2}},
        {"class_path": "BreakOnce", "init_args": {"marker": "broken", "step": 3}},
    ]
    change("first.yaml", "trainer", "callbacks", to=callbacks)
    only = ("--stages", "first")
    with pytest.raises(RuntimeError, match="killed"):
        pipeline(*only)
    assert torch.load("runs/first/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert pipeline(*only) == 0
    assert "first: taken up from runs/first/checkpoints/last.ckpt" in capsys.readouterr().out
    assert pipeline("--run_dir", "whole", *only) == 0  # the marker is there: nothing breaks
    cut = load_file("runs/first/model/model.safetensors")
    whole = load_file("whole/first/model/model.safetensors")
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_stage_of_two_processes_runs_in_processes_of_its_own() -> None:
    change("first.yaml", "trainer", "devices", to=2)
    assert pipeline("--stages=first") == 0
    assert json.loads(Path("runs/first/stage.json").read_text())["status"] == "done"
    # Four batches of four in an epoch of sixteen, whatever the number of processes.
    assert torch.load("runs/first/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert not Path("runs/first.old-1").exists()


@pytest.mark.usefixtures("folder")
def test_stage_that_broke_before_its_first_checkpoint_starts_anew(capsys: pytest.CaptureFixture[str]) -> None:
    change(
        "first.yaml", "trainer", "callbacks", to=[{"class_path": "BreakOnce", "init_args": {"marker": "m", "step": 1}}]
    )
    with pytest.raises(RuntimeError, match="killed"):
        pipeline("--stages=first")
    assert pipeline("--stages=first") == 0
    assert "was interrupted before its first checkpoint; its old folder is kept as" in capsys.readouterr().out
    assert Path("runs/first/model/config.json").exists()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "path", "line"),
    [
        ("second.yaml", ("model", "init_args", "modl"), "'model.modl' is not a key of SFTModule."),
        ("compare.yaml", ("promts",), "'promts' is not a key. Did you mean 'prompts'?"),
    ],
)
def test_typo_in_a_later_stage_ends_before_the_first(
    name: str, path: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(name, *path, to="x")
    assert pipeline() == 2
    err = capsys.readouterr().err
    assert f"error: {line}" in err
    assert f"in stage {name.removesuffix('.yaml')}; no stage was started." in err
    assert not Path("runs").exists()


@pytest.mark.usefixtures("folder")
def test_number_that_a_later_stage_refuses_ends_before_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    change("second.yaml", "data", "init_args", "max_prompt_length", to=100)
    assert pipeline() == 2
    err = capsys.readouterr().err
    assert err.startswith("error: stage second: max_prompt_length is 100 and max_length 64;")
    assert err.endswith("(No stage was started.)\n")
    assert not Path("runs").exists()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "path", "line"),
    [
        ("second.yaml", ("data", "init_args", "source"), "stage second: data file './nothing' does not exist."),
        ("second.yaml", ("data", "init_args", "val_source"), "stage second: data file './nothing' does not exist."),
        ("compare.yaml", ("prompts",), "stage compare: data file './nothing' does not exist."),
        ("compare.yaml", ("models", "old"), "stage compare: model folder './nothing' does not exist."),
        (
            "compare.yaml",
            ("judges", "j", "init_args", "path"),
            "stage compare: model folder './nothing' does not exist.",
        ),
        ("compare.yaml", ("likelihood", "seen", "source"), "stage compare: data file './nothing' does not exist."),
    ],
)
def test_missing_input_of_a_later_stage_ends_before_the_first(
    name: str, path: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = {"class_path": "RewardModel", "init_args": {}}
    change("compare.yaml", "judges", to={"j": judge} if "judges" in path else {})
    change("compare.yaml", "likelihood", to={"seen": {}} if "likelihood" in path else {})
    change(name, *path, to="./nothing")
    assert pipeline() == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line}")
    assert err.endswith("(No stage was started.)\n")
    assert not Path("runs").exists()


@pytest.mark.usefixtures("folder")
def test_a_stage_that_is_left_out_and_was_never_run_ends_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    """Its folder lies in the pipeline's own, but no stage before is going to write it."""
    assert pipeline("--stages", "first,compare") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: stage compare: model folder 'runs/second/model' does not exist")
    assert err.endswith("(No stage was started.)\n")
    assert not Path("runs").exists()


@pytest.mark.usefixtures("folder")
def test_missing_config_ends_before_the_first_stage(capsys: pytest.CaptureFixture[str]) -> None:
    Path("compare.yaml").rename("comparison.yaml")
    assert pipeline() == 2
    assert capsys.readouterr().err == "error: no file compare.yaml. Did you mean 'comparison.yaml'?\n"


@pytest.mark.usefixtures("folder")
def test_mistake_within_a_stage_names_the_stage(capsys: pytest.CaptureFixture[str]) -> None:
    change("first.yaml", "data", "init_args", "source", to="nothing.jsonl")
    assert pipeline() == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: stage first: ")


@pytest.mark.usefixtures("folder")
def test_mistaken_options_take_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline("--stages", "frist") == 2
    assert capsys.readouterr().err == "error: pipeline.yaml has no stage 'frist'. Did you mean 'first'?\n"
    assert main(["pipeline", "--confg", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: the following arguments are required: --config.")

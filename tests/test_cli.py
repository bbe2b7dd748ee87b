"""The Trainer's commands on a module of one weight, and on a tiny language model."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rlhf_lightning.__main__ import main
from rlhf_lightning.checkpoint_files import CHECKPOINT_KEY
from rlhf_lightning.cli import check_command, needs_processes
from rlhf_lightning.errors import UserError
from rlhf_lightning.loggers import read_metrics
from rlhf_lightning.modules.base import ModelModule


class Penalty:
    def __init__(self, coef: float = 0.1) -> None:
        if coef < 0:
            raise UserError(f"coef is {coef}; give 0 or more.")
        self.coef = coef


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


class WeightModule(ModelModule):
    """Minimises ``scale * weight²`` from ``weight = 1``: each step multiplies the weight by ``1 - 0.2 scale``."""

    def __init__(
        self, scale: float = 1.0, fails: str = "", penalty: Penalty | None = None, size: int = 1, layer: bool = False
    ) -> None:
        super().__init__("none", sgd, None)
        self.has_layer = layer
        self.scale, self.fails, self.size = scale, fails, size
        self.save_hyperparameters(ignore=["penalty"])

    def configure_model(self) -> None:
        if not hasattr(self, "weight"):
            self.weight = nn.Parameter(torch.ones(self.size))
            if self.has_layer:
                self.layer = nn.Linear(2, 2)

    def setup(self, stage: str) -> None:
        if self.fails == "setup":
            raise UserError("the data has no column 'chosen'.\nAdd it.")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.fails == "step" or (self.fails == "third step" and batch_idx == 2):
            raise UserError("row 3 is too long.")
        if self.fails == "bug":
            raise RuntimeError("a bug")
        loss = self.scale * self.weight.square().sum()
        self.log("train/loss", loss.detach())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.scale * self.weight.square().sum())

    def export_model(self, directory: str | Path) -> None:
        Path(directory).mkdir()
        (Path(directory) / "weight").write_text(str(self.weight.sum().item()))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = {"frozen": {}}
        if self.fails == "pickle":
            checkpoint["object"] = Penalty()


class ZerosDataModule(LightningDataModule):
    def __init__(self, rows: int = 4) -> None:
        super().__init__()
        self.rows = rows

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.zeros(self.rows, 1))  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Tensor]:
        return self.train_dataloader()


class Recorder(Callback):
    seen: tuple[str, ...] = ()

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        Recorder.seen = tuple(type(callback).__name__ for callback in trainer.callbacks)  # type: ignore[attr-defined]


class StopSignal(Callback):
    """Sends a signal within the third step."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.Signals[self.name])


BASE = ["--model=WeightModule", "--data=ZerosDataModule", "--trainer.accelerator=cpu"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fit(*more: str, command: str = "fit") -> int:
    return main([command, *BASE, *QUIET, *more])


def losses(folder: str, key: str = "train/loss") -> list[float]:
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    return lines[0].removeprefix("error: ")


def test_run_leaves_one_folder_with_everything() -> None:
    assert fit("--run_dir=run") == 0
    names = {path.name for path in Path("run").iterdir()}
    assert {"config.yaml", "checkpoints", "metrics.jsonl", "model"} <= names
    assert sum(name.startswith("events.out.tfevents") for name in names) == 1
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["last.ckpt"]
    assert losses("run") == pytest.approx([0.64**step for step in range(4)])
    assert float(Path("run/model/weight").read_text()) == pytest.approx(0.8**4)
    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]["weight"].item() == pytest.approx(0.8**4)
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["run_dir"] == "run"
    assert config["seed_everything"] == 42


def test_runs_without_a_name_are_numbered() -> None:
    assert fit() == 0
    assert fit() == 0
    assert fit(command="validate") == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["weight-1", "weight-2", "weight-validate-1"]


def test_the_same_command_again_goes_on_where_it_ended(caplog: pytest.LogCaptureFixture) -> None:
    assert fit("--run_dir=run", "--trainer.max_steps=2") == 0
    first = read_metrics(Path("run", "metrics.jsonl"))
    with caplog.at_level("INFO", logger="rlhf_lightning"):
        assert fit("--run_dir=run", "--trainer.max_steps=2") == 0  # and there is nothing left to do
    assert "run holds a run, which is taken up" in caplog.text
    assert read_metrics(Path("run", "metrics.jsonl")) == first
    assert fit("--run_dir=run", "--trainer.max_steps=3") == 0
    rows = read_metrics(Path("run", "metrics.jsonl"))
    assert (rows[: len(first)], len(rows) > len(first)) == (first, True)


def test_resumed_run_continues_in_its_folder_and_keeps_the_earlier_config() -> None:
    assert fit("--run_dir=run", "--ckpt_path=auto") == 0  # nothing to take up yet
    assert fit("--run_dir=run", "--ckpt_path=auto", "--trainer.max_epochs=2") == 0
    assert losses("run") == pytest.approx([0.64**step for step in range(8)])
    assert yaml.safe_load(Path("run/config.1.yaml").read_text())["trainer"]["max_epochs"] is None
    assert yaml.safe_load(Path("run/config.yaml").read_text())["trainer"]["max_epochs"] == 2
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 8


def test_checkpoint_never_overrides_the_config() -> None:
    assert fit("--run_dir=run") == 0
    assert fit("--run_dir=again", "--ckpt_path=run/checkpoints/last.ckpt", "--model.scale=3", command="validate") == 0
    assert losses("again", "val/loss") == pytest.approx([3 * 0.64**4])
    assert Path("again/config.validate.yaml").exists()


def test_missing_checkpoint_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--run_dir=run") == 0
    assert fit("--ckpt_path=run/checkpoints/lst.ckpt") == 2
    assert error_line(capsys) == "checkpoint 'run/checkpoints/lst.ckpt' does not exist. Did you mean 'last.ckpt'?"


def test_checkpoint_of_another_model_takes_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--run_dir=run") == 0
    assert fit("--ckpt_path=run/checkpoints/last.ckpt", "--model.size=2") == 2
    assert error_line(capsys).startswith("the checkpoint does not fit this WeightModule: ")


def test_checkpoint_with_objects_is_not_loaded_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--run_dir=run", "--model.fails=pickle") == 0
    assert fit("--run_dir=run", "--ckpt_path=last", "--trainer.max_epochs=2") == 2
    assert "--weights_only false" in error_line(capsys)
    assert fit("--run_dir=run", "--ckpt_path=last", "--trainer.max_epochs=2", "--weights_only=false") == 0


def test_printed_config_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--model.scale=2", "--print_config") == 0
    text = capsys.readouterr().out
    Path("printed.yaml").write_text(text.replace("scale: 2.0", "scale: 0.5"))
    assert main(["fit", "--config=printed.yaml", "--run_dir=run"]) == 0
    assert losses("run") == pytest.approx([0.5 * 0.81**step for step in range(4)])


def test_printed_config_of_a_real_module_runs_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = "{hidden_size: 16, intermediate_size: 32, num_attention_heads: 2, num_key_value_heads: 2}"
    arguments = ["--model=SFTModule", "--model.model=builtin:demo", "--model.pretrained=false"]
    arguments += [f"--model.config_overrides={tiny}", "--model.lr_scheduler=CosineDecay"]
    arguments += ["--data=DemonstrationDataModule", "--data.source=builtin:demo/train", "--data.limit=8"]
    assert main(["fit", *arguments, *QUIET, "--trainer.accelerator=cpu", "--print_config"]) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    assert main(["fit", "--config=printed.yaml", "--trainer.fast_dev_run=1"]) == 0
    assert "error" not in capsys.readouterr().err


def test_null_and_short_names_reach_the_parts_of_a_module(capsys: pytest.CaptureFixture[str]) -> None:
    """A nested null once came out as the text 'None'."""
    config = Path(__file__).parents[1] / "configs" / "demo" / "ppo.yaml"
    given = ["--model.advantages=GAE", "--model.advantages.whiten", "null", "--model.critic.init_from=null"]
    given += [
        "--model.sampler=CachedSampler",
        "--model.sampler.decode_batch_size=8",
        "--model.sampling.stop_tokens=null",
    ]
    assert main(["fit", f"--config={config}", *given, "--print_config"]) == 0
    model = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert model["advantages"]["init_args"]["whiten"] is None
    assert model["critic"]["init_args"]["init_from"] is None
    assert model["sampling"]["stop_tokens"] is None
    assert model["sampler"]["class_path"].endswith(".CachedSampler")
    assert model["sampler"]["init_args"]["decode_batch_size"] == 8


def test_own_callbacks_are_added_to_those_of_the_run() -> None:
    assert fit("--run_dir=run", "--trainer.callbacks=Recorder") == 0
    assert {"Recorder", "SampleTable", "ChartLayout", "ExportModel", "RunCheckpoint", "SaveRunConfig"} <= {
        *Recorder.seen
    }
    assert "PhaseProgressBar" not in Recorder.seen  # switched off by its setting


def test_configured_callback_takes_the_place_of_the_run_s() -> None:
    arguments = ["--trainer.callbacks=Recorder", "--trainer.callbacks+=RunCheckpoint"]
    assert fit("--run_dir=run", *arguments, "--trainer.callbacks.every_n_steps=3", "--trainer.max_steps=3") == 0
    assert Recorder.seen.count("RunCheckpoint") == 1


def test_own_choice_of_logger_stays() -> None:
    assert fit("--run_dir=run", "--trainer.logger=false") == 0
    assert not Path("run/metrics.jsonl").exists()
    assert Path("run/checkpoints/last.ckpt").exists()


def test_fast_dev_run_leaves_nothing() -> None:
    assert fit("--run_dir=run", "--trainer.fast_dev_run=true") == 0
    assert list(Path().rglob("*.ckpt")) == []
    assert not Path("run/model").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--model.fails=setup"], "the data has no column 'chosen'. Add it."),
        (["--model.fails=step"], "row 3 is too long."),
        (["--model.penalty=Penalty", "--model.penalty.coef=-1"], "coef is -1.0; give 0 or more."),
        (["--trainer.devices=0"], "`Trainer(devices='0')` value is not a valid input using cpu accelerator."),
        (["--ckpt_path=auto"], "--ckpt_path auto looks into the run folder: name it with --run_dir DIR."),
        (["--model.scal=1"], "'model.scal' is not a key of WeightModule. Did you mean 'model.scale'?"),
        (["--trainer.max_epoch=1"], "'trainer.max_epoch' is not a key. Did you mean 'trainer.max_epochs'?"),
        (["--trainer.max_epochs=x"], "trainer.max_epochs is 'x', expected an integer or null"),
        (["--model.scale=high"], "model.scale is 'high', expected a number"),
        (["--model=WeigthModule"], "model: there is no class 'WeigthModule'. Did you mean 'WeightModule'?"),
        (["--data=ZeroDataModule"], "data: there is no class 'ZeroDataModule'. Did you mean 'ZerosDataModule'?"),
    ],
)
def test_users_mistake_takes_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(*arguments) == 2
    assert error_line(capsys) == line


def test_settings_that_the_trainer_refuses_leave_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.strategy=nothing") == 2
    assert error_line(capsys).startswith("You selected an invalid strategy name: `strategy='nothing'`.")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("arguments", [["--model.fails=setup"], ["--model.fails=step"], ["--trainer.strategy=nothing"]])
def test_a_start_that_fails_leaves_nothing_behind(arguments: list[str], tmp_path: Path) -> None:
    assert fit(*arguments) == 2
    assert fit(*arguments, "--run_dir=some/where") == 2
    assert list(tmp_path.rglob("*")) == []
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    assert fit(*arguments, "--run_dir=mine") == 2
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["mine", "mine/notes.txt"]


def test_a_failure_after_work_was_done_leaves_the_run() -> None:
    assert fit("--run_dir=run", "--model.fails=third step") == 2
    assert len(losses("run")) == 2
    assert list(Path("run").glob("events.out.tfevents.*"))
    assert Path("run/config.yaml").exists()


def test_a_resumption_that_fails_leaves_the_earlier_run_as_it_was() -> None:
    assert fit("--run_dir=run") == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    arguments = ["--run_dir=run", "--ckpt_path=auto", "--trainer.max_epochs=2", "--model.size=2"]
    assert fit(*arguments) == 2
    after = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert {path for path in before if after.get(path) != before[path]} <= {Path("run/config.yaml")}
    assert after.keys() - before.keys() <= {Path("run/config.1.yaml")}


def test_a_run_is_not_taken_up_to_do_less_than_it_has_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--run_dir=run", "--trainer.max_steps=3") == 0
    again = ["--run_dir=run", "--ckpt_path=auto"]
    assert fit(*again, "--trainer.max_steps=2") == 2
    assert error_line(capsys) == (
        "'run/checkpoints/last.ckpt' was written after 3 steps, more than trainer.max_steps 2; set more to go on from "
        "it."
    )
    assert fit(*again, "--trainer.max_steps=3") == 0  # as a run that was killed between its last step and its export
    assert fit(*again, "--trainer.max_steps=4") == 0
    assert len(losses("run")) == 4


def test_what_is_evaluated_lies_within_the_run_that_it_came_from() -> None:
    assert fit("--run_dir=run") == 0
    for _ in range(2):
        assert fit("--ckpt_path=run/checkpoints/last.ckpt", command="validate") == 0
    assert losses("run/validate-2", "val/loss") == pytest.approx([0.64**4])
    assert not Path("runs").exists()


def test_start_and_end_take_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*BASE, "--trainer.enable_progress_bar=false", "--run_dir=run"]
    assert main(["fit", *arguments, "--model.layer=true"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert "models: layer 6 parameters, trained" in said
    assert "model written to run/model" in said
    assert [line for line in said if "FLOPs" in line or "summary" in line] == []


def test_bug_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        fit("--model.fails=bug")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_request_to_stop_saves_and_ends_with_its_own_status(name: str, status: int) -> None:
    assert fit("--run_dir=run", "--trainer.callbacks=StopSignal", f"--trainer.callbacks.name={name}") == status
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    assert not Path("run/model").exists()
    assert fit("--run_dir=run", "--ckpt_path=last") == 0
    assert float(Path("run/model/weight").read_text()) == pytest.approx(0.8**4)


def test_check_builds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    settings = check_command(["fit", *BASE, "--model.fails=setup", "--run_dir=run"])
    assert settings.model.init_args.fails == "setup"
    assert not Path("run").exists()
    with pytest.raises(SystemExit) as ending:
        check_command(["fit", *BASE, "--model.scal=1"])
    assert ending.value.code == 2


@pytest.mark.parametrize(
    ("devices", "many"), [("auto", False), ("1", False), ("2", True), ("[0]", False), ("[0,1]", True), ("0,1", True)]
)
def test_runs_of_several_processes_are_told_from_those_of_one(devices: str, many: bool) -> None:
    settings = check_command(["fit", *BASE, f"--trainer.devices={devices}"])
    assert needs_processes(settings) is many

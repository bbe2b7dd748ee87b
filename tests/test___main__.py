import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning import __version__
from rlhf_lightning.__main__ import COMMANDS, main

SLOW_TO_IMPORT = ("torch", "lightning", "transformers", "datasets", "jsonargparse")


@pytest.mark.parametrize("word", ["--help", "--version", "fitt"])
def test_short_answers_come_at_once_and_import_nothing_slow(word: str) -> None:
    code = (
        "import sys; from rlhf_lightning.__main__ import main; status = main(sys.argv[1:]); "
        f"print('imported', [name for name in {SLOW_TO_IMPORT} if name in sys.modules]); sys.exit(status)"
    )
    times = []
    for _ in range(3):  # the best of three, as other processes may hold the cores
        start = time.monotonic()
        answer = subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True, check=False)
        times.append(time.monotonic() - start)
        assert answer.returncode == (2 if word == "fitt" else 0), answer.stderr
        assert "imported []" in answer.stdout
    assert min(times) < 1.0


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command}" in text for command in COMMANDS)


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlhf_lightning {__version__}\n"


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("fitt", "error: there is no command 'fitt'. Did you mean 'fit'?"),
        ("pipelin", "error: there is no command 'pipelin'. Did you mean 'pipeline'?"),
        ("zzz", f"error: there is no command 'zzz'. Commands: {', '.join(COMMANDS)}."),
        (
            "--config",
            "error: there is no command '--config'. Options go after the command: rlhf-lightning fit --config ...",
        ),
    ],
)
def test_mistyped_command_takes_one_line(word: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 2
    assert capsys.readouterr().err.splitlines() == [line]


def test_no_command_is_a_mistake_that_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: rlhf-lightning <command>" in capsys.readouterr().out


def test_module_and_console_script_run_the_same() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "rlhf_lightning", "compar"], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 2
    assert answer.stderr == "error: there is no command 'compar'. Did you mean 'compare'?\n"


class LogsOnFullDisk(Callback):
    """From the second step on, no line of metrics.jsonl can be written."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            Path("run/metrics.jsonl").unlink()
            Path("run/metrics.jsonl").symlink_to("/dev/full")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_ends_a_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = "{hidden_size: 16, intermediate_size: 32, num_attention_heads: 2, num_key_value_heads: 2}"
    model = ["--model=SFTModule", "--model.model=builtin:demo", "--model.pretrained=false"]
    data = ["--data=DemonstrationDataModule", "--data.source=builtin:demo/train", "--data.limit=16"]
    more = ["--data.batch_size=4", "--trainer.accelerator=cpu", "--run_dir=run", f"--model.config_overrides={tiny}"]
    assert main(["fit", *model, *data, *more, f"--trainer.callbacks={__name__}.LogsOnFullDisk"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == ["error: No space left on device; make room and start the same command again."]

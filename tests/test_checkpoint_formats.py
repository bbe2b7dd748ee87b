"""Checkpoints of earlier releases, as tools/record_checkpoint.py wrote them, are taken up and exported."""

import gzip
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rlhf_lightning.__main__ import main
from rlhf_lightning.checkpoint_files import CHECKPOINT_FORMAT, CHECKPOINT_KEY
from rlhf_lightning.loggers import read_metrics

RECORDED = Path(__file__).parent / "checkpoints"


@pytest.fixture(params=range(1, CHECKPOINT_FORMAT + 1))
def recorded(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with the checkpoints of a format, unpacked."""
    for packed in (RECORDED / f"format-{request.param}").glob("*.gz"):
        (tmp_path / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    for path in tmp_path.glob("*.ckpt"):
        assert torch.load(path, weights_only=True)[CHECKPOINT_KEY]["format"] == request.param
    return tmp_path


def test_runs_of_earlier_releases_go_on(recorded: Path, load_tool: Callable[[str], ModuleType]) -> None:
    tool = load_tool("record_checkpoint")
    start = recorded / "start"
    assert main(["export", f"--ckpt={recorded / 'sft.ckpt'}", f"--output={start}"]) == 0
    arguments = {"sft": tool.SFT, "ppo": tool.ppo(start, tool.write_reward(recorded))}
    for name, own in arguments.items():
        run_dir, more = recorded / name, [f"--trainer.max_steps={tool.STEPS + 1}"]
        assert main(["fit", *own, *more, f"--ckpt_path={recorded / f'{name}.ckpt'}", f"--run_dir={run_dir}"]) == 0
        logged = [row for row in read_metrics(run_dir / "metrics.jsonl") if "train/lr" in row]
        assert [row["step"] for row in logged] == [tool.STEPS]
        assert math.isfinite(logged[0].get("train/loss", 0.0))
        assert (run_dir / "model" / "model.safetensors").exists()


def test_a_newer_format_is_refused_by_every_command(
    recorded: Path, load_tool: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    path = recorded / "sft.ckpt"
    state = torch.load(path, weights_only=True)
    state[CHECKPOINT_KEY]["format"] = CHECKPOINT_FORMAT + 1
    torch.save(state, path)
    own = [*load_tool("record_checkpoint").SFT, f"--ckpt_path={path}", f"--run_dir={recorded / 'run'}"]
    commands = [[name, *own] for name in ("fit", "validate", "test", "predict")]
    for command in [*commands, ["export", f"--ckpt={path}", f"--output={recorded / 'model'}"]]:
        assert main(command) == 2
        assert f"was written by a newer rlhf_lightning (format {CHECKPOINT_FORMAT + 1}" in capsys.readouterr().err

"""The benchmark of what passes before the first step: its forms agree, and a fit is stopped at its first step."""

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rlhf_lightning.modules.sft import SFTModule


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    return importlib.import_module("benchmark_start")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [{"prompt": f"Hi {n}", "chosen": "yes", "rejected": "no", "other": 1} for n in range(3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "pairs.jsonl"


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_start.py", *arguments])
    tool.main()


def test_rows_that_are_read_again_are_other_texts(tool: ModuleType, pairs: Path, tmp_path: Path) -> None:
    tool.write_pairs(str(pairs), 7, tmp_path / "more.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "more.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) == 7
    assert rows[6] == {"prompt": "Hi 0 (2)", "chosen": "yes (2)", "rejected": "no (2)"}


@pytest.mark.parametrize("plain", [[], ["--plain"]])
def test_each_form_is_told(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, pairs: Path, plain: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--source", str(pairs), "--tokenizer", "builtin:demo", "--rows", "5", "--rounds", "2", *plain]
    run(tool, monkeypatch, "tokenise", *settings)
    told = capsys.readouterr().out.splitlines()
    forms = ["a text a call", "together", "together, ids kept", "ids from the disk"]
    assert [line.split("  ")[0].strip() for line in told] == forms
    assert all(re.search(r"wall \d+\.\d\d s \(.*\), CPU \d", line) for line in told)


@pytest.mark.slow
def test_a_fit_is_stopped_at_its_first_step(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SFTModule("builtin:demo", pretrained=False).export_model(str(tmp_path / "start"))
    config = Path(__file__).parents[2] / "configs" / "demo" / "reward.yaml"
    fit = ["fit", "--config", str(config), "--model.model", str(tmp_path / "start"), "--data.limit", "50"]
    run(tool, monkeypatch, "start", "--rounds", "1", "--", *fit)
    assert re.search(r"--help +wall \d.*\nfirst step wall \d+\.\d\d s \(.*\), CPU \d", capsys.readouterr().out)

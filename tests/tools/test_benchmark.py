"""The benchmark's own side takes turns and says where its time went; responses stop where they are told to."""

import argparse
import importlib
import json
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rlhf_lightning.models.loading import resolve_model
from rlhf_lightning.rollout import decoding


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(decoding, "DecodeLoop", decoding.DecodeLoop)  # which a side replaces by its own
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    return importlib.import_module("benchmark")


@pytest.fixture
def options(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    command = "benchmark.py --batch 4 --prompt 6 --response 12 --mean_length 5 --epochs 2 --rounds 2 --sides ours:2"
    changes = "--change hidden_size=32 num_hidden_layers=1 intermediate_size=32"
    monkeypatch.setattr(
        sys, "argv", [*command.split(), "--shape", str(resolve_model("builtin:demo")), *changes.split()]
    )
    return tool.parse()


def test_planned_lengths_have_the_mean_and_are_alike_in_all_rounds(
    tool: ModuleType, options: argparse.Namespace
) -> None:
    sides = importlib.import_module("benchmark_sides")
    options.batch, options.response, options.mean_length = 32, 128, 48
    lengths = sides.planned_lengths(options)
    assert lengths.shape == (3, 32)
    assert lengths[0].double().mean().item() == pytest.approx(48, abs=0.5)
    assert (int(lengths.min()), int(lengths.max())) == (1, 128)
    assert (lengths == 128).sum() < 3 * 6  # most of them stop
    assert all(torch.equal(row.sort().values, lengths[0].sort().values) for row in lengths)
    assert not torch.equal(lengths[0], lengths[1])


def test_our_side_makes_one_iteration_a_turn(
    tool: ModuleType, options: argparse.Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool.write_models(options, tmp_path)
    start = time.process_time()
    seconds, lengths = tool.run_turns(options, tmp_path)
    spent = time.process_time() - start
    floors = seconds.pop("floor")
    assert [sorted(floor) for floor in floors] == [["scoring", "update"]] * 2
    for floor, phases in zip(floors, seconds["ours:2"], strict=True):
        assert all(0 < floor[phase] < phases[phase] for phase in floor)
    assert len(seconds["ours:2"]) == 2  # the first turn counts for nothing
    for phases in seconds["ours:2"]:
        parts = [phases[phase] for phase in tool.PHASES[1:]]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(phases["iteration"])
    assert sum(phases["iteration"] for phases in seconds["ours:2"]) < spent
    planned = importlib.import_module("benchmark_sides").planned_lengths(options)
    assert lengths["ours:2"] == pytest.approx(planned[0].double().mean().item())  # of responses that end as planned
    capsys.readouterr()
    tool.report(options, 1234, seconds, lengths, {"ours:2": 100.0}, floors)
    table = capsys.readouterr().out.splitlines()
    expected = statistics.median(p["update"] / f["update"] for p, f in zip(seconds["ours:2"], floors, strict=True))
    assert table[-1].startswith("floor of update: ")
    assert table[-1].endswith(f"times that: ours:2 {expected:.2f}")
    assert table[0].startswith("ppo: 1,234 parameters, batch 4, 6 + 12 tokens")
    assert table[2].split()[2:4] == ["1.00", "(1.00"]
    assert table[2].endswith(" 100")


@pytest.mark.parametrize("work", ["reward", "dpo"])
def test_our_side_learns_from_the_same_pairs_in_one_step_a_turn(
    work: str, tool: ModuleType, options: argparse.Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "Do you like tea?", "chosen": "Yes, I do.", "rejected": "No."}
    (tmp_path / "pairs.jsonl").write_text("\n".join([json.dumps(row)] * 12))
    options.work, options.pairs, options.max_length = work, str(tmp_path / "pairs.jsonl"), 64
    tool.write_models(options, tmp_path)
    seconds, lengths = tool.run_turns(options, tmp_path)
    assert [sorted(phases) for phases in seconds["ours:2"]] == [["iteration", "update"]] * 2
    assert not lengths
    capsys.readouterr()
    tool.report(options, 1234, seconds, lengths, {}, [])
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith(f"{work}: 1,234 parameters, batch 4, at most 64 tokens")
    assert table[2].endswith("-")

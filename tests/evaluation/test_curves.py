import json
import math
from pathlib import Path

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.curves import condense, plots_of, read_curves, training_seconds


def test_curves_of_a_run(metrics_file: Path) -> None:
    plots = read_curves({"ppo": str(metrics_file)})["ppo"]
    assert [plot.title for plot in plots] == ["Score", "voice (val)"]  # learning rate and times are not drawn
    rollout, val = plots[0].series
    assert (rollout.label, len(rollout.xs)) == ("rollout/score", 67)  # 200 steps in groups of three
    assert rollout.ys[0] == pytest.approx(0.01)  # mean of 0, 0.01 and 0.02
    assert rollout.spread[0] == pytest.approx(math.sqrt(2 / 3) * 0.01)
    assert (val.xs, list(val.ys), val.spread) == ([0, 50, 100, 150], [0, 0.5, 1, 1.5], [])


def test_training_seconds_span_resumed_parts(tmp_path: Path) -> None:
    files: dict[str, str] = {}
    runs: dict[str, list[dict[str, float]]] = {
        "resumed": [{"step": 1, "time": 4.0}, {"step": 2, "time": 9.0}, {"step": 3, "time": 2.0}],
        "silent": [{"step": 1}],
    }
    for name, rows in runs.items():
        files[name] = str(tmp_path / f"{name}.jsonl")
        Path(files[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert training_seconds(files) == {"resumed": 11.0}


def test_keys_that_belong_together_share_a_plot() -> None:
    row = {"step": 1, "train/loss": 1.0, "val/loss": 2.0, "val/margin_mean": 1.0, "val/margin_q05": 0.0}
    found = {plot.title: [line.label for line in plot.series] for plot in plots_of([row])}
    assert found == {"Loss": ["train/loss", "val/loss"], "Margin": ["val/margin_mean"]}


def test_values_that_are_not_finite_stay_gaps() -> None:
    rows = [{"step": step, "train/loss": math.nan if step == 50 else 1.0} for step in range(200)]
    (plot,) = plots_of(rows)
    assert sum(map(math.isnan, plot.series[0].ys)) == 1
    assert len(plot.series[0].ys) == 200


def test_a_key_that_was_never_finite_is_left_out() -> None:
    rows = [{"step": 0, "train/loss": math.nan, "val/loss": 1.0}]
    assert [line.label for line in plots_of(rows)[0].series] == ["val/loss"]


def test_condensing_keeps_the_mean_and_the_order() -> None:
    xs, ys, spread = condense(range(1000), [float(x % 2) for x in range(1000)], max_points=100)
    assert len(xs) == 100
    assert xs == sorted(xs)
    assert ys == [0.5] * 100
    assert spread == [0.5] * 100


def test_few_points_are_left_alone() -> None:
    assert condense([0, 5], [1.0, 2.0]) == ([0, 5], [1.0, 2.0], [])


def test_wrong_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text("{\n")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "lr.jsonl").write_text(json.dumps({"step": 1, "train/lr": 1.0}) + "\n")
    wrong = {
        "metrics.json": "does not exist. Did you mean 'metrics.jsonl'?",
        "metrics.jsonl": "is empty",
        "broken.jsonl": "not the metrics.jsonl of a run",
        "list.jsonl": "not the metrics.jsonl of a run",
        "lr.jsonl": "none of the values that are drawn",
        ".": "is a folder",
    }
    for name, message in wrong.items():
        with pytest.raises(UserError, match=rf"curves\.ppo: .*{message.replace('?', '[?]')}"):
            read_curves({"ppo": str(tmp_path / name)})

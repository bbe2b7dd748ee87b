"""The small form of configs/smollm/offline goes through end to end, with a few steps of each stage."""

import json
from pathlib import Path

import pytest
import yaml

from rlhf_lightning.__main__ import main

ROOT = Path(__file__).parents[2]
STEPS = {"base": 4, "reward": 2, "judge": 2, "dpo": 2, "ppo": 2}


@pytest.mark.slow
@pytest.mark.usefixtures("shared_data")
def test_every_stage_of_the_small_form_runs_and_hands_on_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    source = ROOT / "configs" / "smollm" / "offline" / "cpu.yaml"
    pipeline = yaml.safe_load(source.read_text(encoding="utf-8"))
    for stage in pipeline["stages"]:
        stage["config"] = str(source.parent / stage["config"])
        if stage["command"] == "fit":
            short = {"trainer.limit_train_batches": STEPS[stage["name"]], "trainer.limit_val_batches": 1}
            stage["set"] = stage["set"] | short
    of = {stage["name"]: stage for stage in pipeline["stages"]}
    of["ppo"]["set"] |= {
        "trainer.val_check_interval": 1,
        "data.rollout_batch_size": 16,
        "model.sampling.max_new_tokens": 8,
    }
    of["compare"]["set"] |= {"limit": 4, "sampling.max_new_tokens": 8}
    (tmp_path / "cpu.yaml").write_text(yaml.safe_dump(pipeline))
    assert main(["pipeline", "--config", str(tmp_path / "cpu.yaml"), "--run_dir", str(tmp_path / "runs")]) == 0

    configs = {
        name: yaml.safe_load((tmp_path / "runs" / name / "config.yaml").read_text()) for name in ("reward", "judge")
    }
    rows = {
        name: (config["data"]["init_args"]["skip"], config["data"]["init_args"]["limit"])
        for name, config in configs.items()
    }
    assert rows == {"reward": (0, 3131), "judge": (3131, None)}  # no pair in common
    assert configs["reward"]["seed_everything"] != configs["judge"]["seed_everything"]
    report = json.loads((tmp_path / "runs" / "compare" / "report.json").read_text())
    assert {model["name"] for model in report["models"]} == {"base", "dpo", "ppo"}

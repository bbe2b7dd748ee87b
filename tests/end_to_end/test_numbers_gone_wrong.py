"""What a user sees of a run whose numbers go wrong, from the command line: a line, a status, what is kept."""

import json
import re
from pathlib import Path

import pytest

from rlhf_lightning.__main__ import main

TINY = "{hidden_size: 16, intermediate_size: 32, num_attention_heads: 2, num_key_value_heads: 2}"
TRAINER = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--run_dir=run"]
SFT = ["--model=SFTModule", "--model.model=builtin:demo", "--model.pretrained=false", *TRAINER]
SFT += [f"--model.config_overrides={TINY}", "--data=DemonstrationDataModule", "--data.source=builtin:demo/train"]
SFT += ["--data.limit=48", "--data.batch_size=4"]
PPO = ["--model=PPOModule", "--model.policy=start", "--model.minibatch_size=2", "--model.ppo_epochs=1", *TRAINER]
PPO += ["--model.sampling.max_new_tokens=4", "--data=PromptDataModule", "--data.source=builtin:demo/prompts"]
PPO += ["--data.rollout_batch_size=2", "--data.max_prompt_length=48", "--trainer.max_steps=3"]

REWARDS = """
calls = []

def second_time(prompts, responses, **columns):
    calls.append(1)
    return [1.0, float("nan") if len(calls) == 2 else 0.0]

def hanging(prompts, responses, **columns):
    while len(calls) < 1000:
        pass
"""


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def error_of(capfd: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Return the one line of an error, and all else that was told."""
    told = capfd.readouterr().err
    assert "Traceback" not in told
    [line] = [line for line in told.splitlines() if line.startswith("error: ")]
    return line, told


def test_a_fine_tuning_that_has_blown_up_ends_with_a_status_and_the_checkpoint(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One step of 1e25, and nothing is a number any more."""
    often = ["--trainer.callbacks+=RunCheckpoint", "--trainer.callbacks.every_n_steps=1"]
    allowed = ["--model.max_nonfinite=4", "--model.optimizer.lr=1e25"]
    assert main(["fit", *SFT, *often, *allowed, "--trainer.max_epochs=1"]) == 2
    line, told = error_of(capfd)
    assert re.match(
        r"error: step 6: the gradient of 'policy.*' holds nan.*; 5 skipped, max_nonfinite is 4\. Stopped: lower the",
        line,
    ), line
    assert "step 5: the gradient of 'policy.model.embed_tokens.weight' holds nan" in told
    assert "checkpoint of step 5: run/checkpoints/last.ckpt; --ckpt_path auto takes it up" in told
    assert not Path("run", "model").exists()
    counts = [
        json.loads(row).get("train/nonfinite_steps") for row in Path("run", "metrics.jsonl").read_text().splitlines()
    ]
    assert [count for count in counts if count is not None] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "told", "rows", "step"),
    [
        ("second_time", r"returned nan for the response .*; scores must be finite\. Prompt and response", 1, 2),
        ("hanging", r"has not returned within 0\.5 s .*, or allow it more\. The 2 prompts and responses", 2, 1),
    ],
)
def test_a_reward_function_that_goes_wrong_leaves_what_it_was_given(
    name: str, told: str, rows: int, step: int, save_start: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("rewards.py").write_text(REWARDS)
    reward = ["--model.reward=FunctionReward", f"--model.reward.function=rewards.py:{name}"]
    assert main(["fit", *PPO, *reward, "--model.reward.timeout_s=0.5"]) == 2
    line, _ = error_of(capfd)
    place = "run/failures/reward_function.jsonl"
    assert re.match(rf"error: reward function '{name}' {told}: {place}\.$", line), line
    saved = [json.loads(row) for row in Path(place).read_text().splitlines()]
    assert len(saved) == rows
    for row in saved:
        assert row["prompt"]
        assert isinstance(row["response"], str)
        assert (row["step"], row["process"]) == (step, 0)
        assert row["error"].startswith(f"reward function '{name}'")


@pytest.fixture
def save_start(tmp_path: Path) -> str:
    """A tiny model, never trained, in the folder ``start``."""
    from rlhf_lightning.modules.sft import SFTModule

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    SFTModule("builtin:demo", pretrained=False, config_overrides=sizes).export_model(tmp_path / "start")
    return "start"

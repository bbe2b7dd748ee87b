"""Five short runs of tiny models on the demo, as its user would start them, and a comparison of two of them."""

import contextlib
import json
import os
from pathlib import Path

import pytest

from rlhf_lightning.__main__ import main

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
TRAINER = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.max_steps=3"]
ROWS = ["--data.source=builtin:demo/train", "--data.limit=16", "--data.val_size=4", "--data.batch_size=4"]
LENGTHS = ["--data.max_length=96", "--data.max_prompt_length=32"]
PROMPTS = ["--data=PromptDataModule", "--data.source=builtin:demo/prompts", "--data.limit=8", "--data.val_size=4"]
POLICY = ["--model=PPOModule", "--model.policy=sft/model", "--model.minibatch_size=4", "--model.ppo_epochs=1"]
SCORED = ["--model.reward=RewardModel", "--model.reward.path=reward/model", "--model.sampling.max_new_tokens=8"]
PPO = [*POLICY, *SCORED, *PROMPTS, "--data.rollout_batch_size=4", "--data.max_prompt_length=32"]
RUNS = {
    "sft": [
        *("--model=SFTModule", "--model.model=builtin:demo", "--model.pretrained=false"),
        *(f"--model.config_overrides={json.dumps(TINY)}", "--data=DemonstrationDataModule", *ROWS, *LENGTHS),
    ],
    "reward": ["--model=RewardModule", "--model.model=sft/model", "--data=PreferenceDataModule", *ROWS, *LENGTHS],
    "dpo": ["--model=DPOModule", "--model.policy=sft/model", "--data=PreferenceDataModule", *ROWS, *LENGTHS],
    "ppo": PPO,
    "rloo": [*PPO, "--model.advantages=LeaveOneOut", "--data.responses_per_prompt=2"],
}
COMPARE = [
    *("--models.sft=sft/model", "--models.ppo=ppo/model", "--base=sft", "--prompts=builtin:demo/eval_prompts"),
    *("--limit=6", "--reward=RewardModel", "--reward.path=reward/model", "--sampling.max_new_tokens=8"),
    *("--max_prompt_length=32", "--output=compare", "--device=cpu", "--curves.ppo=ppo/metrics.jsonl"),
    "--text_metrics={human voice: 'rlhf_lightning.demo.voice:human_voice'}",
]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run folders sft, reward, dpo, ppo and rloo, and with compare."""
    folder = tmp_path_factory.mktemp("runs")
    with contextlib.chdir(folder):
        for name, arguments in RUNS.items():
            assert main(["fit", *arguments, *TRAINER, f"--run_dir={name}"]) == 0
        assert main(["compare", *COMPARE]) == 0
    os.environ.pop("PL_GLOBAL_SEED", None)
    return folder


@pytest.fixture
def in_runs(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the runs as the present one."""
    monkeypatch.chdir(runs)
    return runs

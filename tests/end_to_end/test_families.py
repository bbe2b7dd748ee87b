"""One pipeline for models of every family: from random weights to a comparison, an export, and a load elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from rlhf_lightning.__main__ import main
from rlhf_lightning.functional.sequences import SequenceBatch, pad_sequences
from rlhf_lightning.models.causal_lm import response_logprobs
from rlhf_lightning.models.loading import load_causal_lm

TRAINER = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 1}
LENGTHS = {"source": "builtin:demo/train", "limit": 24, "max_length": 80, "max_prompt_length": 40}
#: Qwen 2 stays out: whatever tokenizer lies beside its config, transformers 5 cuts words as Qwen's own does.
FAMILIES = ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "gemma2", "gpt_neox"))]


def fit(kind: str, data: str, steps: int, *, rows: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """Return the config of a training of a few steps."""
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
    return {
        "model": {"class_path": kind, "init_args": arguments | {"optimizer": optimizer}},
        "data": {"class_path": data, "init_args": rows},
        "trainer": TRAINER | {"max_steps": steps},
    }


def write_pipeline(folder: Path, start: Path) -> Path:
    """Write a pipeline of all stages, with their configs beside it."""
    base, reward = "{run_dir}/sft/model", "{run_dir}/reward/model"
    scored = {"class_path": "RewardModel", "init_args": {"path": str(start)}}
    prompts = {"source": "builtin:demo/prompts", "limit": 16, "rollout_batch_size": 8, "max_prompt_length": 40}
    pairs: dict[str, Any] = {"rows": LENGTHS | {"batch_size": 4}, "data": "PreferenceDataModule"}
    critic = {"class_path": "SeparateCritic", "init_args": {"init_from": str(start)}}
    configs: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
        "sft": (
            "fit",
            fit("SFTModule", "DemonstrationDataModule", 2, rows=LENGTHS, model=str(start), pretrained=False),
            {},
        ),
        "reward": ("fit", fit("RewardModule", steps=2, **pairs, model=str(start)), {"model.model": base}),
        "dpo": ("fit", fit("DPOModule", steps=2, **pairs, policy=str(start)), {"model.policy": base}),
        "ppo": (
            "fit",
            fit("PPOModule", "PromptDataModule", 2, rows=prompts, policy=str(start), reward=scored, critic=critic)
            | {"seed_everything": 1},
            {
                "model.policy": base,
                "model.reward.path": reward,
                "model.critic.init_from": reward,
                "model.sampling.max_new_tokens": "12",
            },
        ),
        "compare": (
            "compare",
            {"models": {}, "prompts": "builtin:demo/eval_prompts", "reward": scored, "limit": 4, "device": "cpu"}
            | {"sampling": {"max_new_tokens": 12}},
            {f"models.{name}": f"{{run_dir}}/{name}/model" for name in ("sft", "dpo", "ppo")} | {"reward.path": reward},
        ),
    }
    for name, (_, config, _) in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    stages = [
        {"name": name, "command": command, "config": f"{name}.yaml", "set": overrides}
        for name, (command, _, overrides) in configs.items()
    ]
    (folder / "pipeline.yaml").write_text(yaml.safe_dump({"run_dir": str(folder / "runs"), "stages": stages}))
    return folder / "pipeline.yaml"


@torch.no_grad()
def by_transformers(model: Any, rows: list[tuple[list[int], list[int]]], *, left: bool) -> list[Tensor]:
    """Return the log-probabilities of each response by transformers' own forward pass over a padded batch."""
    ids, lengths = pad_sequences([prompt + response for prompt, response in rows], pad_id=2, left=left)
    places = torch.arange(ids.shape[1])
    mask = places >= ids.shape[1] - lengths[:, None] if left else places < lengths[:, None]
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions).logits.float().log_softmax(-1)
    found = []
    for row, (prompt, response) in enumerate(rows):
        first = (int((~mask[row]).sum()) if left else 0) + len(prompt)
        taken = torch.arange(first, first + len(response))
        found.append(logits[row, taken - 1, ids[row, taken]])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_any_family_goes_through_the_whole_pipeline(
    family: str,
    make_config: Callable[..., PreTrainedConfig],
    demo_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    ends = {"eos_token_id": demo_tokenizer.eos_token_id, "pad_token_id": demo_tokenizer.pad_token_id}
    config = make_config(
        family,
        vocab_size=len(demo_tokenizer),
        **{"n_positions" if family == "gpt2" else "max_position_embeddings": 128},
        **ends,
    )
    start, runs = tmp_path / "start", tmp_path / "runs"
    config.save_pretrained(start)
    demo_tokenizer.save_pretrained(start)
    assert main(["pipeline", "--config", str(write_pipeline(tmp_path, start))]) == 0

    logged = [json.loads(line) for line in (runs / "ppo" / "metrics.jsonl").read_text().splitlines()]
    check = {name: value for line in logged for name, value in line.items() if name.startswith("check/")}
    assert (check["check/max_ratio_error"], check["check/approx_kl"]) == (0, 0)
    assert check["check/sampler_gap"] < 1e-4  # prompts of unequal lengths, padded on the left
    report = json.loads((runs / "compare" / "report.json").read_text())
    assert {model["name"] for model in report["models"]} == {"sft", "dpo", "ppo"}

    exported = tmp_path / "exported"
    assert main(["export", "--ckpt", str(runs / "ppo" / "checkpoints" / "last.ckpt"), "--output", str(exported)]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(exported).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert theirs.config.model_type == config.model_type
    rows = [
        (tokenizer(text)["input_ids"], [7, 8, 9, 4][: 2 + number]) for number, text in enumerate(["Hi", "Who is it?"])
    ]
    ids, _ = pad_sequences([prompt + response for prompt, response in rows], pad_id=0)
    lengths = torch.tensor([[len(prompt), len(response)] for prompt, response in rows])
    with torch.no_grad():
        ours = response_logprobs(load_causal_lm(str(exported)).eval(), SequenceBatch(ids, lengths[:, 0], lengths[:, 1]))
    for left in (True, False):
        for row, expected in enumerate(by_transformers(theirs, rows, left=left)):
            torch.testing.assert_close(ours[row, : len(expected)], expected, atol=2e-5, rtol=1e-5)

"""What is not finite in one of two processes is skipped in both, and named alike.

This file is also the program that the processes run; see test_two_processes.py.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from rlhf_lightning.data.collate import collate_sequences
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.distributed import leave_group
from rlhf_lightning.errors import UserError
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.rollout.reward_sources import FunctionReward, RewardSource, Scores, ScoringBatch
from rlhf_lightning.rollout.sampler import SamplingConfig


class Lengths(RewardSource):
    """The length of each response; not a number in the second call of the second process."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.calls = rank, 0

    def score(self, batch: ScoringBatch) -> Scores:
        self.calls += 1
        scores = batch.sequences.response_lengths.float()
        scores = scores * math.nan if (self.rank, self.calls) == (1, 2) else scores
        return Scores(scores, {self.name: scores})


class GoingWrong(SFTModule):
    """Its loss is infinite in the second batch of the second process, its gradient as it should be."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + math.inf if (self.global_rank, batch_idx) == (1, 1) else loss


class Told(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def failing_in(rank: int) -> Callable[..., list[float]]:
    """A reward function that fails in one process."""

    def lengths(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        return [len(response) / rank for response in responses]

    return lengths


def run(module: LightningModule, steps: int, **data: Any) -> dict[str, Any]:
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_steps=steps,
        default_root_dir=sys.argv[4],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    told, refusal = Told(), ""
    logging.getLogger("rlhf_lightning").addHandler(told)
    try:
        trainer.fit(module, **data)
    except UserError as error:
        refusal = str(error)
    logging.getLogger("rlhf_lightning").removeHandler(told)
    weights = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    lines = [line for line in told.lines if "skipped" in line]
    return {"weights": weights, "lines": lines, "refusal": refusal, "steps": trainer.global_step}


def main(rank: int, language_model: str, source: str) -> dict[str, dict[str, Any]]:
    rows = [([5, 6 + number], [20 + number + rank, 4]) for number in range(3)]
    texts: Any = DataLoader([collate_sequences([row], pad_id=4) for row in rows], batch_size=None)  # type: ignore[arg-type]

    def ppo(reward: RewardSource | None = None, **options: Any) -> PPOModule:
        given: dict[str, Any] = {"sampling": SamplingConfig(max_new_tokens=4), "ppo_epochs": 1, "minibatch_size": 4}
        return PPOModule(language_model, reward or Lengths(rank), **given, **options)

    prompts = PromptDataModule(source, rollout_batch_size=4, max_prompt_length=48)
    return {
        "sft": run(GoingWrong(language_model), 3, train_dataloaders=texts),
        "sft_stopped": run(GoingWrong(language_model, max_nonfinite=0), 3, train_dataloaders=texts),
        "ppo": run(ppo(), 3, datamodule=prompts),
        "ppo_stopped": run(ppo(max_nonfinite=0), 3, datamodule=prompts),
        "ppo_failing": run(ppo(FunctionReward(failing_in(1 - rank))), 3, datamodule=prompts),
    }


@pytest.mark.slow
def test_both_skip_and_stop_where_one_goes_wrong(
    language_model: str,
    prompts: Callable[..., PromptDataModule],
    run_processes: Callable[[str, int, list[str]], None],
    tmp_path: Path,
) -> None:
    run_processes(__file__, 2, [language_model, str(prompts(12).source), str(tmp_path)])
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    what = {"sft": "step 2: the loss is inf", "ppo": "iteration 2: the rollout's 'score_reward' holds nan (and 1 more)"}
    for kind, words in what.items():
        assert first[kind]["lines"] == [f"{words}; skipped, 1 so far (max_nonfinite is 10)"]
        assert second[kind]["lines"] == []  # told once
        for result in (first, second):
            assert result[kind]["steps"] == 3
            assert not result[kind]["refusal"]
            assert result[f"{kind}_stopped"]["refusal"].startswith(f"{words}; 1 skipped, max_nonfinite is 0")
        assert torch.equal(first[kind]["weights"], second[kind]["weights"])
    for result in (first, second):
        refusal = result["ppo_failing"]["refusal"]
        assert refusal.startswith("reward function 'lengths' failed: ZeroDivisionError: division by zero")
        assert refusal.endswith(f"The 2 prompts and responses: {tmp_path}/failures/reward_function.jsonl.")
    rows = [json.loads(line) for line in (tmp_path / "failures" / "reward_function.jsonl").read_text().splitlines()]
    assert [row["process"] for row in rows] == [1, 1]


if __name__ == "__main__":
    rank = int(os.environ["LOCAL_RANK"])
    results = main(rank, *sys.argv[2:4])
    leave_group()
    torch.save(results, Path(sys.argv[4], f"{rank}.pt"))

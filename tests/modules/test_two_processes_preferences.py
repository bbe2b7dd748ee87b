"""DPO, KTO and reward models in two processes do what they do in one, also where these have unequally many rows.

This file is also the program that the processes run; see test_two_processes.py. Plain gradient descent with rate 1:
what the weights move by after one step is the gradient.
"""

import functools
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from rlhf_lightning.algorithm.preference_losses import IPOLoss, SigmoidLoss
from rlhf_lightning.data.collate import (
    LabelledExample,
    MarginPairExample,
    PairExample,
    collate_labelled,
    collate_pairs,
)
from rlhf_lightning.data.stream import EvalBatches
from rlhf_lightning.distributed import leave_group
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.kto import KTOModule
from rlhf_lightning.modules.rating import RatingModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.scoring import ScoringModule

PAIRS = [
    PairExample([5, 6 + number], [20 + number] * (1 + number % 4) + [4], [30 + number] * (1 + number * 2 % 5) + [4])
    for number in range(7)
]
ROWS = [
    LabelledExample([5, 6 + number] * (1 + number % 3), [20 + number] * (1 + number % 4) + [4], float(number % 3 > 0))
    for number in range(7)
]

RATED = [LabelledExample(row.prompt_ids, row.response_ids, 0.5 * number) for number, row in enumerate(ROWS)]
WITH_MARGINS = [MarginPairExample(*pair, 0.3 * number) for number, pair in enumerate(PAIRS)]
#: What each run reports beside its loss.
REPORTED = {
    "dpo": "train/reward_chosen",
    "dpo_lora": "train/reward_chosen",
    "ipo": "train/reward_chosen",
    "kto": "train/kl",
    "kto_lone_rows": "train/kl",
    "reward": "train/center_loss",
    "rating": "val/spearman",
}


def run(world_size: int, rank: int, module: LightningModule, examples: list[Any], collate: Any) -> dict[str, Any]:
    """Train on one batch of five rows, three of them the first process's, and validate on seven."""
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=DDPStrategy(process_group_backend="gloo") if world_size > 1 else "auto",
        max_steps=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    collate = functools.partial(collate, pad_id=4)
    module.configure_model()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    trainer.fit(
        module,
        DataLoader([collate(examples[rank:5:world_size])], batch_size=None),  # type: ignore[arg-type]
        EvalBatches(examples, 4, collate, rank=rank, world_size=world_size),
    )
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if isinstance(module, ScoringModule):
        config: Any = module.exported_model.config
        metrics |= {"score_mean": config.score_mean, "score_std": config.score_std}
    moved = [(parameter.detach() - before[name]).flatten() for name, parameter in module.named_parameters()]
    return {"metrics": metrics, "moved": torch.cat(moved)}


def main(world_size: int, rank: int, policy: str, reference: str) -> dict[str, dict[str, Any]]:
    # In parts of a row or two, of which the processes have unequally many.
    common: Any = {"optimizer": functools.partial(torch.optim.SGD, lr=1.0), "max_tokens_per_microbatch": 20}
    dpo = functools.partial(DPOModule, policy, reference=reference, **common)
    kto = functools.partial(KTOModule, policy, reference=reference, beta=0.3, **common)
    torch.manual_seed(0)  # heads are drawn
    reward = RewardModule(policy, center_coef=0.1, store_score_statistics=True, **common)
    rating = RatingModule(policy, store_score_statistics=True, **common)
    lora = {}
    if find_spec("peft"):
        adapted: Any = functools.partial(DPOModule, policy, lora=LoRA(rank=2, alpha=64.0), **common)
        lora = {"dpo_lora": run(world_size, rank, adapted(loss=SigmoidLoss(0.3)), PAIRS, collate_pairs)}
    return lora | {
        "reward": run(world_size, rank, reward, WITH_MARGINS, collate_pairs),
        "rating": run(world_size, rank, rating, RATED, collate_labelled),
        "dpo": run(world_size, rank, dpo(loss=SigmoidLoss(0.3)), PAIRS, collate_pairs),
        "ipo": run(world_size, rank, dpo(loss=IPOLoss(0.3, per_token=True), ld_alpha=0.5), PAIRS, collate_pairs),
        "kto": run(world_size, rank, kto(), ROWS, collate_labelled),
        "kto_lone_rows": run(world_size, rank, kto(), ROWS[:2], collate_labelled),
    }


@pytest.mark.slow
def test_two_processes_do_what_one_does(
    save_model: Callable[..., str], run_processes: Callable[[str, int, list[str]], None], tmp_path: Path
) -> None:
    """Same metrics, gradients and reference point."""
    models = [save_model(tmp_path / f"model_{seed}", seed=seed) for seed in (0, 5)]
    results = [tmp_path / "one.pt", tmp_path / "two.pt"]
    for world_size, result in enumerate(results, start=1):
        run_processes(__file__, world_size, [*models, str(result)])
    one, two = (torch.load(result, weights_only=True) for result in results)
    for kind in one:
        assert {"train/loss", REPORTED[kind]} <= set(one[kind]["metrics"])
        assert one[kind]["metrics"].keys() == two[kind]["metrics"].keys()
        for name, value in one[kind]["metrics"].items():
            assert two[kind]["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), (kind, name)
        moved = [result[kind]["moved"] for result in (one, two)]
        assert moved[0].norm() > 0.01
        assert (moved[1] - moved[0]).norm() / moved[0].norm() < 1e-5, kind
    assert one["kto"]["metrics"]["train/kl"] > 0.1


if __name__ == "__main__":
    rank = int(os.environ["LOCAL_RANK"])
    results = main(int(sys.argv[1]), rank, *sys.argv[2:4])
    leave_group()
    if rank == 0:
        torch.save(results, sys.argv[4])

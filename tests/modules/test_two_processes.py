"""Two processes do what one does.

This file is also the program that they run: it trains each module in one process or in one of two, and writes down what
came of it. Plain gradient descent with rate 1 and without clipping: what the weights move by after one step is the
gradient.
"""

import functools
import itertools
import math
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

from rlhf_lightning.algorithm.advantages import GlobalBaseline, LeaveOneOut
from rlhf_lightning.algorithm.critics import SeparateCritic, TrunkCritic
from rlhf_lightning.algorithm.kl import AdaptiveKL, FixedKL
from rlhf_lightning.algorithm.objectives import ClippedObjective, SequenceMean
from rlhf_lightning.algorithm.score_transforms import MissingEOSPenalty, RunningNormalization
from rlhf_lightning.data.collate import PairExample, SequenceExample, collate_pairs, collate_sequences
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.stream import BatchStream, EvalBatches
from rlhf_lightning.distributed import global_max, leave_group
from rlhf_lightning.models.loading import load_tokenizer
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.rollout.reward_model import RewardModel
from rlhf_lightning.rollout.sampler import SamplingConfig


def run(world_size: int, module: LightningModule, max_steps: int, **data: Any) -> dict[str, Any]:
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=DDPStrategy(process_group_backend="gloo") if world_size > 1 else "auto",
        max_steps=max_steps,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)  # adapters are drawn
    module.configure_model()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    trainer.fit(module, **data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("time/")}
    moved = {name: parameter.detach() - before[name] for name, parameter in module.named_parameters()}
    return {"metrics": metrics, "moved": moved, "ranks_equal": ranks_equal(module, world_size)}


def ranks_equal(module: LightningModule, world_size: int) -> bool:
    weights = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    parts = [torch.empty_like(weights) for _ in range(world_size)]
    if world_size > 1:
        torch.distributed.all_gather(parts, weights)
    return world_size == 1 or torch.equal(parts[0], parts[1])


def loaders(world_size: int, rank: int, examples: list[Any], collate: Any) -> dict[str, Any]:
    """All but the last three to train on in one batch, all to validate."""
    place: dict[str, Any] = {"rank": rank, "world_size": world_size}
    train = BatchStream(examples[:-3], len(examples) - 3, collate, seed=0, shuffle=False, **place)
    return {"train_dataloaders": train, "val_dataloaders": EvalBatches(examples, 4, collate, **place)}


def variants() -> dict[str, dict[str, Any]]:
    """What else must not depend on the number of processes."""
    adapted: Any = {"lora": LoRA(2, 4.0), "critic": SeparateCritic(lora=LoRA(2, 4.0))} if find_spec("peft") else {}
    return {"lora": adapted} | {
        "rloo": {
            "advantages": LeaveOneOut(whiten="minibatch"),
            "policy_objective": ClippedObjective(normalization=SequenceMean(), entropy_coef=0.1),
            "kl": FixedKL(0.1, estimator="k2", place="loss"),
        },
        "reinforce": {
            "advantages": GlobalBaseline(whiten_rewards=True),
            "score_transforms": [RunningNormalization(), MissingEOSPenalty(1.0)],
        },
        "trunk": {
            "critic": TrunkCritic(),
            "policy_objective": ClippedObjective(target_kl=1e-3),
            "kl": AdaptiveKL(coef=0.2, target=0.01, horizon=32),
        },
        "warm-up": {"critic": TrunkCritic(warmup_iterations=1)},
    }


def main(world_size: int, rank: int, language_model: str, reward_model: str, source: str, val_source: str) -> Any:
    sgd = functools.partial(torch.optim.SGD, lr=1.0)
    stops = load_tokenizer(language_model).convert_ids_to_tokens(list(range(5, 400, 3)))
    ppo = PPOModule(
        language_model,
        RewardModel(reward_model),
        critic=SeparateCritic(reward_model),
        sampling=SamplingConfig(max_new_tokens=8, stop_tokens=[*stops, "<|im_end|>"]),
        ppo_epochs=1,
        minibatch_size=8,
        max_tokens_per_microbatch=60,
        max_grad_norm=None,
        optimizer=sgd,
    )
    # Eight prompts are one iteration and an epoch, after which it validates.
    prompts = PromptDataModule(source, val_source, rollout_batch_size=8, max_prompt_length=48, val_batch_size=4)
    results = {"ppo": run(world_size, ppo, 1, datamodule=prompts)}
    results["ppo"]["largest"] = [float(global_max(torch.tensor(own))) for own in (rank + 1.0, (1.0, math.nan)[rank])]
    results["ppo"]["samples"] = ppo.samples
    # Two prompts with two answers each a process; groups, minibatch statistics and the early stop span both.
    for name, changes in variants().items():
        results[name] = run(
            world_size,
            PPOModule(
                language_model,
                RewardModel(reward_model),
                sampling=SamplingConfig(max_new_tokens=8, stop_tokens=[*stops, "<|im_end|>"]),
                ppo_epochs=2,
                minibatch_size=8,
                max_tokens_per_microbatch=60,
                max_grad_norm=None,
                optimizer=functools.partial(torch.optim.SGD, lr=0.1),
                **changes,
            ),
            2,
            datamodule=PromptDataModule(
                source, val_source, rollout_batch_size=8, responses_per_prompt=2, max_prompt_length=48, val_batch_size=4
            ),
        )
    responses = [[20 + number] * (1 + number % 4) + [4] for number in range(7)]
    demonstrations = [SequenceExample([5, 6 + number], response) for number, response in enumerate(responses)]
    texts = loaders(world_size, rank, demonstrations, functools.partial(collate_sequences, pad_id=4))
    results["sft"] = run(world_size, SFTModule(language_model, optimizer=sgd, max_tokens_per_microbatch=12), 1, **texts)
    pairs = [PairExample(*a, b.response_ids) for a, b in itertools.pairwise(demonstrations)]
    data = loaders(world_size, rank, [*pairs, pairs[0]], functools.partial(collate_pairs, pad_id=4))
    results["reward"] = run(world_size, RewardModule(reward_model, optimizer=sgd), 1, **data)
    return results


@pytest.mark.slow
def test_two_processes_do_what_one_does(
    language_model: str,
    reward_model: str,
    prompts: Callable[..., PromptDataModule],
    run_processes: Callable[[str, int, list[str]], None],
    tmp_path: Path,
) -> None:
    """Same rollouts, metrics, gradients and weights, though tokens, micro-batches and validation rows are uneven."""
    source = prompts(8).source, prompts(1, val=7).val_source
    results = [tmp_path / "one.pt", tmp_path / "two.pt"]
    for world_size, result in enumerate(results, start=1):
        run_processes(__file__, world_size, [language_model, reward_model, *map(str, source), str(result)])
    one, two = (torch.load(result, weights_only=True) for result in results)
    assert one["trunk"]["metrics"]["train/stopped_early"] == 1
    assert one["trunk"]["metrics"]["rollout/kl_coef"] != pytest.approx(0.2)
    kinds = ["ppo", *variants(), "sft", "reward"]
    for kind, logged in zip(
        kinds, ["val/score"] + ["rollout/rewards"] * len(variants()) + ["val/loss"] * 2, strict=True
    ):
        assert logged in one[kind]["metrics"]
        assert one[kind]["metrics"].keys() == two[kind]["metrics"].keys()
        for name, value in one[kind]["metrics"].items():
            assert two[kind]["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), (kind, name)
        assert two[kind]["ranks_equal"]
        moved = [torch.cat([tensor.flatten() for tensor in result[kind]["moved"].values()]) for result in (one, two)]
        assert moved[0].norm() > (1e-3 if kind in variants() else 0.1)
        assert (moved[1] - moved[0]).norm() / moved[0].norm() < 1e-5, kind
    assert two["ppo"]["largest"] == pytest.approx([2.0, math.nan], nan_ok=True)
    assert one["ppo"]["samples"][0::2] == two["ppo"]["samples"]  # the first process has every other row


if __name__ == "__main__":
    rank = int(os.environ["LOCAL_RANK"])
    results = main(int(sys.argv[1]), rank, *sys.argv[2:6])
    leave_group()
    if rank == 0:
        torch.save(results, sys.argv[6])

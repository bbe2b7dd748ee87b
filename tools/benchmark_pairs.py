"""Sides of ``tools/benchmark.py`` that learn from pairs: the reward model and DPO, by this package and by TRL 1.16."""

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from benchmark_sides import Side, trainer_settings  # type: ignore[import-not-found]

from rlhf_lightning.data.collate import PairExample, collate_pairs
from rlhf_lightning.data.preferences import PreferenceDataModule


def read_pairs(options: argparse.Namespace, models: Path) -> list[list[PairExample]]:
    """Return the pairs of each round, in the order of the file, as both sides get them."""
    data = PreferenceDataModule(
        options.pairs,
        max_length=options.max_length,
        max_prompt_length=options.max_length // 2,
        overlong="truncate",
        limit=options.batch * (options.rounds + 1),
        tokenizer=str(models / "policy"),
    )
    data.setup("fit")
    examples: Any = iter(data.train_examples)
    return [list(islice(examples, options.batch)) for _ in range(options.rounds + 1)]


class OurPairs(Side):
    """``RewardModule`` or ``DPOModule`` under a Lightning Trainer; a micro-batch has the tokens of its rows at most."""

    checkpointing = False
    rank: int | None = None

    def train(self) -> None:
        """Make as many steps as there are rounds."""
        from lightning.pytorch import Callback, Trainer
        from torch.utils.data import DataLoader

        from rlhf_lightning import DPOModule, LoRA, RewardModule

        side = self

        class Turns(Callback):
            def on_train_batch_start(self, *_: Any) -> None:
                side.halt()

        def optimizer(params: Any) -> torch.optim.Optimizer:
            return torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0, fused=True)

        kind, start = (RewardModule, "reward") if self.options.work == "reward" else (DPOModule, "policy")
        module = kind(
            str(self.models / start),
            max_tokens_per_microbatch=self.micro_batch * self.options.max_length,
            lora=LoRA(rank=self.rank) if self.rank else None,
            gradient_checkpointing=self.checkpointing,
            optimizer=optimizer,
        )
        batches: Any = [collate_pairs(rows, pad_id=0) for rows in self.data]
        trainer = Trainer(**trainer_settings(self.options, [Turns()], len(self.data)))
        trainer.fit(module, DataLoader(batches, batch_size=None))


class AdaptedPairs(OurPairs):
    """The same by adapters."""

    rank = 16


class PeerPairs(Side):
    """``RewardTrainer`` or ``DPOTrainer`` of TRL 1.16, without gradient checkpointing (which is on unless told)."""

    checkpointing = False

    def train(self) -> None:
        """Make as many steps as there are rounds."""
        from torch.utils.data import SequentialSampler
        from transformers import TrainerCallback

        side = self

        class Turns(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                side.halt()

            def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                if state.global_step < len(side.data):
                    side.halt()

        trainer = self._trainer(Turns())
        trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
        trainer.train()

    def _trainer(self, callback: Any) -> Any:
        import trl
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        options, reward = self.options, self.options.work == "reward"
        settings = {
            "output_dir": str(self.models / "trl"),
            "per_device_train_batch_size": self.micro_batch,
            "gradient_accumulation_steps": options.batch // self.micro_batch,
            "max_steps": len(self.data),
            "learning_rate": 1e-6,
            "max_length": None,
            "gradient_checkpointing": self.checkpointing,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": options.device == "cpu",
            "bf16": options.precision == "bf16",
            "disable_tqdm": True,
        }
        rows = [self._row(pair, reward) for pairs in self.data for pair in pairs]
        common = {
            "processing_class": AutoTokenizer.from_pretrained(self.models / "policy"),
            "train_dataset": Dataset.from_list(rows),
            "callbacks": [callback],
        }
        if reward:
            model = AutoModelForSequenceClassification.from_pretrained(self.models / "reward", dtype=torch.float32)
            return trl.RewardTrainer(model=model, args=trl.RewardConfig(**settings), **common)
        policies = [AutoModelForCausalLM.from_pretrained(self.models / "policy", dtype=torch.float32) for _ in "ab"]

        class WithTokens(trl.DPOTrainer):
            def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset  # it tokenizes texts only, and not as we do

        return WithTokens(model=policies[0], ref_model=policies[1], args=trl.DPOConfig(**settings), **common)

    @staticmethod
    def _row(pair: PairExample, reward: bool) -> dict[str, Sequence[int]]:
        prompt, chosen, rejected = map(list, pair)
        if reward:
            return {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


class OurCheckpointedPairs(OurPairs):
    """The same with gradient checkpointing."""

    checkpointing = True


class CheckpointedPeerPairs(PeerPairs):
    """The same as TRL comes, with gradient checkpointing."""

    checkpointing = True


PAIR_SIDES: dict[str, type[Side]] = {
    "ours": OurPairs,
    "ours_checkpointed": OurCheckpointedPairs,
    "lora": AdaptedPairs,
    "trl": PeerPairs,
    "trl_default": CheckpointedPeerPairs,
}

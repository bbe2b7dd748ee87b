"""Sides of ``tools/benchmark.py``: what they share, and PPO by this package and by TRL 1.12.

A side runs its trainer in a thread of its own, which halts before each iteration until it is told to go on: both are
then trained in one process in turns, and what slows the machine down for a while slows both.
"""

import argparse
import functools
import json
import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def planned_lengths(options: argparse.Namespace) -> torch.Tensor:
    """Return at which token each response ends, shape (rounds, batch).

    They are the quantiles of a geometric distribution cut off at the longest response, in an order of each round's own,
    so that all rounds do the same work; its parameter is such that their mean is ``mean_length``.
    """
    shares = (torch.arange(options.batch, dtype=torch.float64) + 0.5) / options.batch
    low, high = 1.0, 100.0 * options.response
    for _ in range(60):
        middle = (low + high) / 2
        lengths = (torch.log1p(-shares) / math.log1p(-1 / middle)).ceil().clamp(1, options.response)
        low, high = (middle, high) if lengths.mean() < options.mean_length else (low, middle)
    generator = torch.Generator().manual_seed(2)
    orders = [torch.randperm(options.batch, generator=generator) for _ in range(options.rounds + 1)]
    return torch.stack([lengths.long()[order] for order in orders])


#: Of the thread of a side: ``lengths`` at which the responses of the iteration at hand are to stop, or ``None``.
_PLAN = threading.local()


def stop_as_planned(eos: int) -> None:
    """Let our decode loop end each response at the length that is planned for it."""
    from rlhf_lightning.rollout import decode_loop, decoding

    class Planned(decode_loop.DecodeLoop):
        def _draw(self, logits: Any, rows: Any, drawn: Any, done: Any) -> tuple[Any, Any]:
            tokens, over = super()._draw(logits, rows, drawn, done)
            lengths = getattr(_PLAN, "lengths", None)
            if lengths is None:
                return tokens, over
            ends = (drawn + 1 == lengths[rows]) & ~done
            self.tokens[rows[ends], drawn[ends]] = eos
            self.finished[rows[ends]] = True
            return tokens.masked_fill(ends, eos), over | ends

    decoding.DecodeLoop = Planned  # type: ignore[misc]


class Side(ABC):
    """A trainer that makes one iteration when told to.

    Args:
        options: Of the command line.
        micro_batch: Rows in a forward pass of the update.
        models: Folder with the folders ``policy`` and ``reward``.
        data: What each round trains on; of PPO token ids of prompts, shape (rounds, batch, prompt).
        clock: Returns seconds.
    """

    def __init__(
        self, options: argparse.Namespace, micro_batch: int, models: Path, data: Any, clock: Callable[[], float]
    ) -> None:
        self.options, self.micro_batch = options, micro_batch
        self.models, self.data, self.clock = models, data, clock
        self.marks: list[tuple[str, float]] = []
        self.lengths: list[float] = []
        self.failure: BaseException | None = None
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)

    @abstractmethod
    def train(self) -> None:
        """Build the trainer and run it; it calls :meth:`halt` before each iteration and :meth:`mark` in it."""

    def start(self) -> None:
        """Build everything, up to the first iteration."""
        self._thread.start()
        self._wait()

    def iterate(self) -> dict[str, float]:
        """Make one iteration and return the seconds of its phases, and of all as ``iteration``."""
        self.marks = []
        start = self.clock()
        self._go.release()
        self._wait()
        ends = [*self.marks, ("update", self.clock())]
        starts = [start, *(moment for _, moment in self.marks)]
        phases = {name: end - begin for (name, end), begin in zip(ends, starts, strict=True)}
        return {"iteration": ends[-1][1] - start, **phases}

    def halt(self) -> None:
        """Wait until the next iteration is wanted."""
        self._halted.release()
        self._go.acquire()

    def mark(self, phase: str) -> None:
        """Note that a phase has ended."""
        self.marks.append((phase, self.clock()))

    def _wait(self) -> None:
        self._halted.acquire()
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            self.train()
        except BaseException as failure:  # the main thread raises it
            self.failure = failure
        finally:
            self._halted.release()

    def _after(self, owner: Any, name: str, phase: str, look: Callable[[Any], None] = lambda result: None) -> None:
        """Mark the end of a phase whenever a function returns."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            look(result)
            self.mark(phase)
            return result

        setattr(owner, name, marked)


def trainer_settings(options: argparse.Namespace, callbacks: list[Any], max_steps: int) -> dict[str, Any]:
    """Return the arguments of a Lightning Trainer that does nothing but train."""
    return {
        "accelerator": "gpu" if options.device == "cuda" else "cpu",
        "devices": 1,
        "precision": "bf16-mixed" if options.precision == "bf16" else "32-true",
        "max_steps": max_steps,
        "callbacks": callbacks,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


class Ours(Side):
    """``PPOModule`` under a Lightning Trainer."""

    rank: int | None = None
    offloading = trunk = False

    def train(self) -> None:
        """Train for as many iterations as there are batches of prompts."""
        from lightning.pytorch import Callback, Trainer
        from torch.utils.data import DataLoader

        from rlhf_lightning.data.collate import PromptBatch

        side = self

        class Turns(Callback):
            def on_train_batch_start(self, *_: Any) -> None:
                _PLAN.lengths = None if planned is None else planned[len(side.lengths)]
                side.halt()

        planned = planned_lengths(self.options) if self.options.mean_length else None
        module = self._module()
        self._after(
            module, "sample", "generation", lambda result: self.lengths.append(result[0].lengths.float().mean())
        )
        stop_as_planned(json.loads((self.models / "policy" / "config.json").read_text())["eos_token_id"])
        self._after(module, "estimate", "scoring")
        full = torch.ones_like(self.data[0]).bool()
        batches: Any = [PromptBatch(ids, full, [""] * len(ids), [{}] * len(ids)) for ids in self.data]
        trainer = Trainer(**trainer_settings(self.options, [Turns()], len(batches)))
        trainer.fit(module, DataLoader(batches, batch_size=None))

    def _module(self) -> Any:
        from rlhf_lightning import LoRA, PPOModule
        from rlhf_lightning.algorithm.critics import Critic, SeparateCritic, TrunkCritic
        from rlhf_lightning.rollout.reward_model import RewardModel
        from rlhf_lightning.rollout.sampler import SamplingConfig

        options, reward = self.options, str(self.models / "reward")
        lora = LoRA(rank=self.rank) if self.rank else None
        trunk = self.trunk or options.critic == "trunk"
        critic: Critic = TrunkCritic() if trunk else SeparateCritic(init_from=reward, lora=lora)
        return PPOModule(
            str(self.models / "policy"),
            RewardModel(reward, batch_size=options.batch),
            lora=lora,
            critic=critic,
            sampling=SamplingConfig(max_new_tokens=options.response, min_new_tokens=options.response),
            ppo_epochs=options.epochs,
            offload_frozen=self.offloading,
            minibatch_size=options.batch // options.minibatches,
            max_tokens_per_microbatch=self.micro_batch * (options.prompt + options.response),
            optimizer=lambda params: torch.optim.AdamW(params, lr=1e-6, eps=1e-5, weight_decay=0.0, fused=True),
        )


class Adapted(Ours):
    """The same by adapters of policy and critic."""

    rank = 16


class Offloading(Ours):
    """The same with its frozen models out of memory while nothing is scored."""

    offloading = True


class Trunk(Offloading):
    """The same with a critic that reads the policy's hidden states: another algorithm, of half the work."""

    trunk = True


class Peer(Side):
    """``PPOTrainer`` of TRL 1.12, the last release but one that has it.

    It makes a real optimizer step only every ``gradient_accumulation_steps`` micro-batches, whatever its mini-batches
    are. To take as many as we do it either accumulates nothing, with micro-batches as large as minibatches, or has one
    minibatch an epoch, cut into smaller micro-batches.
    """

    def train(self) -> None:
        """Train for as many iterations as there are batches of prompts."""
        if self.options.precision == "bf16":
            os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # its own argument does not reach the accelerator
        from transformers import TrainerCallback
        from trl.experimental.ppo import ppo_trainer

        side = self

        class Turns(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                side.halt()

            def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                if state.global_step < len(side.data):
                    side.halt()

        trainer = self._trainer(ppo_trainer, Turns())
        self._planned = planned_lengths(self.options) if self.options.mean_length else None
        self._after(ppo_trainer, "batch_generation", "generation", self._end_and_note_lengths)
        accumulate, marked = trainer.accelerator.accumulate, -1

        def first_of_an_iteration(*models: Any) -> Any:
            nonlocal marked
            if marked != trainer.state.global_step:
                marked = trainer.state.global_step
                self.mark("scoring")
            return accumulate(*models)

        trainer.accelerator.accumulate = first_of_an_iteration
        trainer.train()

    def _end_and_note_lengths(self, result: Any) -> None:
        """End the responses where planned, in place; TRL generates all of them to the end and cuts them there."""
        responses = result[0][:, self.options.prompt :]
        if self._planned is not None:
            lengths = self._planned[len(self.lengths)].to(responses.device)
            responses.scatter_(1, lengths[:, None] - 1, self._eos)
        ended = (responses == self._eos).long().cumsum(dim=1)
        self.lengths.append(float(((ended - (responses == self._eos).long()) == 0).sum(dim=1).float().mean()))

    def _trainer(self, ppo_trainer: Any, callback: Any) -> Any:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        options = self.options
        tokenizer = AutoTokenizer.from_pretrained(self.models / "policy", padding_side="left")
        self._eos = tokenizer.eos_token_id
        dtype = torch.bfloat16 if options.peer_weights == "bf16" else torch.float32
        policies = [AutoModelForCausalLM.from_pretrained(self.models / "policy", dtype=dtype) for _ in range(2)]
        scalars = [
            AutoModelForSequenceClassification.from_pretrained(self.models / "reward", dtype=dtype) for _ in range(2)
        ]
        cuts = options.batch // options.minibatches // self.micro_batch
        if cuts > 1 and options.minibatches > 1:
            raise SystemExit("TRL cannot accumulate and make several optimizer steps an epoch; use --minibatches 1")
        arguments = ppo_trainer.PPOConfig(
            output_dir=str(self.models / "trl"),
            per_device_train_batch_size=options.batch // cuts,
            gradient_accumulation_steps=cuts,
            num_mini_batches=max(options.minibatches, cuts),
            num_ppo_epochs=options.epochs,
            local_rollout_forward_batch_size=options.batch,
            total_episodes=options.batch * len(self.data),
            response_length=options.response,
            stop_token="eos" if options.mean_length else None,
            temperature=1.0,
            learning_rate=1e-6,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            use_cpu=options.device == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        return ppo_trainer.PPOTrainer(
            args=arguments,
            processing_class=tokenizer,
            model=policies[0],
            ref_model=policies[1],
            reward_model=scalars[0],
            value_model=scalars[1],
            train_dataset=Dataset.from_dict({"input_ids": self.data.flatten(0, 1).tolist()}),
            callbacks=[callback],
        )


PPO_SIDES: dict[str, type[Side]] = {
    "ours": Ours,
    "ours_offloading": Offloading,
    "ours_trunk": Trunk,
    "lora": Adapted,
    "trl": Peer,
}

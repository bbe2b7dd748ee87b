"""What share of the possible gain each algorithm reaches on problems whose best policy is known.

    python tools/optimality.py [--jobs 2] [--quick] [--only "PPO, separate critic" ...]

A problem has a random two-layer Llama that draws from 4 tokens, three prompts of unequal length, responses of at most 3
tokens and a random score in [0, 1] for each response to each prompt. Every response can be listed, so the objective
J = E[score] - beta KL(policy || reference) is computed exactly, and so is its maximum J*. Reported is the share
(J - J_ref) / (J* - J_ref) that training through the public modules reaches; for the reward model it is the rank
correlation of its score differences with the table's. The row "exact ascent" climbs J itself: what the model can
represent. No prompt repeats a single token, as a Llama without a BOS token cannot count equal tokens: attention over
equal values is the same value, however many there are.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_lightning.algorithm.advantages import GAE, AdvantageEstimator, GlobalBaseline, GroupRelative, LeaveOneOut
from rlhf_lightning.algorithm.critics import Critic, SeparateCritic, TrunkCritic
from rlhf_lightning.algorithm.kl import FixedKL, KLControl
from rlhf_lightning.algorithm.objectives import ClippedObjective, ClippedValueObjective
from rlhf_lightning.algorithm.preference_losses import SigmoidLoss
from rlhf_lightning.data.collate import PairExample, collate_pairs, collate_sequences
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.evaluation.enumeration import (
    all_responses,
    enumerated_logprobs,
    regularised_value,
    share_reached,
)
from rlhf_lightning.models.export import write_model_folder
from rlhf_lightning.models.loading import load_causal_lm, quiet_transformers
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.rollout.reward_sources import FunctionReward
from rlhf_lightning.rollout.sampler import SamplingConfig
from rlhf_lightning.schedules import LinearDecay

LETTERS, STOP, MAX_TOKENS = ("a", "b", "c"), "<end>", 3
PROMPTS = ("b a", "a c b", "c b a c")
BETAS, SEEDS, VARIANTS = (0.1, 0.5), 5, ("fixed", "stop")
#: Labels are drawn by Bradley-Terry of 8 times the scores: of scores in [0, 1] themselves the widest gap would win but
#: 73 % of its comparisons, and a hundred times the pairs would be needed. Ranks, by which the reward model is judged,
#: do not depend on the unit; DPO's beta is in the same unit, so that its optimum does not either.
SCORE_UNIT = 8.0
REWARD_FILE = '''"""The score of each response to each prompt, from the table in this folder."""

import json
from pathlib import Path

TABLE = json.loads(Path(__file__).with_name("table.json").read_text())


def score(prompts: list[str], responses: list[str]) -> list[float]:
    return [TABLE[prompt][response] for prompt, response in zip(prompts, responses, strict=True)]
'''


@dataclass(frozen=True)
class Problem:
    """A problem whose every response is listed.

    Attributes:
        folder: Model folder, with ``prompts.jsonl`` and ``reward.py`` beside.
        max_tokens: Longest response.
        prompts: Token ids of each prompt.
        responses: Token ids of every response that can be drawn.
        rewards: Score of each response to each prompt, shape (prompts, responses), float64.
        ref_logprobs: Log-probability of each under the model as it starts, same shape.
    """

    folder: Path
    max_tokens: int
    prompts: list[list[int]]
    responses: list[list[int]]
    rewards: Tensor
    ref_logprobs: Tensor

    def value(self, model: nn.Module, beta: float) -> Tensor:
        """Return J, a scalar, with gradient."""
        logprobs = enumerated_logprobs(model, self.prompts, self.responses)
        return regularised_value(
            logprobs=logprobs, ref_logprobs=self.ref_logprobs, rewards=self.rewards, beta=beta
        ).mean()

    @torch.no_grad()
    def share(self, model: nn.Module, beta: float) -> float:
        """Return the share of the possible gain that a model has reached."""
        logprobs = enumerated_logprobs(model, self.prompts, self.responses)
        return share_reached(logprobs=logprobs, ref_logprobs=self.ref_logprobs, rewards=self.rewards, beta=beta)

    def pairs(self, count: int, *, seed: int, uniform: bool = False, unit: float = 1.0) -> list[PairExample]:
        """Draw pairs of responses, from the reference or evenly, labelled by Bradley-Terry of ``unit`` times scores."""
        generator = torch.Generator().manual_seed(seed)
        places = torch.randint(len(self.prompts), (count,), generator=generator)
        weights = torch.ones_like(self.ref_logprobs) if uniform else self.ref_logprobs.exp()
        drawn = torch.stack([row.multinomial(2 * count, True, generator=generator) for row in weights])
        first, second = (drawn[places, torch.arange(count) + shift] for shift in (0, count))
        better = (unit * (self.rewards[places, first] - self.rewards[places, second])).sigmoid()
        wins = torch.rand(count, generator=generator) < better
        chosen, rejected = torch.where(wins, first, second), torch.where(wins, second, first)
        rows = zip(places.tolist(), chosen.tolist(), rejected.tolist(), strict=True)
        return [PairExample(self.prompts[x], self.responses[y], self.responses[z]) for x, y, z in rows]


def build_problem(folder: Path, *, variant: str, seed: int, max_tokens: int = MAX_TOKENS) -> Problem:
    """Write a problem into a folder: ``stop`` has a stop token among its 4 tokens, ``fixed`` none that can be drawn."""
    generator = torch.Generator().manual_seed(seed)
    stops = variant == "stop"
    usable = [*LETTERS, STOP if stops else "d"]
    tokenizer = _tokenizer([*usable, *(() if stops else (STOP,))], eos=stops)
    model = _random_llama(len(usable), seed)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        write_model_folder(folder, model, tokenizer)
    prompts = [list(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    stop_id = tokenizer.convert_tokens_to_ids(STOP)
    responses = all_responses(range(len(usable)), max_new_tokens=max_tokens, stop_ids=[stop_id])
    rewards = torch.rand(len(prompts), len(responses), generator=generator, dtype=torch.float64)
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    assert len(set(texts)) == len(responses)  # the score is looked up by text
    table = {prompt: dict(zip(texts, row, strict=True)) for prompt, row in zip(PROMPTS, rewards.tolist(), strict=True)}
    (folder / "table.json").write_text(json.dumps(table))
    (folder / "reward.py").write_text(REWARD_FILE)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    with torch.no_grad():
        ref_logprobs = enumerated_logprobs(model, prompts, responses)
    return Problem(folder, max_tokens, prompts, responses, rewards, ref_logprobs)


def _tokenizer(vocabulary: list[str], *, eos: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(vocabulary)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **({"eos_token": STOP} if eos else {}))


def _random_llama(vocabulary_size: int, seed: int) -> LlamaForCausalLM:
    """Return a model whose random features tell contexts well apart, with probabilities neither even nor extreme."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary_size,
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=16,
            initializer_range=0.2,
            rope_parameters={"rope_type": "default", "rope_theta": 10.0},
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        model = LlamaForCausalLM(config)
        nn.init.normal_(model.model.embed_tokens.weight)
        nn.init.normal_(model.lm_head.weight, std=32**-0.5)
    return model


# --- training ---------------------------------------------------------------------------------------------------------


def adam(learning_rate: float) -> Callable[[Iterable[Any]], torch.optim.Optimizer]:
    """Return what the modules take as ``optimizer``."""
    return lambda params: torch.optim.Adam(params, lr=learning_rate, betas=(0.9, 0.99), eps=1e-5)


def fit(module: LightningModule, steps: int, data: Any) -> None:
    """Run a quiet Trainer on the CPU."""
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, **({"datamodule": data} if isinstance(data, PromptDataModule) else {"train_dataloaders": data}))


def ascend_exactly(
    problem: Problem, beta: float, seed: int, *, steps: int = 1000, learning_rate: float = 3e-3
) -> float:
    """Climb the enumerated J itself by Adam."""
    model = load_causal_lm(str(problem.folder))
    optimizer = adam(learning_rate)(model.parameters())
    schedule = LinearDecay(optimizer, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (-problem.value(model, beta)).backward()
        optimizer.step()
        schedule.step()
    return problem.share(model, beta)


def train_on_rollouts(
    problem: Problem,
    beta: float,
    seed: int,
    *,
    advantages: AdvantageEstimator,
    critic: Critic | None = None,
    kl: KLControl | None = None,
    iterations: int = 200,
    rollout: int = 384,
    minibatch: int = 128,
    epochs: int = 2,
    learning_rate: float = 2e-3,
) -> PPOModule:
    """Train by PPO or a critic-free relative of it."""
    seed_everything(seed, verbose=False)
    module = PPOModule(
        policy=str(problem.folder),
        reward=FunctionReward(f"{problem.folder}/reward.py:score"),
        critic=critic,
        advantages=advantages,
        kl=kl or FixedKL(beta),
        sampling=SamplingConfig(max_new_tokens=problem.max_tokens, stop_tokens=[STOP]),
        policy_objective=ClippedObjective(clip_range=0.2),
        value_objective=None if critic is None else ClippedValueObjective(coef=0.5, value_clip_range=None),
        ppo_epochs=epochs,
        minibatch_size=minibatch,
        optimizer=adam(learning_rate),
        lr_scheduler=LinearDecay,
    )
    data = PromptDataModule(
        str(problem.folder / "prompts.jsonl"),
        rollout_batch_size=rollout,
        responses_per_prompt=32,
        max_prompt_length=8,
        chat=False,
    )
    fit(module, iterations, data)
    return module


def train_dpo(
    problem: Problem, beta: float, seed: int, *, pairs: int = 200_000, batch: int = 500, learning_rate: float = 5e-3
) -> float:
    """Train by DPO on pairs drawn from the reference, one pass."""
    seed_everything(seed, verbose=False)
    module = DPOModule(
        policy=str(problem.folder),
        loss=SigmoidLoss(SCORE_UNIT * beta),
        optimizer=adam(learning_rate),
        lr_scheduler=LinearDecay,
    )
    fit(module, pairs // batch, pair_loader(problem.pairs(pairs, seed=seed, unit=SCORE_UNIT), batch))
    return problem.share(module.policy, beta)


def train_reward_model(
    problem: Problem, beta: float, seed: int, *, pairs: int = 200_000, batch: int = 200, learning_rate: float = 3e-3
) -> float:
    """Train a reward model on evenly drawn pairs, and rank-correlate its score differences with the table's."""
    seed_everything(seed, verbose=False)
    module = RewardModule(str(problem.folder), optimizer=adam(learning_rate), lr_scheduler=LinearDecay)
    fit(module, pairs // batch, pair_loader(problem.pairs(pairs, seed=seed, uniform=True, unit=SCORE_UNIT), batch))
    differences: list[list[Tensor]] = [[], []]
    left, right = torch.tensor(list(combinations(range(len(problem.responses)), 2))).T
    for prompt, truth in zip(problem.prompts, problem.rewards, strict=True):
        with torch.no_grad():
            scores = module.scalar.scores(collate_sequences([(prompt, y) for y in problem.responses], pad_id=0))
        for kept, values in zip(differences, (scores, truth), strict=True):
            kept.append((values[left] - values[right]).double())
    return rank_correlation(*(torch.cat(kept) for kept in differences))


def pair_loader(pairs: list[PairExample], batch: int) -> Any:
    """Return a loader over pairs in the order in which they were drawn."""
    return DataLoader(pairs, batch_size=batch, collate_fn=lambda rows: collate_pairs(rows, pad_id=0))  # type: ignore[arg-type]


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Return Spearman's coefficient of two tensors without ties, shape (n,)."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (x, y)])
    return float(torch.corrcoef(ranks)[0, 1])


# --- the table --------------------------------------------------------------------------------------------------------

Recipe = Callable[[Problem, float, int], float]


def on_rollouts(make: Callable[[], dict[str, Any]]) -> Recipe:
    """Return a recipe that trains with these parts and computes the share."""
    return lambda problem, beta, seed: problem.share(train_on_rollouts(problem, beta, seed, **make()).policy, beta)


#: Each row's recipe, and what is asked of its median and of its worst.
ROWS: dict[str, tuple[Recipe, float, float]] = {
    "exact ascent": (ascend_exactly, 0.99, 0.0),
    "PPO, separate critic": (on_rollouts(lambda: {"advantages": GAE(), "critic": SeparateCritic()}), 0.95, 0.90),
    "PPO, shared trunk": (on_rollouts(lambda: {"advantages": GAE(), "critic": TrunkCritic()}), 0.95, 0.90),
    "RLOO": (on_rollouts(lambda: {"advantages": LeaveOneOut()}), 0.95, 0.90),
    "REINFORCE++": (on_rollouts(lambda: {"advantages": GlobalBaseline()}), 0.95, 0.90),
    "GRPO, not scaled": (on_rollouts(lambda: {"advantages": GroupRelative(scale=False)}), 0.95, 0.90),
    "DPO": (train_dpo, 0.95, 0.0),
    "reward model": (train_reward_model, 0.98, 0.0),
}


class Job(NamedTuple):
    """One run."""

    row: str
    variant: str
    beta: float
    seed: int


def run(job: Job) -> tuple[float, float]:
    """Return what a run reached, and its seconds."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "rlhf_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        problem = build_problem(Path(folder), variant=job.variant, seed=job.seed)
        start = time.perf_counter()
        return ROWS[job.row][0](problem, job.beta, job.seed), time.perf_counter() - start


def print_row(row: str, variant: str, beta: float, results: list[tuple[float, float]]) -> bool:
    """Print a line of the table, and tell whether it reached what is asked."""
    reached, seconds = zip(*results, strict=True)
    median, worst = statistics.median(reached), min(reached)
    good = median >= ROWS[row][1] and worst >= ROWS[row][2]
    beta_text = "-" if row == "reward model" else f"{beta:g}"
    verdict = "ok" if good else "MISSED"
    print(
        f"{row:<22}{variant:<8}{beta_text:>5}{median:>9.3f}{worst:>9.3f}{statistics.mean(seconds):>9.1f}  {verdict}",
        flush=True,
    )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, a thread each")
    parser.add_argument("--quick", action="store_true", help="one seed, and responses that stop early alone")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help="rows to run")
    parser.add_argument("--betas", nargs="+", type=float, default=list(BETAS), help="prices of a nat")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="problems, and runs, of each kind")
    options = parser.parse_args()
    seeds, variants = (1, VARIANTS[1:]) if options.quick else (options.seeds, VARIANTS)
    start, all_good = time.perf_counter(), True
    print(f"{'algorithm':<22}{'length':<8}{'beta':>5}{'median':>9}{'worst':>9}{'seconds':>9}")
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        cells = {
            (row, variant, beta): [pool.submit(run, Job(row, variant, beta, seed)) for seed in range(seeds)]
            for row in options.only
            for variant in variants
            for beta in (options.betas[:1] if row == "reward model" else options.betas)
        }
        for cell, futures in cells.items():
            all_good &= print_row(*cell, [future.result() for future in futures])
    print(f"{time.perf_counter() - start:.0f} s with {options.jobs} at a time, {seeds} seeds")
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(main())

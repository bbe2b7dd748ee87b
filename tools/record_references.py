"""Record the numbers that TRL computes on small batches, so that the tests can compare ours with them.

    python3.11 -m venv trl-1.12 && trl-1.12/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.12.0
    python3.11 -m venv trl-1.16 && trl-1.16/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0
    trl-1.12/bin/python tools/record_references.py   # PPO: the last release that has it
    trl-1.16/bin/python tools/record_references.py   # reward model, DPO, KTO, GRPO, RLOO

No formula is typed again here: TRL's own trainers run on tiny models, and the values of their local variables are read
while they run. What goes into a loss (log-probabilities, scores, masks) is recorded beside what comes out, so that the
tests need neither TRL nor its random numbers; they read ``tests/references/*.json``.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from reference_models import WORDS, written_model  # type: ignore[import-not-found]
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SCRATCH = tempfile.TemporaryDirectory()
COMMON = {
    "output_dir": SCRATCH.name,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Split at blanks; pad, unknown and end are three different tokens."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def make_model(seed: int, *, scalar: bool = False) -> Any:
    """Return a written model, loaded from a folder, as TRL looks into the folder that a model came from."""
    model = written_model(seed, scalar=scalar)
    folder = f"{SCRATCH.name}/{seed}-{scalar}"
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).train()


def draw_text(generator: np.random.Generator, low: int, high: int) -> str:
    return " ".join(generator.choice(WORDS[3:], size=int(generator.integers(low, high + 1))))


def draw_pairs(count: int, seed: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    lengths = {"prompt": 4, "chosen": 8, "rejected": 8}
    return [{name: " " + draw_text(generator, 1, most) for name, most in lengths.items()} for _ in range(count)]


Action = Callable[[dict[str, Any]], None]


@contextmanager
def watch(spots: dict[tuple[CodeType, str], Action]) -> Iterator[None]:
    """Call an action with the local variables of a function each time it reaches a certain line.

    Args:
        spots: For each action the function and how the line begins, or ``return`` for the function's end.

    Raises:
        LookupError: If a text is on no line of its function, or on several, as after a change in TRL.
    """
    places: dict[tuple[CodeType, int | str], Action] = {}
    for (code, text), action in spots.items():
        lines = Path(code.co_filename).read_text(encoding="utf-8").splitlines()
        numbers = {number for _, _, number in code.co_lines() if number is not None}
        found = [number for number in numbers if lines[number - 1].strip().startswith(text)]
        if text != "return" and len(found) != 1:
            raise LookupError(f"{code.co_name}: {len(found)} lines start with {text!r}; expected one.")
        places[code, "return" if text == "return" else found[0]] = action
    codes = {code for code, _ in places}

    def local(frame: FrameType, event: str, _: Any) -> Any:
        place = frame.f_code, frame.f_lineno if event == "line" else event
        if place in places:
            places[place](frame.f_locals)
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, _event, _arg: local if frame.f_code in codes else None)
    try:
        yield
    finally:
        sys.settrace(before)


def plain(value: Any) -> Any:
    """Turn tensors into lists, floats shortened to the nine digits that a float32 has."""
    if isinstance(value, torch.Tensor):
        return plain(value.detach().tolist())
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def pick(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: plain(values[name]) for name in names}


# --- TRL 1.12: PPO ---------------------------------------------------------------------------------------------------

ROLLOUT = (
    *(
        "queries",
        "responses",
        "postprocessed_responses",
        "sequence_lengths",
        "padding_mask",
        "padding_mask_p1",
        "logprobs",
    ),
    *("ref_logprobs", "values", "scores", "kl", "rewards", "advantages", "returns"),
)
MICRO_BATCH = (
    *("new_logprobs", "mb_logprobs", "mb_advantage", "vpred", "mb_values", "mb_return", "ratio", "pg_loss", "vf_loss"),
    *("pg_clipfrac", "vf_clipfrac", "approxkl", "loss"),
)


def record_ppo(kl_estimator: str, whiten_rewards: bool) -> dict[str, Any]:
    """Run two iterations of PPOTrainer (16 responses, 2 epochs of 2 minibatches of 2 micro-batches); keep the first."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer, generator = make_tokenizer(), np.random.default_rng(0)
    tokenizer.padding_side = "left"
    prompts = [tokenizer(draw_text(generator, 1, 4)).input_ids for _ in range(32)]
    settings = {
        "kl_coef": 0.3,
        "kl_estimator": kl_estimator,
        "whiten_rewards": whiten_rewards,
        "missing_eos_penalty": 1.0,
        "gamma": 0.97,
        "lam": 0.9,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.1,
        "temperature": 0.7,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "max_grad_norm": 0.01,
    }
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "total_episodes": 32}
    rest = {"response_length": 8, "stop_token": "eos", "num_sample_generations": 0, "learning_rate": 0.01, "seed": 3}
    config = PPOConfig(**settings, **sizes, **rest, **COMMON)
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=make_model(1),
        ref_model=make_model(2),
        reward_model=make_model(3, scalar=True),
        value_model=make_model(4, scalar=True),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
    )
    found: dict[str, Any] = {
        "rollout": {},
        "micro_batches": [],
        "logged": {},
        "optimizer_steps": [0, 0],
        "gradient_clips": 0,
    }

    def first(action: Action) -> Action:
        return lambda seen: action(seen) if seen["update"] == 1 else None

    def note_micro_batch(seen: dict[str, Any]) -> None:
        extra = {"rows": seen["micro_batch_inds"].tolist(), "mean_ratio": plain(seen["ratio"].mean())}
        found["micro_batches"].append(pick(seen, *MICRO_BATCH) | extra)

    def count_step(*_: Any) -> None:  # where an optimizer really moves: TRL calls `step` after every micro-batch
        found["optimizer_steps"][trainer.state.global_step] += 1

    def count_clip(*_: Any) -> None:
        found["gradient_clips"] += 1

    spots = {
        "if args.whiten_rewards": first(lambda seen: found.update(rewards_before_whitening=plain(seen["rewards"]))),
        "returns = ": first(lambda seen: found.update(advantages_before_whitening=plain(seen["advantages"]))),
        "b_inds = ": first(lambda seen: found["rollout"].update(pick(seen, *ROLLOUT))),
        "ratio_stats[ppo_epoch_idx": first(note_micro_batch),
        "self.log(metrics)": first(lambda seen: found["logged"].update(plain(seen["metrics"]))),
    }
    np.random.seed(0)  # TRL shuffles with the global generator
    trainer.optimizer.optimizer.register_step_post_hook(count_step)
    trainer.accelerator.clip_grad_norm_ = count_clip
    with watch({(PPOTrainer.train.__code__, text): action for text, action in spots.items()}):
        trainer.train()
    del found["logged"]["eps"]  # a speed
    return {"settings": settings | {"context_length": 4}, **found}


# --- TRL 1.16: reward model, DPO, KTO, GRPO, RLOO --------------------------------------------------------------------


def record_reward(margin: bool, center: float | None) -> dict[str, Any]:
    """Run RewardTrainer's loss on eight pairs, one of which has equal sides."""
    from trl import RewardConfig, RewardTrainer

    rows = draw_pairs(8, seed=1)
    rows[3]["rejected"] = rows[3]["chosen"]
    if margin:
        rows = [row | {"margin": number / 4 - 1} for number, row in enumerate(rows)]
    config = RewardConfig(per_device_train_batch_size=8, center_rewards_coefficient=center, max_length=32, **COMMON)
    trainer = RewardTrainer(
        make_model(3, scalar=True), config, train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer()
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(trainer.model, dict(inputs), return_outputs=True)
    chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
    metrics = {key: plain(value[-1]) for key, value in trainer._metrics["train"].items() if key != "num_tokens"}
    return {
        "inputs": pick(inputs, "input_ids", "attention_mask"),
        "center_rewards_coefficient": center,
        "chosen_scores": plain(chosen),
        "rejected_scores": plain(rejected),
        "margin": plain(inputs["margin"]) if margin else None,
        "loss": plain(loss),
        "metrics": metrics,
    }


def run_loss(trainer: Any, names: tuple[str, ...], metrics: tuple[str, ...]) -> dict[str, Any]:
    """Compute a trainer's loss on its first batch; return some of the local variables and of the metrics."""
    inputs = next(iter(trainer.get_train_dataloader()))
    found: dict[str, Any] = {"inputs": pick(inputs, "input_ids", "attention_mask", "completion_mask")}
    with watch({(type(trainer)._compute_loss.__code__, "return"): lambda seen: found.update(pick(seen, *names))}):
        trainer.compute_loss(trainer.model, dict(inputs))
    return found | {"metrics": {key: plain(trainer._metrics["train"][key][-1]) for key in metrics}}


DPO_CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_type": ["sigmoid"]},
    # 1.16 smooths labels in "aot" only, which sorts a batch; of a single pair it is the smoothed sigmoid loss.
    "label_smoothing": {"loss_type": ["aot"], "label_smoothing": 0.1},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"]},
    "length_desensitised": {"loss_type": ["sigmoid"], "ld_alpha": 0.4},
}


def record_dpo(case: dict[str, Any]) -> dict[str, Any]:
    """Run DPOTrainer's loss on six pairs, policy and reference being two different random models."""
    from trl import DPOConfig, DPOTrainer

    rows, size = draw_pairs(6, seed=2), 1 if "aot" in case["loss_type"] else 6
    config = DPOConfig(per_device_train_batch_size=size, beta=0.3, max_length=32, **case, **COMMON)
    data = Dataset.from_list(rows)
    trainer = DPOTrainer(make_model(1), make_model(2), config, train_dataset=data, processing_class=make_tokenizer())
    names = (
        "per_token_logps",
        "ref_per_token_logps",
        "shift_completion_mask",
        "chosen_logps",
        "rejected_logps",
        "loss",
    )
    metrics = tuple(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins"))
    return {"settings": {"beta": 0.3, **case}} | run_loss(trainer, names, (*metrics, "logps/chosen", "logps/rejected"))


def record_kto(case: dict[str, Any]) -> dict[str, Any]:
    """Run KTOTrainer's loss on eight single responses."""
    from trl import KTOConfig, KTOTrainer

    rows = [
        {"prompt": pair["prompt"], "completion": pair["chosen"], "label": number % 3 > 0}
        for number, pair in enumerate(draw_pairs(8, seed=4))
    ]
    config = KTOConfig(per_device_train_batch_size=8, beta=0.3, max_length=32, **case, **COMMON)
    data = Dataset.from_list(rows)
    trainer = KTOTrainer(make_model(1), make_model(5), config, train_dataset=data, processing_class=make_tokenizer())
    names = ("completion_logps", "ref_completion_logps", "bool_labels", "KL_logps", "ref_KL_logps", "kl", "loss")
    metrics = ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl")
    return {"settings": {"beta": 0.3, **case}} | run_loss(trainer, names, metrics)


def score_text(completions: list[str], **_: Any) -> list[float]:
    """Score a text by its words: a number that differs within most groups."""
    return [sum(WORDS.index(word) for word in text.split() if word in WORDS) / 7 - 2 for text in completions]


def record_group(kind: str, case: dict[str, Any]) -> dict[str, Any]:
    """Run two optimizer steps of GRPOTrainer or RLOOTrainer on one batch of 4 prompts with 4 responses each."""
    config_class = getattr(trl, f"{kind}Config")
    trainer_class = getattr(trl, f"{kind}Trainer")
    generator = np.random.default_rng(5)
    rows = [{"prompt": draw_text(generator, 1, 4)} for _ in range(4)]
    sizes = {"per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 6, "num_iterations": 2}
    rest = {"max_steps": 2, "learning_rate": 0.05, "seed": 3, "logging_steps": 1, "max_grad_norm": 1e9}
    config = config_class(**sizes, **rest, **case, **COMMON)
    policy = make_model(1)
    trainer = trainer_class(
        policy,
        reward_funcs=score_text,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )
    found: dict[str, Any] = {"losses": []}
    names = ["per_token_logps", "old_per_token_logps", "mask", "advantages", "loss"]
    names += ["ref_per_token_logps", "per_token_kl"] if case["beta"] else []

    def note_loss(seen: dict[str, Any]) -> None:
        found["losses"].append(pick(seen, *names))

    code = trainer_class._generate_and_score_completions.__code__
    spots: dict[tuple[CodeType, str], Action] = {
        (code, "process_slice = "): lambda seen: found.update(pick(seen, "rewards", "advantages"))
    }
    if kind == "GRPO":
        spots[trainer_class._compute_loss.__code__, "return"] = note_loss
    with watch(spots):
        trainer.train()
    return {"settings": case | {"max_completion_length": 6, "num_generations": 4}, **found}


GRPO_CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "scale_rewards": "group", "beta": 0.1, "use_bias_correction_kl": False},
    "grpo_weighted_kl": {"loss_type": "grpo", "scale_rewards": "group", "beta": 0.1, "use_bias_correction_kl": True},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0},
    "bnpo": {"loss_type": "bnpo", "scale_rewards": "batch", "beta": 0.0, "epsilon_high": 0.28},
}
RLOO_CASES: dict[str, dict[str, Any]] = {
    "rloo": {"beta": 0.1, "normalize_advantages": False},
    "normalised": {"beta": 0.0, "normalize_advantages": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "tests" / "references")
    options = parser.parse_args()
    torch.set_num_threads(1)
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    versions["python"] = platform.python_version()
    if trl.__version__.startswith("1.12."):
        recorded = {"ppo": {"k1": record_ppo("k1", False), "k3_whitened": record_ppo("k3", True)}}
    elif trl.__version__.startswith("1.16."):
        recorded = {
            "reward": {
                "plain": record_reward(False, None),
                "margin": record_reward(True, None),
                "margin_centred": record_reward(True, 0.1),
            },
            "dpo": {name: record_dpo(case) for name, case in DPO_CASES.items()},
            "kto": {
                "plain": record_kto({}),
                "weighted": record_kto({"desirable_weight": 1.5, "undesirable_weight": 0.5}),
            },
            "grpo": {name: record_group("GRPO", case) for name, case in GRPO_CASES.items()},
            "rloo": {name: record_group("RLOO", case) for name, case in RLOO_CASES.items()},
        }
    else:
        raise SystemExit(f"trl {trl.__version__} is installed; record PPO with 1.12 and all else with 1.16.")
    for name, cases in recorded.items():
        path = options.output / f"{name}.json"
        path.write_text(json.dumps({"versions": versions, "cases": cases}) + "\n", encoding="utf-8")
        print(f"{path}: {', '.join(cases)}")


if __name__ == "__main__":
    main()

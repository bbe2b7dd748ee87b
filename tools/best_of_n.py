"""What a policy gains for its KL on held-out prompts, beside best-of-n sampling from the base it started from.

    python tools/best_of_n.py --base FOLDER --reward FOLDER --prompts FILE --exclude FILE --models NAME=FOLDER ...

J = mean score - kl_coef · KL, with the score of a reward model (normalised by the statistics stored with it) and the KL
of whole responses in nats. Best-of-n pays log n - (n - 1) / n nats, the bound of Stiennon et al. 2020 (appendix G.3);
its means over subsets of n of the base's responses to a prompt are exact. Intervals are bootstraps over prompts, 95 %.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_lightning.data.chat import ConversationEncoder
from rlhf_lightning.evaluation.best_of_n import best_of_groups, best_of_n_kl, best_of_n_weights
from rlhf_lightning.evaluation.generations import sample_responses, sequence_logprobs
from rlhf_lightning.evaluation.prompts import encode_prompts, read_prompts
from rlhf_lightning.evaluation.statistics import bootstrap_mean, distinct_n
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.rollout.collect import decode_responses
from rlhf_lightning.rollout.reward_model import RewardModel
from rlhf_lightning.rollout.reward_sources import FunctionReward, ScoringBatch
from rlhf_lightning.rollout.sampler import SamplingConfig, resolve_stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: One number for each response, shape (prompts, responses to each), and the texts in that order.
Measured = tuple[dict[str, Tensor], list[str]]


@dataclass(frozen=True)
class Bench:
    """What is the same for every model.

    Attributes:
        base: The model that KL and fluency are measured against.
        tokenizer: Its tokenizer.
        reward: Gives the score.
        known: A function that is only reported, such as the one that labelled the pairs; ``None`` is none.
        prompts: Held-out prompts as text.
        prompt_ids: The same in tokens.
        sampling: What to sample.
        batch_size: Responses in one forward pass.
    """

    base: "PreTrainedModel"
    tokenizer: Any
    reward: RewardModel
    known: FunctionReward | None
    prompts: list[str]
    prompt_ids: list[list[int]]
    sampling: SamplingConfig
    batch_size: int = 128

    @classmethod
    def build(cls, options: argparse.Namespace) -> "Bench":
        """Load models and prompts; prompts that ``exclude`` holds too are left out, and each is asked once."""
        tokenizer = load_tokenizer(options.base)
        reward = RewardModel(options.reward, normalize=True, batch_size=128)
        reward.setup(tokenizer)
        read = {name: read_prompts(name, chat=False, text_words=options.text_words) for name in options.exclude}
        seen = {prompt for found in read.values() for prompt in found.prompts}
        held_out = read_prompts(options.prompts, chat=False, text_words=options.text_words).prompts
        prompts = [str(prompt) for prompt in dict.fromkeys(held_out) if prompt not in seen]
        encoder = ConversationEncoder(tokenizer, chat=False)
        return cls(
            load_causal_lm(options.base).eval(),
            tokenizer,
            reward,
            FunctionReward(options.known) if options.known else None,
            prompts,
            encode_prompts(encoder, prompts, options.max_prompt_length),
            SamplingConfig(max_new_tokens=options.max_new_tokens, stop_tokens=options.stop_tokens),
        )

    @torch.no_grad()
    def measure(self, model: "PreTrainedModel", *, samples: int, seed: int) -> Measured:
        """Let a model answer each prompt ``samples`` times, and measure every response."""
        ids = [ids for ids in self.prompt_ids for _ in range(samples)]
        prompts = [prompt for prompt in self.prompts for _ in range(samples)]
        stop_ids = resolve_stop_ids(self.tokenizer, self.sampling.stop_tokens)
        sequences, finished = sample_responses(
            model, ids, config=self.sampling, stop_ids=stop_ids, seed=seed, batch_size=self.batch_size
        )
        texts = decode_responses(self.tokenizer, sequences)
        batch = ScoringBatch(sequences, finished, list(prompts), texts, [{} for _ in texts])
        base = sequence_logprobs(self.base, sequences, batch_size=self.batch_size)
        own = base if model is self.base else sequence_logprobs(model, sequences, batch_size=self.batch_size)
        numbers = {
            "score": self.reward.score(batch).total,
            "kl": own - base,
            "base_logprob_per_token": base / sequences.response_lengths,
            "length": sequences.response_lengths,
            "own_distinct_2": torch.tensor([own_distinct_2(text) for text in texts]),
        }
        if self.known is not None:
            numbers["known"] = self.known.score(batch).total
        return {name: values.double().view(len(self.prompts), samples) for name, values in numbers.items()}, texts


def own_distinct_2(text: str) -> float:
    """Return the share of different word pairs within one text: below 1 it says things again; 1 without any pair.

    Example:
        >>> own_distinct_2("the cat the cat"), own_distinct_2("cat")
        (0.6666666666666666, 1.0)
    """
    share = distinct_n([text], 2)
    return 1.0 if math.isnan(share) else share


def summary(by_prompt: dict[str, Tensor], texts: list[str], kl_coef: float) -> dict[str, Any]:
    """Return mean and interval of each number, J among them, and the share of different word pairs.

    Args:
        by_prompt: Means over each prompt's responses, shape (prompts,) each.
        texts: Responses; none leaves the word pairs out.
        kl_coef: Price of a nat.
    """
    by_prompt = {"J": by_prompt["score"] - kl_coef * by_prompt["kl"], **by_prompt}
    row: dict[str, Any] = {name: list(bootstrap_mean(values)) for name, values in by_prompt.items()}
    return {**row, "distinct_2": distinct_n(texts, 2)} if texts else row


def main() -> None:
    options = _options()
    bench = Bench.build(options)
    print(f"{len(bench.prompts)} held-out prompts", flush=True)
    numbers, texts = bench.measure(bench.base, samples=options.base_samples, seed=options.seed)
    # Word pairs of as many responses as the models give, as more text has fewer different ones.
    rows = [row for row in range(len(texts)) if row % options.base_samples < options.samples]
    first = {name: values.mean(dim=1) for name, values in numbers.items()}
    table = {"base": summary(first, [texts[row] for row in rows], options.kl_coef)}
    for n in options.n:
        weights = best_of_n_weights(numbers["score"], n)
        means = {name: (weights * values).sum(dim=1) for name, values in numbers.items()}
        means["kl"] = torch.full_like(means["kl"], best_of_n_kl(n))
        chosen = best_of_groups(numbers["score"], n, most=options.samples)
        table[f"best-of-{n}"] = summary(means, [texts[row] for row in chosen], options.kl_coef)
    for named in options.models:
        name, _, path = named.partition("=")
        numbers, texts = bench.measure(load_causal_lm(path).eval(), samples=options.samples, seed=options.seed + 1)
        means = {key: values.mean(dim=1) for key, values in numbers.items()}
        table[name] = {**summary(means, texts, options.kl_coef), "samples": texts[:: options.samples][:5]}
    print_table(table)
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def print_table(table: dict[str, dict[str, Any]]) -> None:
    """Print the means, and the interval of J."""
    columns = ["score", "kl", "base_logprob_per_token", "own_distinct_2", "distinct_2", "length", "known"]
    print(f"{'':24}{'J':>22}" + "".join(f"{name[:14]:>16}" for name in columns))
    for name, row in table.items():
        mean, low, high = row["J"]
        cells = [row.get(column, math.nan) for column in columns]
        numbers = [cell[0] if isinstance(cell, list) else cell for cell in cells]
        interval = f"{mean:.2f} [{low:.2f}, {high:.2f}]"
        print(f"{name:24}{interval:>22}" + "".join(f"{number:16.3f}" for number in numbers), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder of the untouched model")
    parser.add_argument("--reward", required=True, help="folder of the reward model, with stored score statistics")
    parser.add_argument("--prompts", required=True, help="held-out prompts, or texts whose first words are taken")
    parser.add_argument("--exclude", nargs="*", default=[], help="files whose prompts are left out: those of training")
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME=FOLDER", help="trained policies")
    parser.add_argument("--known", help="path/to/file.py:name, a function of prompts and responses to report")
    parser.add_argument("--n", nargs="*", type=int, default=[4, 16])
    parser.add_argument("--samples", type=int, default=4, help="responses of each policy to each prompt")
    parser.add_argument("--base_samples", type=int, default=64, help="responses of the base to each prompt")
    parser.add_argument("--kl_coef", type=float, default=0.05)
    parser.add_argument("--text_words", type=int, default=8, help="words of a text that make its prompt")
    parser.add_argument("--max_prompt_length", type=int, default=16, help="tokens")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--stop_tokens", nargs="*", default=["<s>"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()

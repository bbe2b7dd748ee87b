"""Sample two responses to each prompt from a model and label the pair by a known score, for a reward model to learn.

    python tools/sample_pairs.py --model FOLDER --prompts FILE --score configs/stories/reward.py:bright --output FILE

The better one is drawn by Bradley-Terry: with probability sigmoid(score a - score b) it is ``a``. Each line holds
``prompt``, ``chosen`` and ``rejected`` as plain text, and ``score_chosen`` and ``score_rejected``.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.evaluation.generations import sample_responses
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.rollout.sampler import SamplingConfig, resolve_stop_ids
from rlhf_lightning.rollout.user_functions import as_numbers, call_with_columns, load_function
from rlhf_lightning.seeding import derived_generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="language model to sample from")
    parser.add_argument("--prompts", required=True, help="file of prompts, or of texts whose first words are taken")
    parser.add_argument("--score", required=True, help="path/to/file.py:name, a function of prompts and responses")
    parser.add_argument("--output", required=True, help="JSON Lines file to write")
    parser.add_argument("--pairs", type=int, default=6000)
    parser.add_argument("--text_words", type=int, default=8, help="words of a text that make its prompt")
    parser.add_argument("--max_prompt_length", type=int, default=16, help="tokens")
    parser.add_argument("--max_new_tokens", type=int, default=72)
    parser.add_argument("--stop_token", default="<s>")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = labelled_pairs(options)
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    right = sum(row["score_chosen"] > row["score_rejected"] for row in rows)
    print(f"{len(rows)} pairs written to {output}; in {right / len(rows):.1%} the chosen one has the higher score")


def labelled_pairs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the file."""
    data = PromptDataModule(
        options.prompts,
        text_words=options.text_words,
        max_prompt_length=options.max_prompt_length,
        chat=False,
        tokenizer=options.model,
    )
    data.setup("fit")
    asked = [data.train_examples[row % len(data.train_examples)] for row in range(options.pairs)]
    twice = [example for example in asked for _ in range(2)]
    tokenizer = load_tokenizer(options.model)
    sequences, _ = sample_responses(
        load_causal_lm(options.model).eval(),
        [example.prompt_ids for example in twice],
        config=SamplingConfig(max_new_tokens=options.max_new_tokens, stop_tokens=[options.stop_token]),
        stop_ids=resolve_stop_ids(tokenizer, [options.stop_token]),
        seed=options.seed,
        batch_size=options.batch_size,
    )
    responses = continuations(tokenizer, [list(example.prompt_ids) for example in twice], sequences)
    prompts = [example.prompt for example in twice]
    scores = as_numbers(call_with_columns(load_function(options.score), prompts, responses, {}, name="score"), "score")
    first_wins = torch.rand(len(asked), generator=derived_generator(options.seed, "labels")) < torch.sigmoid(
        scores[0::2] - scores[1::2]
    )
    rows: list[dict[str, Any]] = []
    for pair, first in enumerate(first_wins.tolist()):
        chosen, rejected = (2 * pair, 2 * pair + 1) if first else (2 * pair + 1, 2 * pair)
        rows.append(
            {
                "prompt": prompts[chosen],
                "chosen": responses[chosen],
                "rejected": responses[rejected],
                "score_chosen": float(scores[chosen]),
                "score_rejected": float(scores[rejected]),
            }
        )
    return rows


def continuations(
    tokenizer: "PreTrainedTokenizerBase", prompt_ids: list[list[int]], sequences: SequenceBatch
) -> list[str]:
    """Return the responses as they follow their prompts: alone, many tokenizers would drop the blank between them."""
    before = tokenizer.batch_decode(prompt_ids, skip_special_tokens=True)
    pairs = zip(sequences.input_ids.tolist(), sequences.lengths.tolist(), strict=True)
    whole = tokenizer.batch_decode([ids[:length] for ids, length in pairs], skip_special_tokens=True)
    return [text.removeprefix(prompt) for text, prompt in zip(whole, before, strict=True)]


if __name__ == "__main__":
    main()

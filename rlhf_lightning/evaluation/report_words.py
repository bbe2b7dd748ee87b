"""What every form of the report says in the same words: its title, how was measured, and which samples are shown."""

from collections.abc import Sequence

import torch

from rlhf_lightning.evaluation.summary import Comparison
from rlhf_lightning.rollout.sampler import SamplingConfig
from rlhf_lightning.seeding import derived_generator

SHOWN_SAMPLES = 12
#: Others than the base that the title names; more are counted.
NAMED_MODELS = 4
MEASURED_NOTE = "Means over the prompts, each with its 95 % interval."
QUESTIONS_NOTE = "Asked of every model as they stand here: once greedily, once sampled with the same random numbers."


def title(comparison: Comparison) -> str:
    """Return which models are compared with which."""
    others = [name for name in comparison.names if name != comparison.base]
    if len(others) > NAMED_MODELS:
        return f"{len(others)} models against {comparison.base}"
    return f"{_listed(others)} against {comparison.base}" if others else f"{comparison.base} alone"


def lede(comparison: Comparison) -> str:
    """Return what was asked, how was answered and what the scores are."""
    prompts, sampling = comparison.prompts, comparison.sampling
    count = len(prompts.prompts)
    which = f"{count:,} prompts" if count == prompts.available else f"{count:,} of {prompts.available:,} prompts"
    score = f" Scores are from {comparison.reward}." if comparison.reward else ""
    return (
        f"{which} from {prompts.source}, answered once by each model with the same random numbers; "
        f"{_sampling(sampling)}.{score} Ranges are 95 % intervals."
    )


def samples_note(count: int) -> str:
    """Return how the samples that are shown were chosen."""
    return f"{count} prompts, drawn by the seed and not chosen. All answers are in samples.jsonl."


def method(comparison: Comparison) -> dict[str, str]:
    """Return how each measure was taken, by its name."""
    return {
        "Interval": "Of 95 %. A bootstrap over prompts (2,000 resamples, percentiles); for shares, and the win rate, "
        "Wilson's interval. It covers the draw of prompts and answers, not that of training runs.",
        "Difference, win rate": "Both compare the answers of two models to the same prompt.",
        "KL divergence": "Mean over answers of the log-probability by the model minus that by "
        f"{comparison.base}, summed over the tokens, at the temperature of sampling (at 1 for greedy answers). Top-k "
        "and top-p are not counted in, so with them it is no longer a divergence.",
        "Distinct-2": "Different pairs of neighbouring words over all of them, in all answers of a model. More text "
        "lowers it.",
        "Finished": "The answer ended with a stop token before the limit of tokens.",
        "Seed": str(comparison.seed),
    }


def draw_samples(count: int, shown: int, seed: int) -> list[int]:
    """Return which prompts are shown: drawn without looking at them, in their order.

    Example:
        >>> draw_samples(3, 12, seed=0)
        [0, 1, 2]
    """
    return sorted(torch.randperm(count, generator=derived_generator(seed, "shown"))[:shown].tolist())


def real_minus(text: str) -> str:
    """Write a number's sign as the minus that is as wide as the plus."""
    return text.replace("-", "−")


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _sampling(sampling: SamplingConfig) -> str:
    parts = ["greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"]
    if sampling.top_k:
        parts.append(f"top-k {sampling.top_k}")
    if sampling.top_p < 1:
        parts.append(f"top-p {sampling.top_p:g}")
    return ", ".join([*parts, f"at most {sampling.max_new_tokens} tokens"])

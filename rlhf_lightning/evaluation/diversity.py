"""How long answers are, how varied, and how far from the base: what a policy that games its reward gives up first."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from rlhf_lightning.evaluation.formatting import Kind, TableRow
from rlhf_lightning.evaluation.generations import Generations
from rlhf_lightning.evaluation.sections import Section
from rlhf_lightning.evaluation.statistics import bootstrap_mean, bootstrap_ratio, distinct_n, share_interval

_NOTE = (
    "Repetition is the share of an answer's runs of four tokens that stood in it before. Distinct-n and exact repeats "
    "are of all answers of a model together, so they have no interval over prompts."
)


def diversity_section(answers: Sequence[Generations], base: str, *, seed: int = 0) -> Section:
    """Return length, repetition, distinct-1, -2 and -3, KL per token, and the share of empty and of repeated answers.

    Args:
        answers: Of each model.
        base: Name of the base.
        seed: Fixes the resamples.
    """
    found = [_measured(answer, answer.name == base, seed) for answer in answers]
    layout: list[tuple[str, str, str, Kind]] = [
        ("length_tokens", "Length", "tokens a response", "number"),
        ("length_words", "Length", "words a response", "number"),
        ("repetition", "Repetition", "of four tokens, share within a response", "share"),
        ("distinct_1", "Distinct-1", "different words", "share"),
        ("distinct_2", "Distinct-2", "different word pairs", "share"),
        ("distinct_3", "Distinct-3", "different runs of three words", "share"),
        ("empty", "Empty", "share of responses without a word", "share"),
        ("repeated", "Exact repeats", "share equal to the answer to an earlier prompt", "share"),
        ("kl_per_token", "KL per token", f"to {base}, nats", "number"),
    ]
    rows = [TableRow(label, note, kind, [values[key] for values in found]) for key, label, note, kind in layout]
    rows = [row for row in rows if any(cell is not None for cell in row.cells)]
    names = [answer.name for answer in answers]
    data = dict(zip(names, found, strict=True))
    return Section("diversity", "Length, diversity and KL", _NOTE, names, rows, data=data)


def repeated_share(texts: Sequence[str]) -> float:
    """Return the share of texts that equal one before them, blanks around them apart.

    No interval goes with it: one text more or less changes what the others repeat.

    Example:
        >>> repeated_share(["Yes.", "No.", " Yes.", "Yes."])
        0.5
    """
    counts = Counter(text.strip() for text in texts)
    return 1 - len(counts) / len(texts)


def _measured(answer: Generations, is_base: bool, seed: int) -> dict[str, Any]:
    words = torch.tensor([len(text.split()) for text in answer.responses], dtype=torch.float64)
    lengths = answer.lengths.double()
    return {
        "length_tokens": bootstrap_mean(lengths, seed=seed),
        "length_words": bootstrap_mean(words, seed=seed),
        "repetition": bootstrap_mean(answer.repetition, seed=seed),
        **{f"distinct_{n}": distinct_n(answer.responses, n) for n in (1, 2, 3)},
        "empty": share_interval((words == 0).double()),
        "repeated": repeated_share(answer.responses),
        "kl_per_token": None if is_base else bootstrap_ratio(answer.kl, lengths, seed=seed),
    }

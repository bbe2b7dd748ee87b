"""Best-of-n sampling: the yardstick of what a reward is worth for a known KL, without any training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.formatting import TableRow
from rlhf_lightning.evaluation.generations import Bench, Generations
from rlhf_lightning.evaluation.sections import Section
from rlhf_lightning.evaluation.statistics import Interval, bootstrap_mean, win_points
from rlhf_lightning.rollout.collect import decode_responses
from rlhf_lightning.seeding import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class BestOfN:
    """What the best of ``n`` answers of the base is worth.

    Attributes:
        n: Answers of which the best is taken.
        kl: Nats that this moves away from the base, at most.
        score: Mean score of the best.
        difference: The same less the mean score of all the base's answers to that prompt.
        win_rate: Against the base's one answer, ties half.
        others: Mean score of the best by the reward, by each further judge.
    """

    n: int
    kl: float
    score: Interval
    difference: Interval
    win_rate: Interval
    others: dict[str, Interval]


def best_of_n_weights(scores: Tensor, n: int) -> Tensor:
    """Return how likely each response is to be the best of ``n`` drawn from its prompt's without replacement.

    The i-th smallest of m is the largest of n in C(i - 1, n - 1) of C(m, n) subsets.

    Args:
        scores: Shape (prompts, m).
        n: At most m.

    Returns:
        Shape (prompts, m), float64; each row sums to 1.

    Raises:
        UserError: If n is more than m.

    Example:
        >>> best_of_n_weights(torch.tensor([[3.0, 1.0, 2.0]]), 2)
        tensor([[0.6667, 0.0000, 0.3333]], dtype=torch.float64)
    """
    m = scores.shape[1]
    if n > m:
        raise UserError(f"best-of-{n} needs at least {n} responses to each prompt, but there are {m}.")
    by_rank = torch.tensor([math.comb(rank, n - 1) / math.comb(m, n) for rank in range(m)], dtype=torch.float64)
    return by_rank[scores.argsort(dim=1, stable=True).argsort(dim=1, stable=True)]


def best_of_groups(scores: Tensor, n: int, *, most: int) -> list[int]:
    """Return the row numbers of the best of each ``n`` responses to a prompt; of ``most`` groups, or none if too few.

    Example:
        >>> best_of_groups(torch.tensor([[3.0, 1.0, 0.0, 2.0], [0.0, 1.0, 3.0, 2.0]]), 2, most=2)
        [0, 3, 5, 6]
    """
    prompts, m = scores.shape
    if m // n < most:
        return []  # fewer texts have more different word pairs: not to be compared
    best = scores[:, : most * n].reshape(prompts, most, n).argmax(dim=2)
    starts = torch.arange(prompts)[:, None] * m + torch.arange(most) * n
    return (starts + best).flatten().tolist()


def best_of_n_kl(n: int) -> float:
    """Return the nats that best-of-n moves away from the base, at most: log n - (n - 1) / n.

    Example:
        >>> round(best_of_n_kl(4), 3)
        0.636

    References:
        Stiennon et al. 2020, "Learning to summarize from human feedback", appendix G.3; Beirami et al. 2024,
        "Theoretical guarantees on the best-of-n alignment policy", that it is a bound and not the value.
    """
    return math.log(n) - (n - 1) / n


def check_best_of(best_of: Sequence[int], samples: int, *, has_reward: bool, temperature: float) -> None:
    """Refuse what cannot be measured.

    Args:
        best_of: Each n.
        samples: Answers of the base to each prompt.
        has_reward: Whether something gives a score.
        temperature: Of sampling.

    Raises:
        UserError: If there is no reward, answers do not differ, or an n is below 1, twice there or above ``samples``.
    """
    if samples < 1:
        raise UserError(f"best_of_samples is {samples}; it must be at least 1.")
    if not best_of:
        return
    if not has_reward:
        raise UserError(
            "best_of takes the answer of the highest score and so needs a reward; give one, or leave it out."
        )
    if temperature == 0:
        raise UserError(
            "best_of needs answers that differ, but sampling.temperature is 0; raise it, or leave best_of out."
        )
    for n in best_of:
        if n < 1 or list(best_of).count(n) > 1:
            raise UserError(f"best_of is {list(best_of)}; give different numbers of at least 1, such as [4, 16].")
        if n > samples:
            raise UserError(f"best_of has {n}, but best_of_samples is {samples}; it must be at least that many.")


def measure_best_of_n(
    bench: Bench, model: "PreTrainedModel", base: Generations, *, best_of: Sequence[int], samples: int
) -> list[BestOfN]:
    """Let the base answer each prompt many times, and measure the best of n over all subsets of n of its answers.

    Args:
        bench: What is asked, and who scores.
        model: The base.
        base: Its answers in the comparison, which the best ones are to beat.
        best_of: Each n, at most ``samples``.
        samples: Answers to each prompt.

    Returns:
        One for each n, ascending; means over prompts with bootstrap intervals. Of equal scores the later answer counts
        as the higher one, which moves the judges' means only.
    """
    if not best_of:
        return []
    ids = [ids for ids in bench.prompt_ids for _ in range(samples)]
    sequences, finished = bench.sample(model, ids, bench.sampling, derive_seed(bench.seed, "best_of"))
    judgement = bench.judge(sequences, finished, decode_responses(bench.tokenizer, sequences), each=samples)
    assert judgement.scores is not None
    assert base.scores is not None
    shape = (len(bench.prompt_ids), samples)
    scores = judgement.scores.double().view(shape)
    points = win_points(judgement.scores, base.scores.repeat_interleave(samples)).view(shape)
    others = {name: values.double().view(shape) for name, values in judgement.others.items()}

    def of(n: int) -> BestOfN:
        weights = best_of_n_weights(scores, n)

        def mean(values: Tensor) -> Interval:
            return bootstrap_mean((weights * values).sum(dim=1), seed=bench.seed)

        difference = mean(scores - scores.mean(dim=1, keepdim=True))
        by_others = {name: mean(values) for name, values in others.items()}
        return BestOfN(n, best_of_n_kl(n), mean(scores), difference, mean(points), by_others)

    return [of(n) for n in sorted(best_of)]


def best_of_n_section(found: Sequence[BestOfN], base: str, *, samples: int) -> Section | None:
    """Return the table of best-of-n; ``None`` where none was measured.

    Args:
        found: What :func:`measure_best_of_n` returned.
        base: Name of the base.
        samples: Answers to each prompt, for the note.
    """
    if not found:
        return None
    note = (
        f"What {base} reaches without training, by taking the best-scored of n answers: the mean over all subsets of n "
        f"of {samples} answers to each prompt. Its KL divergence is at most log n - (n - 1) / n."
    )
    rows = [
        TableRow("Score", "mean", "number", [best.score for best in found]),
        TableRow("Difference in score", f"to one answer of {base}", "difference", [best.difference for best in found]),
        TableRow("Win rate", f"against {base}, ties half", "share", [best.win_rate for best in found]),
        TableRow("KL divergence", f"to {base}, nats a response, at most", "number", [best.kl for best in found]),
    ]
    rows += [TableRow(name, "mean score", "number", [b.others[name] for b in found]) for name in found[0].others]
    data: dict[str, Any] = {"samples": samples, "points": [vars(best) for best in found]}
    columns = [f"best of {best.n}" for best in found]
    return Section("best_of", "Best-of-n as a yardstick", note, columns, rows, data=data)

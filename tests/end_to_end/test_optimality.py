"""Learning against a known optimum: the faster form of ``tools/optimality.py``, and the fixed points that differ."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.algorithm.advantages import GAE, GroupRelative, LeaveOneOut
from rlhf_lightning.algorithm.critics import SeparateCritic
from rlhf_lightning.algorithm.kl import FixedKL
from rlhf_lightning.evaluation.enumeration import enumerated_logprobs, regularised_optimum
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.rollout.reward_sources import FunctionReward

torch.set_num_threads(1)
MakeProblem = Callable[..., Any]


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return load_tool("optimality")


@pytest.fixture
def problem(tool: ModuleType, tmp_path: Path) -> MakeProblem:
    """``problem(variant="stop", seed=0, max_tokens=3)`` builds one."""
    return lambda variant="stop", seed=0, **arguments: tool.build_problem(
        tmp_path, variant=variant, seed=seed, **arguments
    )


# --- the problems -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "count"), [("stop", 1 + 3 + 9 * 4), ("fixed", 4**3)])
def test_every_response_is_listed_and_scored_by_the_table(problem: MakeProblem, variant: str, count: int) -> None:
    built = problem(variant)
    assert len(built.responses) == count
    torch.testing.assert_close(built.ref_logprobs.exp().sum(dim=1), torch.ones(3).double(), atol=1e-5, rtol=0)
    assert len({len(prompt) for prompt in built.prompts}) == 3
    # What PPO is given, through text and file, is the table: the empty response too.
    tokenizer = load_tokenizer(str(built.folder))
    texts = tokenizer.batch_decode(built.responses, skip_special_tokens=True)
    assert ("" in texts) == (variant == "stop")
    score = FunctionReward(f"{built.folder}/reward.py:score").function
    for prompt, row in zip(built.prompts, built.rewards.tolist(), strict=True):
        assert score([tokenizer.decode(prompt)] * count, texts) == pytest.approx(row)


def test_the_start_has_share_zero_and_seeds_change_the_problem(problem: MakeProblem) -> None:
    first = problem(seed=0)
    assert first.share(load_causal_lm(str(first.folder)), 0.1) == pytest.approx(0, abs=1e-6)
    second = problem(seed=1)
    assert not torch.allclose(first.rewards, second.rewards)
    assert not torch.allclose(first.ref_logprobs, second.ref_logprobs)


def test_pairs_are_labelled_by_bradley_terry(problem: MakeProblem) -> None:
    """Of 20,000 pairs the better response should win the mean of σ(|r₁ - r₂|), within 4 standard errors (0.0035)."""
    built = problem()
    places = {tuple(response): place for place, response in enumerate(built.responses)}
    prompts = {tuple(prompt): place for place, prompt in enumerate(built.prompts)}
    pairs = built.pairs(20_000, seed=0)
    gaps = torch.stack(
        [
            built.rewards[prompts[tuple(x)], places[tuple(y)]] - built.rewards[prompts[tuple(x)], places[tuple(z)]]
            for x, y, z in pairs
        ]
    )
    differing = gaps[gaps != 0]
    assert abs((differing > 0).double().mean() - differing.abs().sigmoid().mean()) < 0.014
    starts = torch.tensor([places[tuple(y)] for _, y, _ in built.pairs(20_000, seed=0, uniform=True)])
    assert starts.bincount(minlength=len(places)).min() > 200  # 500 expected of each, were none better


def test_rank_correlation_by_hand(tool: ModuleType) -> None:
    """1 - 6 Σ d² / (n (n² - 1)) with d = (0, 1, -1): 1 - 12 / 24."""
    x, y = torch.tensor([1.0, 5.0, 9.0]), torch.tensor([0.1, 0.3, 0.2])
    assert tool.rank_correlation(x, y) == pytest.approx(0.5)
    assert tool.rank_correlation(x, -x) == pytest.approx(-1)


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_exact_ascent_reaches_the_optimum(tool: ModuleType, problem: MakeProblem) -> None:
    assert tool.ascend_exactly(problem(), 0.5, 0) > 0.99


@pytest.mark.slow
def test_rloo_comes_near_the_optimum(tool: ModuleType, problem: MakeProblem) -> None:
    built = problem()
    module = tool.train_on_rollouts(built, 0.1, 0, advantages=LeaveOneOut(), iterations=80)
    assert built.share(module.policy, 0.1) > 0.9


@pytest.mark.slow
def test_ppo_comes_near_the_optimum(tool: ModuleType, problem: MakeProblem) -> None:
    built = problem()
    module = tool.train_on_rollouts(built, 0.1, 0, advantages=GAE(), critic=SeparateCritic(), iterations=80)
    assert built.share(module.policy, 0.1) > 0.9


@pytest.mark.slow
def test_dpo_comes_near_the_optimum(tool: ModuleType, problem: MakeProblem) -> None:
    """Responses of one token: 12 log-ratios to learn instead of 120, so that few pairs do."""
    built = problem(max_tokens=1)
    assert tool.train_dpo(built, 0.1, 0, pairs=20_000, batch=100) > 0.9


# --- other fixed points; the derivations are in test_fixed_points.py --------------------------------------------------


def scaled_fixed_point(built: Any, beta: float) -> Tensor:
    """Return π ∝ ref exp(r / (β σ(π))) of each prompt."""
    policy = built.ref_logprobs.exp()
    for _ in range(500):
        variance = (policy * built.rewards.square()).sum(dim=1) - (policy * built.rewards).sum(dim=1).square()
        policy = (built.ref_logprobs + built.rewards / (beta * variance.sqrt()[:, None])).softmax(dim=1)
    return policy


def reverse_kl_optimum(built: Any, beta: float) -> Tensor:
    """Return π = β ref / (λ - r) of each prompt, λ by bisection."""
    low = built.rewards.max(dim=1, keepdim=True).values
    high, ref = low + beta, built.ref_logprobs.exp()
    for _ in range(200):
        middle = (low + high) / 2
        above = (beta * ref / (middle - built.rewards)).sum(dim=1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return beta * ref / (high - built.rewards)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scale", "kl", "expected"),
    [
        (True, FixedKL(3.0, "k2", "loss"), scaled_fixed_point),
        (False, FixedKL(0.1, "k3", "loss"), reverse_kl_optimum),
    ],
)
def test_training_ends_at_the_fixed_point_that_was_derived(
    tool: ModuleType, problem: MakeProblem, scale: bool, kl: FixedKL, expected: Callable[[Any, float], Tensor]
) -> None:
    """Half the L1 distance to the derived point is small, and to the optimum of score - β KL large.

    With the scale, a nat costs 3 σ; below a coefficient of about 2 the first prompt, whose scores differ least, has no
    fixed point but the collapse.
    """
    built = problem("fixed", max_tokens=1)
    module = tool.train_on_rollouts(built, kl.coef, 0, advantages=GroupRelative(scale=scale), kl=kl, iterations=120)
    with torch.no_grad():
        reached = enumerated_logprobs(module.policy, built.prompts, built.responses).exp()
    derived = expected(built, kl.coef)
    best = regularised_optimum(ref_logprobs=built.ref_logprobs, rewards=built.rewards, beta=kl.coef).logprobs.exp()
    distance, other = ((reached - point).abs().sum(dim=1).max() / 2 for point in (derived, best))
    assert distance < 0.04
    assert other > 2 * distance

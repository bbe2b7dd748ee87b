"""Exact values by enumeration: against sampling, against the definition, and at the limits."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_lightning.evaluation.enumeration import (
    all_responses,
    enumerated_logprobs,
    regularised_optimum,
    regularised_value,
    share_reached,
)
from rlhf_lightning.functional.sequences import pad_sequences
from rlhf_lightning.rollout.decoding import CachedSampler
from rlhf_lightning.rollout.sampler import SamplingConfig

PROMPTS = [[1, 0], [0, 2, 1, 0]]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=4,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16,
            initializer_range=0.4,
        )
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def test_responses_by_hand() -> None:
    """Of a stop token 2 and letters 0 and 1: "2"; "0 2", "1 2"; and two tokens without a stop."""
    both = all_responses([0, 1, 2], max_new_tokens=2, stop_ids=[2])
    assert both == [[2], [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    # 1 + 3 + 9 that stop, and 27 that are full without.
    assert len(all_responses(range(4), max_new_tokens=3, stop_ids=[3])) == 1 + 3 + 9 * 4
    # A stop token that the model does not have ends nothing.
    assert all_responses(range(2), max_new_tokens=3, stop_ids=[7]) == [list(y) for y in product(range(2), repeat=3)]


@pytest.mark.parametrize("stop_ids", [[], [3], [1, 3]])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_probabilities_sum_to_one(model: LlamaForCausalLM, stop_ids: list[int], temperature: float) -> None:
    responses = all_responses(range(4), max_new_tokens=3, stop_ids=stop_ids)
    logprobs = enumerated_logprobs(model, PROMPTS, responses, temperature=temperature)
    assert logprobs.shape == (2, len(responses))
    torch.testing.assert_close(logprobs.exp().sum(dim=1), torch.ones(2, dtype=torch.float64), atol=1e-5, rtol=0)


def test_a_response_is_the_product_of_its_tokens(model: LlamaForCausalLM) -> None:
    """One at a time, without batch or padding: the definition."""
    response, total = [2, 0, 3], 0.0
    for place, token in enumerate(response):
        logits = model(torch.tensor([[*PROMPTS[1], *response[:place]]])).logits[0, -1]
        total += float(logits.log_softmax(dim=0)[token])
    logprobs = enumerated_logprobs(model, PROMPTS, [[3], response])
    assert float(logprobs[1, 1]) == pytest.approx(total, abs=1e-5)


def test_the_sampler_draws_as_the_enumeration_says(model: LlamaForCausalLM) -> None:
    """4,000 responses; each frequency within 5 standard errors, and so the mean of a random reward."""
    count = 4000
    responses = all_responses(range(4), max_new_tokens=3, stop_ids=[3])
    probabilities = enumerated_logprobs(model, PROMPTS[1:], responses)[0].exp()
    ids, _ = pad_sequences(PROMPTS[1:] * count, pad_id=0, left=True)
    sampler = CachedSampler()
    sampler.setup(model)
    config = SamplingConfig(max_new_tokens=3)
    drawn = sampler.sample(ids, torch.ones_like(ids, dtype=torch.bool), config=config, stop_ids=[3], seed=0)
    places = {tuple(response): place for place, response in enumerate(responses)}
    rows = zip(drawn.tokens.tolist(), drawn.lengths.tolist(), strict=True)
    found = torch.tensor([places[tuple(tokens[:length])] for tokens, length in rows])
    frequencies = found.bincount(minlength=len(responses)) / count
    errors = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((frequencies - probabilities).abs() < 5 * errors + 1e-3).all()
    rewards = torch.randn(len(responses), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean, std = (probabilities * rewards).sum(), rewards[found].std()
    assert abs(rewards[found].mean() - mean) < 5 * std / math.sqrt(count)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), beta=st.sampled_from([0.05, 0.3, 2.0]))
def test_the_optimum_is_reached_by_its_policy_and_by_no_other(seed: int, beta: float) -> None:
    """J(π*) = β log Z, J(ref) = E[r], and J(π) = J* - β KL(π || π*), which no policy makes larger."""
    generator = torch.Generator().manual_seed(seed)
    ref, other = (torch.randn(3, 7, generator=generator, dtype=torch.float64).log_softmax(dim=1) for _ in range(2))
    rewards = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    best = regularised_optimum(ref_logprobs=ref, rewards=rewards, beta=beta)

    def value(logprobs: torch.Tensor) -> torch.Tensor:
        return regularised_value(logprobs=logprobs, ref_logprobs=ref, rewards=rewards, beta=beta)

    torch.testing.assert_close(best.logprobs.exp().sum(dim=1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(value(best.logprobs), best.value)
    torch.testing.assert_close(value(ref), (ref.exp() * rewards).sum(dim=1))
    divergence = (other.exp() * (other - best.logprobs)).sum(dim=1)
    assert (divergence >= 0).all()
    torch.testing.assert_close(value(other), best.value - beta * divergence)


def test_beta_changes_the_optimum_from_the_best_response_to_the_reference() -> None:
    ref = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()
    rewards = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    greedy = regularised_optimum(ref_logprobs=ref, rewards=rewards, beta=1e-3)
    held = regularised_optimum(ref_logprobs=ref, rewards=rewards, beta=1e3)
    torch.testing.assert_close(greedy.logprobs.exp(), torch.tensor([0, 0, 1.0], dtype=torch.float64))
    assert float(greedy.value) == pytest.approx(1.0, abs=5e-3)
    torch.testing.assert_close(held.logprobs, ref, atol=1e-3, rtol=0)
    assert float(held.value) == pytest.approx(0.2, abs=1e-3)  # 0.2 · 0.5 + 0.1 · 1


def test_shares() -> None:
    ref = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64).log()
    rewards = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    best = regularised_optimum(ref_logprobs=ref, rewards=rewards, beta=0.5).logprobs
    worst = regularised_optimum(ref_logprobs=ref, rewards=-rewards, beta=0.5).logprobs

    def share(logprobs: torch.Tensor) -> float:
        return share_reached(logprobs=logprobs, ref_logprobs=ref, rewards=rewards, beta=0.5)

    assert share(ref) == pytest.approx(0, abs=1e-12)
    assert share(best) == pytest.approx(1)
    assert share(worst) < 0 < share(torch.stack([best[0], ref[1]])) < 1

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rlhf_lightning.errors import UserError
from rlhf_lightning.rollout.sampler import (
    SamplingConfig,
    draw_tokens,
    invert_cumulative,
    refuse_nan,
    resolve_stop_ids,
    row_uniforms,
)

NO_STOPS = torch.tensor([], dtype=torch.int64)
LARGEST = math.nextafter(1.0, 0.0)


def draw(probabilities: list[float], uniforms: list[float], *, stops: Tensor = NO_STOPS, **settings: Any) -> Tensor:
    """Draw a token for each uniform number from one distribution."""
    logits = torch.tensor(probabilities).log().expand(len(uniforms), -1)
    config = SamplingConfig(**settings)
    return draw_tokens(logits, torch.tensor(uniforms), config, step=0, stop_ids=stops)[0]


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """Return Pearson's statistic of counts against probabilities."""
    expected = probabilities.double() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


class TestDrawing:
    def test_by_hand(self) -> None:
        # Cumulative: 0.125, 0.375, 1.
        uniforms = [0.0, 0.12, 0.13, 0.37, 0.38, 0.9999]
        assert draw([0.125, 0.25, 0.625], uniforms).tolist() == [0, 0, 1, 1, 2, 2]

    def test_what_has_no_probability_never_comes(self) -> None:
        uniforms = [0.0, 0.4, 0.49, 0.51, 0.999999, LARGEST, 1.0]
        assert draw([0.0, 0.5, 0.0, 0.5, 0.0], uniforms).tolist() == [1, 1, 1, 3, 3, 3, 3]

    def test_logprobs_are_of_the_distribution_drawn_from(self) -> None:
        logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(3, -1)
        uniforms = torch.tensor([0.0, 0.6, 0.9])
        cases: list[tuple[dict[str, Any], list[float]]] = [
            ({}, [0.5, 0.3, 0.2]),
            ({"top_k": 2}, [0.625, 0.375, 0.0]),
            ({"top_p": 0.7}, [0.625, 0.375, 0.0]),
            ({"top_k": 1}, [1.0, 0.0, 0.0]),
            # squared and normalised: 0.25, 0.09, 0.04 over 0.38
            ({"temperature": 0.5}, [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38]),
        ]
        for settings, kept in cases:
            tokens, logprobs = draw_tokens(logits, uniforms, SamplingConfig(**settings), step=0, stop_ids=NO_STOPS)
            expected = torch.tensor(kept)[tokens]
            assert (expected > 0).all()
            torch.testing.assert_close(logprobs.exp(), expected)

    @pytest.mark.parametrize(
        ("settings", "threshold"),
        [({}, 29.6), ({"temperature": 0.6}, 29.6), ({"temperature": 1.7}, 29.6)],
    )
    def test_draws_have_the_exact_distribution(self, settings: dict[str, Any], threshold: float) -> None:
        # 29.6 is the 99.9 % point of chi-square with 10 degrees of freedom; the seed is fixed.
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(11, generator=generator)
        uniforms = torch.rand(20_000, generator=generator)
        tokens, _ = draw_tokens(
            logits.expand(len(uniforms), -1), uniforms, SamplingConfig(**settings), step=0, stop_ids=NO_STOPS
        )
        probabilities = (logits.double() / settings.get("temperature", 1.0)).softmax(-1)
        assert chi_square(tokens.bincount(minlength=11), probabilities) < threshold

    def test_the_statistic_would_notice(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(11, generator=generator)
        tokens, _ = draw_tokens(
            logits.expand(20_000, -1),
            torch.rand(20_000, generator=generator),
            SamplingConfig(temperature=0.9),
            step=0,
            stop_ids=NO_STOPS,
        )
        assert chi_square(tokens.bincount(minlength=11), logits.double().softmax(-1)) > 29.6

    @pytest.mark.parametrize("top_k", [0, 1, 3, 50, 1000])
    @pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 1.0])
    def test_filters_keep_what_those_of_transformers_keep(self, top_k: int, top_p: float) -> None:
        logits = 3 * torch.randn(6, 60, generator=torch.Generator().manual_seed(0))
        reference = TemperatureLogitsWarper(0.8)(NO_STOPS, logits)
        if top_k:
            reference = TopKLogitsWarper(top_k)(NO_STOPS, reference)
        if top_p < 1:
            reference = TopPLogitsWarper(top_p)(NO_STOPS, reference)
        expected = reference.log_softmax(-1)
        config = SamplingConfig(temperature=0.8, top_k=top_k, top_p=top_p)
        for uniform in (0.0, 0.2, 0.5, 0.8, LARGEST):
            tokens, logprobs = draw_tokens(logits, torch.full((6,), uniform), config, step=0, stop_ids=NO_STOPS)
            torch.testing.assert_close(logprobs, expected.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=1e-5)
            below = (expected.double().exp().cumsum(-1) - expected.double().exp()).gather(1, tokens[:, None])[:, 0]
            assert (below <= uniform + 1e-5).all()  # the uniform number lies in the token's own stretch
            assert (below + logprobs.double().exp() >= uniform - 1e-5).all()

    def test_top_p_is_the_smallest_set_that_reaches_the_share(self) -> None:
        uniforms = [0.0, 0.3, 0.6, LARGEST]
        assert set(draw([0.2, 0.5, 0.3], uniforms, top_p=0.45).tolist()) == {1}
        assert set(draw([0.2, 0.5, 0.3], uniforms, top_p=0.55).tolist()) == {1, 2}
        assert set(draw([0.2, 0.5, 0.3], uniforms, top_p=0.85).tolist()) == {0, 1, 2}
        assert len(set(draw([1.0, 1.0], uniforms, top_p=0.5).tolist())) == 1  # one of two halves reaches a half

    def test_no_stop_token_before_min_new_tokens(self) -> None:
        logits, stops = torch.tensor([[0.0, 9.0, 1.0, 8.0]]), torch.tensor([1, 3])
        for temperature in (0.0, 1e-3):
            config = SamplingConfig(min_new_tokens=2, temperature=temperature)
            tokens = [
                draw_tokens(logits, torch.tensor([0.5]), config, step=step, stop_ids=stops)[0].item()
                for step in range(4)
            ]
            assert tokens == [2, 2, 1, 1]

    def test_each_row_counts_its_own_tokens(self) -> None:
        logits, stops = torch.tensor([[0.0, 9.0, 1.0, 8.0]]).expand(4, -1), torch.tensor([1, 3])
        config = SamplingConfig(min_new_tokens=2, temperature=0.0)
        steps = torch.tensor([3, 0, 2, 1])
        tokens, _ = draw_tokens(logits, torch.full((4,), 0.5), config, step=steps, stop_ids=stops)
        assert tokens.tolist() == [1, 2, 1, 2]

    @pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 300, 1000])  # blocks have 128 places
    def test_sums_by_blocks_find_what_a_plain_search_finds(self, size: int) -> None:
        generator = torch.Generator().manual_seed(size)
        probabilities = (4 * torch.randn(200, size, generator=generator)).softmax(-1)
        probabilities[:, : size // 3] = 0
        uniforms = torch.rand(200, generator=generator)
        cumulative = probabilities.double().cumsum(-1)
        target = uniforms.double()[:, None] * cumulative[:, -1:]
        tokens = invert_cumulative(probabilities, uniforms)
        assert torch.equal(tokens, torch.searchsorted(cumulative, target, right=True).squeeze(1))
        assert (invert_cumulative(probabilities, torch.ones(200)) < size).all()
        assert (probabilities.gather(1, invert_cumulative(probabilities, torch.ones(200))[:, None]) > 0).all()
        assert (probabilities.gather(1, invert_cumulative(probabilities, torch.zeros(200))[:, None]) > 0).all()

    def test_temperature_0_takes_the_likeliest(self) -> None:
        logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 2.9]])
        config = SamplingConfig(temperature=0.0)
        tokens, logprobs = draw_tokens(logits, torch.tensor([0.99, 0.99]), config, step=0, stop_ids=NO_STOPS)
        assert (tokens.tolist(), logprobs.tolist()) == ([1, 0], [0, 0])

    def test_half_precision_logits_are_summed_in_float32(self) -> None:
        # In bfloat16 a running sum of 4,096 equal shares would stop growing at a fraction of the whole.
        tokens, logprobs = draw_tokens(
            torch.zeros(1, 4096).bfloat16(), torch.tensor([0.9]), SamplingConfig(), step=0, stop_ids=NO_STOPS
        )
        assert tokens.item() == pytest.approx(0.9 * 4096, abs=2)
        assert logprobs.item() == pytest.approx(-math.log(4096), rel=1e-6)

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("damage", [math.nan, math.inf])
    def test_logits_that_are_not_finite_are_named(self, temperature: float, damage: float) -> None:
        logits, config = torch.tensor([[0.0, 1.0], [damage, 0.0]]), SamplingConfig(temperature=temperature)
        tokens, logprobs = draw_tokens(logits, torch.tensor([0.9, 0.9]), config, step=0, stop_ids=NO_STOPS)
        assert int(tokens.max()) < 2
        refuse_nan(logprobs[:1])
        with pytest.raises(UserError, match="logits are not finite"):
            refuse_nan(logprobs)


class TestUniforms:
    def test_a_row_draws_the_same_whatever_stands_beside_it(self) -> None:
        together = row_uniforms(5, [0, 1, 2, 3], 8)
        assert torch.equal(row_uniforms(5, [3, 1], 8), together[[3, 1]])
        assert together.unique().numel() == together.numel()

    def test_seeds_and_rows_differ(self) -> None:
        assert not torch.equal(row_uniforms(5, [0], 8), row_uniforms(6, [0], 8))
        assert not torch.equal(row_uniforms(5, [0], 8), row_uniforms(5, [1], 8))

    def test_they_are_uniform(self) -> None:
        uniforms = row_uniforms(0, range(500), 20)
        assert uniforms.dtype == torch.float32
        assert ((uniforms >= 0) & (uniforms < 1)).all()
        # 27.9 is the 99.9 % point with 9 degrees of freedom.
        counts = (uniforms.flatten() * 10).long().bincount(minlength=10)
        assert chi_square(counts, torch.full((10,), 0.1)) < 27.9


class TestStopTokens:
    def test_by_name_or_the_end_of_text(self, word_tokenizer: PreTrainedTokenizerFast) -> None:
        assert resolve_stop_ids(word_tokenizer, None) == [2]
        assert resolve_stop_ids(word_tokenizer, ["<|user|>", "w9"]) == [1, 9]

    def test_unknown_ones_are_named(self, word_tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(UserError, match=r"stop token '<\|endd\|>' is not.*Did you mean '<\|end\|>'\?"):
            resolve_stop_ids(word_tokenizer, ["w5", "<|endd|>"])

    def test_a_tokenizer_without_end_of_text(self, word_tokenizer: PreTrainedTokenizerFast) -> None:
        word_tokenizer.eos_token = None
        with pytest.raises(UserError, match=r"no end-of-text token; name .* sampling\.stop_tokens"):
            resolve_stop_ids(word_tokenizer, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, r"min_new_tokens is 9; it must lie in 0\.\.max_new_tokens \(8\)"),
        ({"temperature": float("nan")}, "temperature is nan; it must be at least 0"),
        ({"temperature": -0.5}, r"temperature is -0\.5; it must be at least 0"),
        ({"top_k": -1}, "top_k is -1; it must be at least 0"),
        ({"top_p": 0.0}, r"top_p is 0\.0; it must lie in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"stop_tokens": []}, "stop_tokens is empty"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingConfig(**settings)


def test_the_default_samples_what_training_assumes() -> None:
    config = SamplingConfig()
    assert (config.temperature, config.top_k, config.top_p, config.min_new_tokens) == (1.0, 0, 1.0, 0)

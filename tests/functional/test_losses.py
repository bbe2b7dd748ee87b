import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_lightning.functional.losses import ppo_policy_loss, ppo_value_loss, preference_loss, token_mean_weights
from rlhf_lightning.functional.sequences import length_mask

NAN = torch.nan
seeds = st.integers(0, 10**6)


def policy_numbers(seed: int, lengths: tuple[int, ...] = (3, 1, 4)) -> dict[str, Any]:
    """Return arguments of the policy loss whose ratios lie on both sides of the clip range; NaN under the mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = length_mask(torch.tensor(lengths))
    old, moved, advantages = torch.randn(3, *mask.shape, generator=generator)
    tensors = {"logprobs": old + 0.4 * moved, "old_logprobs": old, "advantages": advantages}
    return {name: torch.where(mask, tensor, NAN) for name, tensor in tensors.items()} | {"response_mask": mask}


def value_numbers(seed: int, lengths: tuple[int, ...] = (3, 1, 4)) -> dict[str, Any]:
    """Return arguments of the value loss whose values have moved to both sides of the clip range."""
    generator = torch.Generator().manual_seed(seed)
    mask = length_mask(torch.tensor(lengths))
    old, moved, returns = torch.randn(3, *mask.shape, generator=generator)
    tensors = {"values": old + 0.4 * moved, "old_values": old, "returns": returns}
    return {name: torch.where(mask, tensor, NAN) for name, tensor in tensors.items()} | {"response_mask": mask}


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(loss, of)
    return result


class TestPolicyLoss:
    def test_four_tokens_by_hand(self) -> None:
        # ratio, advantage -> max(-A·ρ, -A·clip(ρ, 0.8, 1.2)):
        #   1.5,  1 -> max(-1.5, -1.2) = -1.2 clipped       0.5,  1 -> max(-0.5, -0.8) = -0.5
        #   1.5, -1 -> max( 1.5,  1.2) =  1.5               0.5, -1 -> max( 0.5,  0.8) =  0.8 clipped
        ratio = torch.tensor([[1.5, 0.5], [1.5, 0.5]])
        logprobs = (ratio.log() - 2).requires_grad_()
        result = ppo_policy_loss(
            logprobs=logprobs,
            old_logprobs=torch.full((2, 2), -2.0),
            advantages=torch.tensor([[1.0, 1.0], [-1.0, -1.0]]),
            response_mask=torch.ones(2, 2).bool(),
            clip_range=0.2,
        )
        assert result.loss.item() == pytest.approx(0.6 / 4)
        assert result.clipped_sum.item() == 2
        assert result.ratio_sum.item() == pytest.approx(4.0)
        # (ρ - 1) - log ρ summed: 0 - log(1.5 · 0.5 · 1.5 · 0.5)
        assert result.approx_kl_sum.item() == pytest.approx(-math.log(0.5625), rel=1e-5)
        # d/dlogp of -A·ρ is -A·ρ; where clipped it is exactly 0.
        expected = torch.tensor([[0.0, -0.5], [1.5, 0.0]]) / 4
        torch.testing.assert_close(gradient(result.loss, logprobs), expected)

    def test_another_range_moves_the_edges(self) -> None:
        ratio = torch.tensor([[1.5, 0.5, 1.5, 0.5]])
        numbers: dict[str, Any] = {
            "logprobs": ratio.log(),
            "old_logprobs": torch.zeros(1, 4),
            "advantages": torch.tensor([[1.0, 1.0, -1.0, -1.0]]),
            "response_mask": torch.ones(1, 4).bool(),
        }
        # ε = 0.4: -1.4 - 0.5 + 1.5 + 0.6 = 0.2
        narrow = ppo_policy_loss(**numbers, clip_range=0.4)
        assert narrow.loss.item() == pytest.approx(0.2 / 4)
        wide = ppo_policy_loss(**numbers, clip_range=0.6)
        assert wide.clipped_sum.item() == 0

    def test_an_infinite_range_clips_nothing(self) -> None:
        numbers = policy_numbers(0)
        mask = numbers["response_mask"]
        result = ppo_policy_loss(**numbers, clip_range=math.inf)
        ratio = (numbers["logprobs"] - numbers["old_logprobs"])[mask].exp()
        torch.testing.assert_close(result.loss, -(numbers["advantages"][mask] * ratio).mean())
        assert result.clipped_sum.item() == 0

    def test_before_the_first_step_the_ratio_is_1_and_nothing_is_clipped(self) -> None:
        numbers = policy_numbers(1)
        numbers["logprobs"] = numbers["old_logprobs"].clone().requires_grad_()
        mask = numbers["response_mask"]
        result = ppo_policy_loss(**numbers)
        assert result.ratio_sum.item() == mask.sum().item()
        assert result.approx_kl_sum.item() == result.clipped_sum.item() == 0
        torch.testing.assert_close(result.loss, -numbers["advantages"][mask].mean())
        # The plain policy gradient: -A / tokens.
        expected = torch.where(mask, -numbers["advantages"] / mask.sum(), 0.0)
        torch.testing.assert_close(gradient(result.loss, numbers["logprobs"]), expected)

    @settings(deadline=None)
    @given(seed=seeds)
    def test_the_gradient_matches_finite_differences_and_is_zero_under_the_mask(self, seed: int) -> None:
        numbers = policy_numbers(seed)
        mask, old, advantages = (numbers[name] for name in ("response_mask", "old_logprobs", "advantages"))
        logprobs = numbers["logprobs"].clone().requires_grad_()
        result = ppo_policy_loss(**(numbers | {"logprobs": logprobs}), clip_range=0.2)
        slopes = gradient(result.loss, logprobs)
        count = int(mask.sum())

        def token_loss(logprob: float, row: int, column: int) -> float:
            ratio = math.exp(logprob - old[row, column].item())
            clipped = min(max(ratio, 0.8), 1.2)
            return max(-advantages[row, column].item() * ratio, -advantages[row, column].item() * clipped) / count

        step, total = 1e-6, 0.0
        for row, column in mask.nonzero().tolist():
            here = logprobs[row, column].item()
            total += token_loss(here, row, column)
            ratio = math.exp(here - old[row, column].item())
            if min(abs(ratio - 0.8), abs(ratio - 1.2)) < 1e-4:
                continue  # at the kink there is no slope to compare
            around = token_loss(here + step, row, column) - token_loss(here - step, row, column)
            assert slopes[row, column].item() == pytest.approx(around / (2 * step), abs=1e-4)
        assert result.loss.item() == pytest.approx(total, abs=1e-5)
        assert not slopes[~mask].any()

    @settings(deadline=None)
    @given(seed=seeds, cut=st.integers(1, 2))
    def test_micro_batches_add_up_to_the_minibatch(self, seed: int, cut: int) -> None:
        numbers = policy_numbers(seed)
        whole = ppo_policy_loss(**numbers)
        weights = token_mean_weights(numbers["response_mask"])
        parts = [
            ppo_policy_loss(**{name: x[rows] for name, x in numbers.items()}, token_weights=weights[rows])
            for rows in (slice(0, cut), slice(cut, None))
        ]
        for name in whole._fields:
            added = sum(getattr(part, name) for part in parts)
            torch.testing.assert_close(getattr(whole, name), added, atol=1e-5, rtol=1e-5)

    def test_statistics_carry_no_gradient(self) -> None:
        numbers = policy_numbers(2)
        numbers["logprobs"].requires_grad_()
        result = ppo_policy_loss(**numbers)
        assert result.loss.requires_grad
        assert not any(getattr(result, name).requires_grad for name in ("ratio_sum", "approx_kl_sum", "clipped_sum"))

    def test_ratios_are_taken_in_float32(self) -> None:
        # In bfloat16 the log-probabilities -8 and -8.0625 are exact, and their difference would give 0.9375 or 0.9414.
        logprobs, old = torch.tensor([[-8.0625]]).bfloat16(), torch.tensor([[-8.0]]).bfloat16()
        mask = torch.ones(1, 1).bool()
        result = ppo_policy_loss(
            logprobs=logprobs, old_logprobs=old, advantages=torch.ones(1, 1).bfloat16(), response_mask=mask
        )
        assert result.ratio_sum.item() == pytest.approx(math.exp(-0.0625), rel=1e-6)
        assert result.loss.dtype == torch.float32


class TestValueLoss:
    def test_four_tokens_by_hand(self) -> None:
        # V, V_old = 0, R, ε = 0.2 -> max((V - R)², (clip(V, ±0.2) - R)²):
        #    1.0,  2 -> max(1, 1.8²) = 3.24 clipped       1.0, 0 -> max(1, 0.04) = 1
        #   -1.0, -2 -> max(1, 1.8²) = 3.24 clipped       0.1, 1 -> 0.81 both ways
        values = torch.tensor([[1.0, 1.0], [-1.0, 0.1]], requires_grad=True)
        result = ppo_value_loss(
            values=values,
            old_values=torch.zeros(2, 2),
            returns=torch.tensor([[2.0, 0.0], [-2.0, 1.0]]),
            response_mask=torch.ones(2, 2).bool(),
            value_clip_range=0.2,
        )
        assert result.loss.item() == pytest.approx(0.5 * 8.29 / 4)
        assert result.clipped_sum.item() == 2
        # d/dV of ½(V - R)² is V - R; where clipped it is exactly 0.
        expected = torch.tensor([[0.0, 1.0], [0.0, -0.9]]) / 4
        torch.testing.assert_close(gradient(result.loss, values), expected)

    def test_the_range_is_around_the_old_value(self) -> None:
        # V = 5, V_old = 4, R = 6: clip(5, 3.8, 4.2) = 4.2, ½ · 1.8² = 1.62
        tensors = [torch.tensor([[number]]) for number in (5.0, 4.0, 6.0)]
        result = ppo_value_loss(
            values=tensors[0], old_values=tensors[1], returns=tensors[2], response_mask=torch.ones(1, 1).bool()
        )
        assert result.loss.item() == pytest.approx(1.62)

    @pytest.mark.parametrize("value_clip_range", [None, 1e6])
    def test_without_a_range_it_is_half_the_squared_error(self, value_clip_range: float | None) -> None:
        numbers = value_numbers(0)
        mask = numbers["response_mask"]
        result = ppo_value_loss(**numbers, value_clip_range=value_clip_range)
        squares = (numbers["values"] - numbers["returns"])[mask].square()
        torch.testing.assert_close(result.loss, 0.5 * squares.mean())
        assert result.clipped_sum.item() == 0

    @settings(deadline=None)
    @given(seed=seeds)
    def test_the_gradient_matches_finite_differences_and_is_zero_under_the_mask(self, seed: int) -> None:
        numbers = value_numbers(seed)
        mask, old, returns = (numbers[name] for name in ("response_mask", "old_values", "returns"))
        values = numbers["values"].clone().requires_grad_()
        result = ppo_value_loss(**(numbers | {"values": values}), value_clip_range=0.2)
        slopes = gradient(result.loss, values)
        count = int(mask.sum())

        def token_loss(value: float, row: int, column: int) -> float:
            centre, target = old[row, column].item(), returns[row, column].item()
            clipped = min(max(value, centre - 0.2), centre + 0.2)
            return 0.5 * max((value - target) ** 2, (clipped - target) ** 2) / count

        step, total = 1e-6, 0.0
        for row, column in mask.nonzero().tolist():
            here = values[row, column].item()
            total += token_loss(here, row, column)
            up, down = token_loss(here + step, row, column), token_loss(here - step, row, column)
            middle = token_loss(here, row, column)
            if abs(up - 2 * middle + down) > 1e-9:
                continue  # at the kink there is no slope to compare
            assert slopes[row, column].item() == pytest.approx((up - down) / (2 * step), abs=1e-4)
        assert result.loss.item() == pytest.approx(total, abs=1e-5)
        assert not slopes[~mask].any()

    @settings(deadline=None)
    @given(seed=seeds, cut=st.integers(1, 2))
    def test_micro_batches_add_up_to_the_minibatch(self, seed: int, cut: int) -> None:
        numbers = value_numbers(seed)
        whole = ppo_value_loss(**numbers)
        weights = token_mean_weights(numbers["response_mask"])
        parts = [
            ppo_value_loss(**{name: x[rows] for name, x in numbers.items()}, token_weights=weights[rows])
            for rows in (slice(0, cut), slice(cut, None))
        ]
        torch.testing.assert_close(whole.loss, parts[0].loss + parts[1].loss, atol=1e-5, rtol=1e-5)
        assert whole.clipped_sum == parts[0].clipped_sum + parts[1].clipped_sum


class TestPreferenceLoss:
    def test_by_hand(self) -> None:
        chosen, rejected = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 2.0])
        # log(1 + e^-1), log 2, log(1 + e)
        torch.testing.assert_close(
            preference_loss(chosen, rejected), torch.tensor([0.31326169, 0.69314718, 1.31326169])
        )

    def test_a_margin_asks_for_more(self) -> None:
        chosen, rejected = torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0])
        # log(1 + e^-(1 - 0.5)) = 0.474077; a margin of the whole lead leaves log 2.
        loss = preference_loss(chosen, rejected, margin=torch.tensor([0.5, 1.0]))
        torch.testing.assert_close(loss, torch.tensor([0.47407699, 0.69314718]))

    def test_far_off_it_is_linear_and_finite(self) -> None:
        scores = torch.tensor([-1000.0, 1000.0], requires_grad=True)
        loss = preference_loss(scores, torch.zeros(2))
        assert loss.tolist() == [1000, 0]
        assert gradient(loss.sum(), scores).tolist() == [-1, 0]

    def test_the_gradient_is_the_probability_of_the_wrong_order(self) -> None:
        chosen = torch.tensor([1.0, -0.5], requires_grad=True)
        rejected = torch.tensor([0.25, 0.75], requires_grad=True)
        loss = preference_loss(chosen, rejected, margin=0.25).sum()
        wrong = torch.sigmoid(-(chosen - rejected - 0.25)).detach()
        torch.testing.assert_close(gradient(loss, chosen), -wrong)
        torch.testing.assert_close(gradient(preference_loss(chosen, rejected, margin=0.25).sum(), rejected), wrong)

    def test_bfloat16_scores_are_compared_in_float32(self) -> None:
        loss = preference_loss(torch.tensor([3.0]).bfloat16(), torch.tensor([0.0]).bfloat16())
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(math.log1p(math.exp(-3)), rel=1e-6)


def test_shapes_that_differ_are_refused() -> None:
    x, mask, narrow = torch.zeros(2, 3), torch.ones(2, 3).bool(), torch.zeros(2, 2)
    expected = r"\(2, 3\), \(2, 2\).* all are \(batch, response\)"
    with pytest.raises(ValueError, match="ppo_policy_loss.*" + expected):
        ppo_policy_loss(logprobs=x, old_logprobs=narrow, advantages=x, response_mask=mask)
    with pytest.raises(ValueError, match="ppo_value_loss.*" + expected):
        ppo_value_loss(values=x, old_values=narrow, returns=x, response_mask=mask)

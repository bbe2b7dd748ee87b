import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.functional.logprobs import entropy_from_logits, logprobs_from_logits

LOGITS = torch.tensor([1.0, 2.0, 5.0]).log()  # probabilities 1/8, 2/8, 5/8


def test_logprobs_by_hand() -> None:
    logits = LOGITS.expand(1, 3, 3) + torch.tensor([[[0.0], [100.0], [-3.0]]])  # a shift changes nothing
    expected = torch.tensor([[1 / 8, 2 / 8, 5 / 8]]).log()
    torch.testing.assert_close(logprobs_from_logits(logits, torch.tensor([[0, 1, 2]])), expected, atol=1e-5, rtol=0)


def test_entropy_by_hand() -> None:
    # 1/8 log 8 + 1/4 log 4 + 5/8 log 8/5
    expected = math.log(8) / 8 + math.log(4) / 4 + 5 / 8 * math.log(8 / 5)
    assert entropy_from_logits(LOGITS).item() == pytest.approx(expected, rel=1e-6)
    assert entropy_from_logits(torch.zeros(7)).item() == pytest.approx(math.log(7), rel=1e-6)
    assert entropy_from_logits(torch.tensor([1e4, 0.0, 0.0])).item() == 0


def test_any_leading_shape() -> None:
    assert logprobs_from_logits(LOGITS, torch.tensor(1)).shape == ()
    assert logprobs_from_logits(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    assert logprobs_from_logits(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3)
    transposed = torch.tensor([[0, 1, 2]]).T  # not contiguous
    torch.testing.assert_close(logprobs_from_logits(LOGITS.expand(3, 1, 3), transposed)[:, 0], LOGITS - math.log(8))


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    logits = (10 * torch.randn(4, 500, generator=torch.Generator().manual_seed(0))).bfloat16()
    tokens = torch.arange(4)
    exact = logits.double().log_softmax(-1)
    logprobs, entropy = logprobs_from_logits(logits, tokens), entropy_from_logits(logits)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), exact.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), -(exact * exact.exp()).sum(-1), atol=1e-5, rtol=1e-5)


def test_a_token_that_cannot_come_adds_nothing_in_value_and_gradient() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0]], requires_grad=True)
    entropy = entropy_from_logits(logits)
    assert entropy.item() == pytest.approx(math.log(2))
    (entropy + logprobs_from_logits(logits, torch.tensor([0]))).sum().backward()
    # Entropy is at its maximum, so its gradient is 0; that of a log-probability is onehot - p.
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, 0.0, -0.5]]))


@settings(deadline=None)
@given(seed=st.integers(0, 10**6))
def test_gradients_match_finite_differences(seed: int) -> None:
    logits = 2 * torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
    tokens = torch.tensor([0, 4, 2])

    def total(logits: list[list[float]]) -> float:
        """Sum of log-probabilities minus entropies, over plain numbers in double precision."""
        result = 0.0
        for row, token in zip(logits, tokens.tolist(), strict=True):
            log_total = math.log(sum(math.exp(logit) for logit in row))
            result += row[token] - log_total
            result += sum((logit - log_total) * math.exp(logit - log_total) for logit in row)
        return result

    variable = logits.clone().requires_grad_()
    (logprobs_from_logits(variable, tokens) - entropy_from_logits(variable)).sum().backward()
    assert variable.grad is not None
    step, plain = 1e-5, logits.tolist()
    for row in range(3):
        for column in range(5):
            around = []
            for sign in (1, -1):
                moved = [list(entries) for entries in plain]
                moved[row][column] += sign * step
                around.append(total(moved))
            slope = (around[0] - around[1]) / (2 * step)
            assert variable.grad[row, column].item() == pytest.approx(slope, abs=2e-5)

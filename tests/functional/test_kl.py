import math

import pytest
import torch

from rlhf_lightning.functional.kl import kl_k1, kl_k2, kl_k3

LOGPROBS, REF_LOGPROBS = torch.tensor([-1.0, -1.5, -2.0]), torch.tensor([-1.5, -1.0, -2.0])  # d = 0.5, -0.5, 0


def test_estimates_by_hand() -> None:
    torch.testing.assert_close(kl_k1(LOGPROBS, REF_LOGPROBS), torch.tensor([0.5, -0.5, 0.0]))
    torch.testing.assert_close(kl_k2(LOGPROBS, REF_LOGPROBS), torch.tensor([0.125, 0.125, 0.0]))
    # exp(-0.5) - 1 + 0.5 and exp(0.5) - 1 - 0.5
    torch.testing.assert_close(kl_k3(LOGPROBS, REF_LOGPROBS), torch.tensor([0.10653066, 0.14872127, 0.0]))


def test_their_expectation_under_the_policy() -> None:
    policy = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    reference = torch.tensor([0.4, 0.4, 0.1, 0.1], dtype=torch.float64)
    exact = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True))
    expected = {k: float((policy * k(policy.log(), reference.log())).sum()) for k in (kl_k1, kl_k2, kl_k3)}
    assert expected[kl_k1] == pytest.approx(exact, rel=1e-5)
    assert expected[kl_k3] == pytest.approx(exact, rel=1e-5)
    # k2 is biased, by a third-order term: close here, and not equal.
    assert expected[kl_k2] == pytest.approx(exact, rel=0.1)
    assert expected[kl_k2] != pytest.approx(exact, rel=1e-3)


def test_k3_keeps_its_digits_where_the_models_are_close() -> None:
    # d²/2 - d³/6 + ... of d = 1e-3; exp(-d) - 1 + d in float32 would be off by a tenth.
    estimate = kl_k3(torch.tensor([0.0]), torch.tensor([-1e-3])).item()
    assert estimate == pytest.approx(4.998334e-7, rel=1e-3)


def test_half_precision_is_subtracted_in_float32() -> None:
    logprobs, ref_logprobs = torch.tensor([-1.0]).bfloat16(), torch.tensor([-1.0078125]).bfloat16()
    for estimate, value in ((kl_k1, 0.0078125), (kl_k2, 3.0517578e-5), (kl_k3, 3.0438e-5)):
        result = estimate(logprobs, ref_logprobs)
        assert result.dtype == torch.float32
        assert result.item() == pytest.approx(value, rel=1e-3)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_lightning.functional.masked import masked_mean, masked_sum, masked_var, whiten

NAN = torch.nan


def drawn(seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Return numbers around 3 and a mask that keeps at least two of them."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, size, generator=generator) < 0.6
    mask[:, 0] = True
    return 3 + 2 * torch.randn(2, size, generator=generator), mask


def test_sum_mean_and_variance_by_hand() -> None:
    x, mask = torch.tensor([1.0, 3.0, NAN, 8.0]), torch.tensor([True, True, False, True])
    assert masked_sum(x, mask).item() == 12
    assert masked_mean(x, mask).item() == 4  # 12 / 3, not 12 / 4
    torch.testing.assert_close(masked_var(x, mask), torch.tensor(26 / 3))  # (9 + 1 + 16) / 3, not / 2


def test_variance_around_a_given_mean() -> None:
    x, mask = torch.tensor([1.0, 3.0, NAN]), torch.tensor([True, True, False])
    assert masked_var(x, mask, mean=torch.tensor(0.0)).item() == 5  # (1 + 9) / 2


def test_nothing_that_counts_has_no_mean() -> None:
    assert masked_mean(torch.ones(3), torch.zeros(3).bool()).isnan()
    assert masked_sum(torch.ones(3), torch.zeros(3).bool()).item() == 0


def test_counts_add_up_in_float32() -> None:
    ones = torch.ones(257, dtype=torch.bfloat16)  # bfloat16 has no 257
    for result in (masked_sum(ones, ones.bool()), masked_sum(ones.bool(), ones.bool())):
        assert (result.item(), result.dtype) == (257, torch.float32)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\) but mask has \(3,\)"):
        masked_mean(torch.ones(2, 3), torch.ones(3).bool())
    with pytest.raises(ValueError, match="masked_sum"):
        whiten(torch.ones(2, 3), torch.ones(3).bool())


def test_whitening_by_hand() -> None:
    x, mask = torch.tensor([2.0, NAN, 6.0]), torch.tensor([True, False, True])  # mean 4, variance 4
    torch.testing.assert_close(whiten(x, mask), torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(whiten(x, mask, centre=False), torch.tensor([3.0, 0.0, 5.0]))  # -1 + 4, 1 + 4


def test_whitening_with_the_statistics_of_others() -> None:
    x, mask = torch.tensor([2.0, NAN, 6.0]), torch.tensor([True, False, True])
    mean, var = torch.tensor(10.0), torch.tensor(16.0)
    torch.testing.assert_close(whiten(x, mask, mean=mean, var=var), torch.tensor([-2.0, 0.0, -1.0]))
    # Only the mean given: the variance is measured from it, (64 + 16) / 2 = 40.
    torch.testing.assert_close(whiten(x, mask, mean=mean), torch.tensor([-8.0, 0.0, -4.0]) / 40**0.5)


def test_equal_numbers_become_zero_and_not_nan() -> None:
    assert whiten(torch.full((4,), 7.0), torch.ones(4).bool()).tolist() == [0] * 4
    # 1e-8 stands inside the root: one unit from the mean over sqrt(1e-8).
    far = whiten(torch.ones(1), torch.ones(1).bool(), mean=torch.tensor(0.0), var=torch.tensor(0.0))
    torch.testing.assert_close(far, torch.tensor([1e4]))


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 20))
def test_whitened_numbers_have_mean_0_and_variance_1(seed: int, size: int) -> None:
    x, mask = drawn(seed, size)
    white = whiten(x, mask)
    assert masked_mean(white, mask).item() == pytest.approx(0, abs=1e-4)
    var = masked_var(x, mask).item()
    assert masked_var(white, mask).item() == pytest.approx(var / (var + 1e-8), abs=1e-3)  # 1 but for equal numbers
    kept = whiten(x, mask, centre=False)
    torch.testing.assert_close(masked_mean(kept, mask), masked_mean(x, mask), atol=1e-4, rtol=1e-4)
    assert not white[~mask].any()
    assert not kept[~mask].any()


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 12))
def test_what_lies_under_the_mask_changes_neither_value_nor_gradient(seed: int, size: int) -> None:
    x, mask = drawn(seed, size)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1))
    for function in (
        masked_sum,
        masked_mean,
        masked_var,
        lambda x, mask: (weights * whiten(x, mask)).sum(),
        lambda x, mask: (weights * whiten(x, mask, centre=False)).sum(),
    ):
        clean = x.clone().requires_grad_()
        dirty = torch.where(mask, x, NAN).requires_grad_()
        values = [function(clean, mask), function(dirty, mask)]
        for value in values:
            value.backward()
        assert torch.equal(*values)
        assert clean.grad is not None
        assert dirty.grad is not None
        assert torch.equal(clean.grad, dirty.grad)
        assert not dirty.grad[~mask].any()

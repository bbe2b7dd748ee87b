import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from rlhf_lightning.functional.advantages import gae, group_relative, leave_one_out, rewards_to_go
from rlhf_lightning.functional.sequences import length_mask

NAN = torch.nan
lengths_of_rows = st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any)
shares = st.sampled_from([0.0, 0.5, 0.95, 1.0])


def drawn(seed: int, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return random rewards and values, NaN or some other rubbish where the mask is False, and the mask."""
    rubbish = NAN if seed % 2 else 7.0
    generator = torch.Generator().manual_seed(seed)
    mask = length_mask(torch.tensor(lengths))
    rewards, values = torch.randn(2, *mask.shape, generator=generator)
    return torch.where(mask, rewards, rubbish), torch.where(mask, values, rubbish), mask


def test_three_tokens_by_hand() -> None:
    # gamma 0.9, lambda 0.8, so gamma * lambda is 0.72; values 0.5, 0.4, 0.3 and 0 after the last token.
    # delta: 1 + 0.9 * 0.4 - 0.5 = 0.86;  2 + 0.9 * 0.3 - 0.4 = 1.87;  3 - 0.3 = 2.7
    # advantages: 2.7;  1.87 + 0.72 * 2.7 = 3.814;  0.86 + 0.72 * 3.814 = 3.60608
    rewards, values = torch.tensor([[1.0, 2.0, 3.0, NAN]]), torch.tensor([[0.5, 0.4, 0.3, NAN]])
    mask = length_mask(torch.tensor([3]), 4)
    advantages, returns = gae(rewards=rewards, values=values, response_mask=mask, gamma=0.9, gae_lambda=0.8)
    torch.testing.assert_close(advantages, torch.tensor([[3.60608, 3.814, 2.7, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[4.10608, 4.214, 3.0, 0.0]]))


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), lengths=lengths_of_rows, gamma=shares, gae_lambda=shares)
def test_against_the_double_sum(seed: int, lengths: list[int], gamma: float, gae_lambda: float) -> None:
    rewards, values, mask = drawn(seed, lengths)
    advantages, returns = gae(rewards=rewards, values=values, response_mask=mask, gamma=gamma, gae_lambda=gae_lambda)
    for row, length in enumerate(lengths):
        reward, value = rewards[row, :length].tolist(), [*values[row, :length].tolist(), 0.0]
        for t in range(length):
            expected = sum(
                (gamma * gae_lambda) ** (k - t) * (reward[k] + gamma * value[k + 1] - value[k])
                for k in range(t, length)
            )
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-4)
            assert returns[row, t].item() == pytest.approx(expected + value[t], abs=1e-4)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), lengths=lengths_of_rows, gamma=shares)
def test_lambda_1_is_monte_carlo_and_lambda_0_one_step(seed: int, lengths: list[int], gamma: float) -> None:
    rewards, values, mask = drawn(seed, lengths)
    _, monte_carlo = gae(rewards=rewards, values=values, response_mask=mask, gamma=gamma, gae_lambda=1.0)
    one_step, _ = gae(rewards=rewards, values=values, response_mask=mask, gamma=gamma, gae_lambda=0.0)
    for row, length in enumerate(lengths):
        reward, value = rewards[row, :length].tolist(), [*values[row, :length].tolist(), 0.0]
        for t in range(length):
            discounted = sum(gamma ** (k - t) * reward[k] for k in range(t, length))
            assert monte_carlo[row, t].item() == pytest.approx(discounted, abs=1e-4)
            assert one_step[row, t].item() == pytest.approx(reward[t] + gamma * value[t + 1] - value[t], abs=1e-4)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), lengths=lengths_of_rows, more=st.integers(0, 3))
def test_padding_permuting_and_splitting_change_nothing(seed: int, lengths: list[int], more: int) -> None:
    rewards, values, mask = drawn(seed, lengths)
    whole = gae(rewards=rewards, values=values, response_mask=mask)
    wider = [pad(x, (0, more), value=NAN) for x in (rewards, values)]
    padded = gae(rewards=wider[0], values=wider[1], response_mask=pad(mask, (0, more)))
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    permuted = gae(rewards=rewards[order], values=values[order], response_mask=mask[order])
    for together, wide, mixed in zip(whole, padded, permuted, strict=True):
        assert torch.equal(wide, pad(together, (0, more)))
        assert torch.equal(mixed, together[order])
    for row, length in enumerate(lengths):
        own_rewards, own_values, own_mask = (x[row : row + 1, :length] for x in (rewards, values, mask))
        alone = gae(rewards=own_rewards, values=own_values, response_mask=own_mask)
        assert torch.equal(alone[0], whole[0][row : row + 1, :length])


def test_arguments_stay_as_they_are_and_results_are_float32() -> None:
    rewards, values = torch.ones(2, 3, dtype=torch.bfloat16), torch.full((2, 3), 0.25, dtype=torch.bfloat16)
    advantages, returns = gae(rewards=rewards, values=values, response_mask=torch.ones(2, 3).bool())
    assert advantages.dtype == returns.dtype == torch.float32
    assert torch.equal(rewards, torch.ones(2, 3, dtype=torch.bfloat16))
    assert values.unique().tolist() == [0.25]


def test_a_value_too_many_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rewards has shape \(4, 7\), values \(4, 8\).*Drop the value"):
        gae(rewards=torch.zeros(4, 7), values=torch.zeros(4, 8), response_mask=torch.ones(4, 7).bool())
    with pytest.raises(ValueError, match=r"response_mask \(4, 8\)"):
        gae(rewards=torch.zeros(4, 7), values=torch.zeros(4, 7), response_mask=torch.ones(4, 8).bool())


# --- without a critic -------------------------------------------------------------------------------------------------


def test_rewards_to_go_by_hand() -> None:
    # gamma 0.5: 4;  2 + 0.5 * 4 = 4;  1 + 0.5 * 4 = 3, and nothing from under the mask.
    mask = length_mask(torch.tensor([3, 1]), 4)
    rewards = torch.tensor([[1.0, 2.0, 4.0, NAN], [5.0, NAN, NAN, NAN]])
    expected = torch.tensor([[3.0, 4.0, 4.0, 0.0], [5.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards_to_go(rewards, mask, gamma=0.5), expected)
    assert rewards_to_go(rewards, mask)[0].tolist() == [7, 6, 4, 0]


def test_leave_one_out_by_hand() -> None:
    # The others' means: (2 + 6) / 2, (1 + 6) / 2, (1 + 2) / 2; the second group knows nothing of the first.
    found = leave_one_out(torch.tensor([1.0, 2.0, 6.0, 10.0, 10.0, 40.0]), group_size=3)
    torch.testing.assert_close(found, torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5, 10 - 25.0, 10 - 25.0, 40 - 10.0]))


def test_group_relative_by_hand() -> None:
    # Means 2 and 20; unbiased deviations sqrt(2) and sqrt(200).
    returns = torch.tensor([1.0, 3.0, 10.0, 30.0])
    assert group_relative(returns, group_size=2, scale=False).tolist() == [-1, 1, -10, 10]
    scaled = group_relative(returns, group_size=2)
    expected = torch.tensor([-1, 1, -10, 10]) / (torch.tensor([2.0, 2.0, 200.0, 200.0]).sqrt() + 1e-4)
    torch.testing.assert_close(scaled, expected)


@given(seed=st.integers(0, 10**6), size=st.integers(2, 5), groups=st.integers(1, 4))
def test_groups_sum_to_zero_and_a_shift_or_another_group_changes_nothing(seed: int, size: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    returns = torch.randn(groups * size, generator=generator)
    shift = torch.randn(groups, generator=generator).repeat_interleave(size)
    # Without the scale, which would blow up the rounding of a group whose returns are nearly equal.
    for estimate in (leave_one_out, functools.partial(group_relative, scale=False)):
        whole = estimate(returns, size)
        torch.testing.assert_close(whole.view(-1, size).sum(dim=1), torch.zeros(groups), atol=1e-4, rtol=0)
        torch.testing.assert_close(estimate(returns + shift, size), whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(estimate(returns[:size], size), whole[:size])
    ratio = size / (size - 1)
    torch.testing.assert_close(group_relative(returns, size, scale=False) * ratio, leave_one_out(returns, size))


def test_a_group_without_differences_gets_zero_and_no_nan() -> None:
    assert group_relative(torch.full((4,), 0.7), group_size=4).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("count", "size"), [(4, 1), (5, 2)])
def test_what_is_no_whole_group_is_refused(count: int, size: int) -> None:
    for estimate in (leave_one_out, group_relative):
        with pytest.raises(ValueError, match=f"{count} returns are no whole groups of {size}"):
            estimate(torch.zeros(count), size)

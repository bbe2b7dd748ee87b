import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.functional.rewards import (
    Moments,
    clip_scores,
    merge_moments,
    missing_eos_penalty,
    missing_eos_score,
    normalize_scores,
    token_rewards,
)
from rlhf_lightning.functional.sequences import length_mask

NAN = torch.nan


def test_rewards_by_hand() -> None:
    # A response of two tokens, one that fills the row, one of a single token and one of none.
    mask = length_mask(torch.tensor([2, 3, 1, 0]))
    kl = torch.tensor([[1.0, 2.0, NAN], [1.0, -2.0, 3.0], [4.0, NAN, NAN], [NAN, NAN, NAN]])
    rewards = token_rewards(scores=torch.tensor([10.0, 20.0, 30.0, 40.0]), kl=kl, response_mask=mask, kl_coef=0.5)
    expected = [[-0.5, 9.0, 0.0], [-0.5, 1.0, 18.5], [28.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(rewards, torch.tensor(expected))


def test_a_reward_of_every_token_is_added() -> None:
    mask = length_mask(torch.tensor([2, 3]))
    rewards = token_rewards(
        scores=torch.tensor([1.0, 2.0]),
        kl=torch.ones(2, 3),
        response_mask=mask,
        kl_coef=0.1,
        per_token=torch.tensor([[5.0, 6.0, NAN], [7.0, 8.0, 9.0]]),
    )
    torch.testing.assert_close(rewards, torch.tensor([[4.9, 6.9, 0.0], [6.9, 7.9, 10.9]]))


def test_without_a_price_the_bare_score_is_left() -> None:
    mask = length_mask(torch.tensor([2, 3]))
    rewards = token_rewards(scores=torch.tensor([4.0, 5.0]), kl=torch.rand(2, 3), response_mask=mask, kl_coef=0.0)
    assert rewards.tolist() == [[0, 4, 0], [0, 0, 5]]


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), more=st.integers(0, 3))
def test_a_response_gets_its_score_less_its_kl_whatever_the_padding(seed: int, lengths: list[int], more: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = length_mask(torch.tensor(lengths))
    kl, scores = torch.randn(mask.shape, generator=generator), torch.randn(len(lengths), generator=generator)
    rewards = token_rewards(scores=scores, kl=kl, response_mask=mask, kl_coef=0.3)
    expected = [
        float(score) - 0.3 * sum(row[:length]) for score, row, length in zip(scores, kl.tolist(), lengths, strict=True)
    ]
    torch.testing.assert_close(rewards.sum(dim=1), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    padded = token_rewards(
        scores=scores,
        kl=torch.nn.functional.pad(kl, (0, more), value=NAN),
        response_mask=torch.nn.functional.pad(mask, (0, more)),
        kl_coef=0.3,
    )
    assert torch.equal(padded, torch.nn.functional.pad(rewards, (0, more)))


def test_shapes_that_do_not_fit_are_refused() -> None:
    mask, kl = torch.ones(2, 3).bool(), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"scores \(2, 3\)"):
        token_rewards(scores=kl, kl=kl, response_mask=mask, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"kl \(2, 2\)"):
        token_rewards(scores=torch.ones(2), kl=kl[:, :2], response_mask=mask, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"per_token has shape \(2,\)"):
        token_rewards(scores=torch.ones(2), kl=kl, response_mask=mask, kl_coef=0.1, per_token=torch.ones(2))


def test_only_what_never_stopped_is_penalised() -> None:
    scores, finished = torch.tensor([1.0, 1.0, -2.0]), torch.tensor([True, False, False])
    assert missing_eos_penalty(scores, finished, 0.5).tolist() == [1.0, 0.5, -2.5]
    assert missing_eos_penalty(scores, finished, 0.0).tolist() == [1.0, 1.0, -2.0]
    assert missing_eos_penalty(scores.bfloat16(), finished, 0.5).dtype == torch.float32


def test_the_score_of_what_never_stopped_is_replaced() -> None:
    scores, finished = torch.tensor([1.0, NAN, 5.0]), torch.tensor([True, False, False])
    assert missing_eos_score(scores, finished, -1.0).tolist() == [1, -1, -1]
    assert missing_eos_score(scores.bfloat16(), finished, -1.0).dtype == torch.float32


def test_scores_are_clipped_on_both_sides() -> None:
    scores = torch.tensor([-3.0, -0.5, 0.25, 8.0], requires_grad=True)
    clipped = clip_scores(scores, 2.0)
    assert clipped.tolist() == [-2, -0.5, 0.25, 2]
    clipped.sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [0, 1, 1, 0]
    assert torch.equal(clip_scores(scores, float("inf")), scores)


def test_scores_are_normalised_by_given_statistics() -> None:
    assert normalize_scores(torch.tensor([1.0, 4.0]), mean=2.0, std=4.0).tolist() == [-0.25, 0.5]
    with pytest.raises(ValueError, match=r"std is 0\.0"):
        normalize_scores(torch.ones(2), mean=0.0, std=0.0)


def test_moments_of_two_sets_are_those_of_all_numbers() -> None:
    # 1, 2, 6 have mean 3 and squared deviations 4 + 1 + 9; with 7: mean 4 and 9 + 4 + 4 + 9.
    assert merge_moments(Moments(3, 3.0, 14.0), Moments(1, 7.0, 0.0)) == (4, 4.0, 26.0)
    empty, some = Moments(0, 0.0, 0.0), Moments(3, 3.0, 14.0)
    assert merge_moments(empty, some) == merge_moments(some, empty) == some
    assert merge_moments(empty, empty) == empty

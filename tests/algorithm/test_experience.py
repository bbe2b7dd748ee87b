import dataclasses

import torch

from rlhf_lightning.algorithm.advantages import GAE, LeaveOneOut
from rlhf_lightning.algorithm.experience import Experience, estimate_experience
from rlhf_lightning.algorithm.kl import FixedKL
from rlhf_lightning.algorithm.score_transforms import MissingEOSPenalty, ScoreClip
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.rollout.collect import Rollout
from rlhf_lightning.rollout.reward_sources import Scores

NAN = torch.nan


def rollout() -> Rollout:
    """Return two responses of two tokens and one; what lies under the mask is NaN."""
    sequences = SequenceBatch(torch.tensor([[5, 6, 7, 2], [8, 2, 0, 0]]), torch.tensor([2, 1]), torch.tensor([2, 1]))
    return Rollout(
        sequences=sequences,
        finished=torch.tensor([True, True]),
        scores=Scores(torch.tensor([4.0, -1.0]), {}),
        old_logprobs=torch.tensor([[-1.0, -2.0], [-0.5, NAN]]),
        ref_logprobs=torch.tensor([[-1.5, -1.0], [-0.5, NAN]]),
        old_values=torch.tensor([[1.0, 2.0], [0.5, NAN]]),
        sampler_logprobs=torch.zeros(2, 2),
        prompts=["a", "b"],
        responses=["c", "d"],
    )


def test_by_hand() -> None:
    # k1: 0.5, -1 and 0. Rewards at 0.1 a nat: -0.05, 0.1 + 4 and 0 - 1.
    # gamma 1, lambda 0.5: deltas -0.05 + 2 - 1 = 0.95, 4.1 - 2 = 2.1, and -1.5; advantages 0.95 + 0.5 · 2.1 = 2.
    experience = estimate_experience(rollout(), kl=FixedKL(0.1), advantages=GAE(gae_lambda=0.5, whiten=None))
    torch.testing.assert_close(experience.rewards, torch.tensor([[-0.05, 4.1], [-1.0, 0.0]]))
    torch.testing.assert_close(experience.advantages, torch.tensor([[2.0, 2.1], [-1.5, 0.0]]))
    torch.testing.assert_close(experience.returns, torch.tensor([[3.0, 4.1], [-1.0, 0.0]]))
    assert experience.response_mask.tolist() == [[True, True], [True, False]]
    assert experience.old_logprobs is not experience.old_values


def test_the_price_and_the_estimator_are_those_of_the_control() -> None:
    free = estimate_experience(rollout(), kl=FixedKL(0.0), advantages=GAE(whiten=None))
    assert free.rewards.tolist() == [[0, 4], [-1, 0]]
    squared = estimate_experience(rollout(), kl=FixedKL(1.0, estimator="k2"), advantages=GAE(whiten=None))
    torch.testing.assert_close(squared.rewards, torch.tensor([[-0.125, 3.5], [-1.0, 0.0]]))


def test_selected_rows_lose_the_padding_that_others_needed() -> None:
    whole = estimate_experience(rollout(), kl=FixedKL(0.1), advantages=GAE())
    part = whole.select(torch.tensor([1]))
    assert part.sequences.input_ids.tolist() == [[8, 2]]
    for field in dataclasses.fields(Experience):
        if field.name != "sequences":
            value, before = getattr(part, field.name), getattr(whole, field.name)
            assert value.shape == (1, 1)
            assert torch.equal(value, before[1:, :1])
    assert torch.equal(part.response_mask, part.sequences.response_mask)


def test_rows_come_in_the_order_asked_for() -> None:
    whole = estimate_experience(rollout(), kl=FixedKL(0.1), advantages=GAE())
    mixed = whole.select(torch.tensor([1, 0]))
    assert torch.equal(mixed.rewards, whole.rewards.flip(0))
    assert torch.equal(mixed.sequences.prompt_lengths, torch.tensor([1, 2]))


def test_a_penalty_in_the_loss_stays_out_of_the_rewards() -> None:
    found = estimate_experience(rollout(), kl=FixedKL(0.1, place="loss"), advantages=GAE(whiten=None))
    assert found.rewards.tolist() == [[0, 4], [-1, 0]]
    assert torch.equal(found.ref_logprobs[:, 0], rollout().ref_logprobs[:, 0])


def test_score_transforms_change_what_is_paid_at_the_end_in_their_order() -> None:
    """4 and -1, the second unfinished: clipped to 2 and -1, then -3 for not ending; the other way round -2."""
    given = dataclasses.replace(rollout(), finished=torch.tensor([True, False]))
    clip, penalty = ScoreClip(2.0), MissingEOSPenalty(3.0)
    for transforms, second in (([clip, penalty], -4.0), ([penalty, clip], -2.0)):
        found = estimate_experience(given, kl=FixedKL(0.0), advantages=GAE(whiten=None), score_transforms=transforms)
        assert found.rewards.tolist() == [[0, 2], [second, 0]]


def test_dense_rewards_are_paid_where_they_arise() -> None:
    """Of the total of 4, 1 + 0.5 is paid at the tokens; only the other 2.5 is clipped."""
    dense = Scores(torch.tensor([4.0, -1.0]), {}, per_token=torch.tensor([[1.0, 0.5], [0.0, NAN]]))
    given = dataclasses.replace(rollout(), scores=dense)
    found = estimate_experience(given, kl=FixedKL(0.0), advantages=GAE(whiten=None))
    assert found.rewards.tolist() == [[1, 3], [-1, 0]]
    clipped = estimate_experience(
        given, kl=FixedKL(0.0), advantages=GAE(whiten=None), score_transforms=[ScoreClip(2.0)]
    )
    assert clipped.rewards.tolist() == [[1, 2.5], [-1, 0]]


def test_groups_reach_the_estimator() -> None:
    found = estimate_experience(dataclasses.replace(rollout(), group_size=2), kl=FixedKL(0.0), advantages=LeaveOneOut())
    assert found.advantages.tolist() == [[5, 5], [-5, 0]]

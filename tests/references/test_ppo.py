"""Our formulas of PPO against one iteration of TRL 1.12's trainer; where the two differ, by exactly what.

TRL's ``padding_mask`` is False on a response's tokens; its ``padding_mask_p1`` on one place more, where it pays the
score and predicts a further value.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.functional.advantages import gae
from rlhf_lightning.functional.kl import kl_k1, kl_k2, kl_k3
from rlhf_lightning.functional.losses import ppo_policy_loss, ppo_value_loss
from rlhf_lightning.functional.masked import masked_mean, masked_sum, masked_var, whiten
from rlhf_lightning.functional.rewards import missing_eos_penalty, token_rewards

Case = dict[str, Any]


@pytest.fixture(params=["k1", "k3_whitened"])
def case(request: pytest.FixtureRequest, reference: Callable[[str, str], Case]) -> Case:
    """An iteration with the k1 penalty, and one with k3 and whitened rewards."""
    return reference("ppo", request.param)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def masks(case: Case) -> tuple[Tensor, Tensor]:
    """Return TRL's masks in our sense (True counts): the response's tokens, and one place more."""
    return ~case["rollout"]["padding_mask"], ~case["rollout"]["padding_mask_p1"]


def micro_batches(case: Case) -> list[tuple[Case, Tensor, Tensor]]:
    tokens, one_more = masks(case)
    return [(each, tokens[each["rows"]], one_more[each["rows"]]) for each in case["micro_batches"]]


def test_kl_estimates(case: Case) -> None:
    estimate = {"k1": kl_k1, "k3": kl_k3}[case["settings"]["kl_estimator"]]
    rollout = case["rollout"]
    close(estimate(rollout["logprobs"], rollout["ref_logprobs"]), rollout["kl"])


def test_token_rewards_but_for_the_place_of_the_score(case: Case) -> None:
    tokens, one_more = masks(case)
    scores, kl = case["rollout"]["scores"], case["rollout"]["kl"]
    ours = token_rewards(scores=scores, kl=kl, response_mask=tokens, kl_coef=case["settings"]["kl_coef"])
    theirs = case["rewards_before_whitening"]
    # TRL pays the score one place after the last token where the width allows it, else on the last token.
    last, after = tokens.sum(1) - 1, one_more.sum(1) - 1
    rows = last >= 0  # TRL takes a sampled pad token for padding: some of its responses are empty and yet get a score
    assert (after > last)[rows].any()
    assert (after == last)[rows].any()
    moved = theirs.clone()
    index = torch.arange(len(theirs))
    moved[index, after] -= scores
    moved[index[rows], last[rows]] += scores[rows]
    close(ours[rows], moved[rows])


def test_logged_sums_of_the_rollout(case: Case) -> None:
    tokens, _ = masks(case)
    kl, scores = case["rollout"]["kl"], case["rollout"]["scores"]
    logged = case["logged"]
    assert masked_sum(kl, tokens).item() / len(kl) == pytest.approx(logged["objective/kl"], abs=1e-5)
    coef = case["settings"]["kl_coef"]
    rewards = token_rewards(scores=scores, kl=kl, response_mask=tokens, kl_coef=coef)
    unpaid = scores[tokens.sum(1) == 0].sum()  # an empty response gets no reward from us
    total = (rewards.sum() + unpaid).item() / len(kl)
    assert total == pytest.approx(logged["objective/rlhf_reward"], abs=1e-5)
    assert scores.mean().item() == pytest.approx(logged["objective/scores"], abs=1e-6)


def test_missing_eos_penalty_is_subtracted(case: Case) -> None:
    ended = (case["rollout"]["postprocessed_responses"] == 2).any(dim=1)  # 2 is the recorder's end-of-text
    assert 0 < ended.sum() < len(ended)
    bare = case["rollout"]["scores"] + (~ended).float() * case["settings"]["missing_eos_penalty"]
    ours = missing_eos_penalty(bare, ended, case["settings"]["missing_eos_penalty"])
    close(ours, case["rollout"]["scores"])


def test_reward_whitening_but_for_bessels_correction(reference: Callable[[str, str], Case]) -> None:
    case = reference("ppo", "k3_whitened")
    _, one_more = masks(case)
    bare = case["rewards_before_whitening"]
    count = one_more.sum()
    corrected = masked_var(bare, one_more) * count / (count - 1)
    theirs = case["rollout"]["rewards"]
    close(whiten(bare, one_more, var=corrected, centre=False), theirs)
    # Ours divides by the biased variance, as OpenAI's does: larger around the mean by √(n / (n - 1)).
    ours, mean = whiten(bare, one_more, centre=False), masked_mean(bare, one_more)
    factor = (count / (count - 1)).sqrt()
    close((ours - mean)[one_more], ((theirs - mean) * factor)[one_more])


def test_advantages_and_returns_of_the_same_rewards(case: Case) -> None:
    _, one_more = masks(case)
    settings, rollout = case["settings"], case["rollout"]
    advantages, returns = gae(
        rewards=rollout["rewards"],
        values=rollout["values"],
        response_mask=one_more,
        gamma=settings["gamma"],
        gae_lambda=settings["lam"],
    )
    close(advantages, case["advantages_before_whitening"])
    close(returns, rollout["returns"])


def test_advantages_differ_by_the_value_after_the_end(reference: Callable[[str, str], Case]) -> None:
    case = reference("ppo", "k1")
    tokens, one_more = masks(case)
    gamma, lam = case["settings"]["gamma"], case["settings"]["lam"]
    rollout = case["rollout"]
    scores, values = rollout["scores"], rollout["values"]
    rewards = token_rewards(scores=scores, kl=rollout["kl"], response_mask=tokens, kl_coef=case["settings"]["kl_coef"])
    ours, _ = gae(rewards=rewards, values=values, response_mask=tokens, gamma=gamma, gae_lambda=lam)
    theirs = case["advantages_before_whitening"]
    checked = 0
    for row, length in enumerate(tokens.sum(1).tolist()):
        if length == 0 or one_more[row].sum() == length:
            expected = torch.zeros(length)
        else:
            # With score s and TRL's further value V at the place after the last token, its advantage there is s - V. On
            # the last token that gives r + γV - V_last + γλ(s - V), where ours is r + s - V_last; the difference goes
            # back through the sum with (γλ) a token.
            further = values[row, length]
            difference = gamma * further + gamma * lam * (scores[row] - further) - scores[row]
            expected = difference * (gamma * lam) ** torch.arange(length - 1, -1, -1)
            assert difference.abs() > 1e-3
            checked += 1
        close((theirs - ours)[row, :length], expected)
    assert checked >= 3


def test_advantage_whitening_but_for_bessels_correction(case: Case) -> None:
    tokens, _ = masks(case)
    bare, theirs = case["advantages_before_whitening"], case["rollout"]["advantages"]
    count = tokens.sum()
    corrected = masked_var(bare, tokens) * count / (count - 1)
    close(whiten(bare, tokens, var=corrected), theirs)
    close(whiten(bare, tokens), theirs * (count / (count - 1)).sqrt())


def test_policy_loss_of_each_micro_batch(case: Case) -> None:
    clipped = 0.0
    for each, tokens, _ in micro_batches(case):
        ours = ppo_policy_loss(
            logprobs=each["new_logprobs"],
            old_logprobs=each["mb_logprobs"],
            advantages=each["mb_advantage"],
            response_mask=tokens,
            clip_range=case["settings"]["cliprange"],
        )
        assert ours.loss.item() == pytest.approx(each["pg_loss"], abs=1e-5)
        assert (ours.clipped_sum / tokens.sum()).item() == pytest.approx(each["pg_clipfrac"], abs=1e-6)
        clipped += ours.clipped_sum.item()
    assert clipped > 10


def test_value_loss_of_each_micro_batch(case: Case) -> None:
    clipped = 0.0
    for each, tokens, one_more in micro_batches(case):
        numbers = {"values": each["vpred"], "old_values": each["mb_values"], "returns": each["mb_return"]}
        clip_range = case["settings"]["cliprange_value"]
        ours = ppo_value_loss(**numbers, response_mask=one_more, value_clip_range=clip_range)
        assert ours.loss.item() == pytest.approx(each["vf_loss"], abs=1e-5)
        assert (ours.clipped_sum / one_more.sum()).item() == pytest.approx(each["vf_clipfrac"], abs=1e-6)
        clipped += ours.clipped_sum.item()
        # We train no value after the end, so that our own mask gives another mean.
        if (one_more ^ tokens).any():
            own = ppo_value_loss(**numbers, response_mask=tokens, value_clip_range=clip_range)
            assert own.loss.item() != pytest.approx(each["vf_loss"], abs=1e-4)
    assert clipped > 10


def test_joint_loss(case: Case) -> None:
    for each in case["micro_batches"]:
        assert each["pg_loss"] + case["settings"]["vf_coef"] * each["vf_loss"] == pytest.approx(each["loss"], abs=1e-5)


def test_trl_averages_ratio_and_approx_kl_over_padding(case: Case) -> None:
    for each, tokens, _ in micro_batches(case):
        ours = ppo_policy_loss(
            logprobs=each["new_logprobs"],
            old_logprobs=each["mb_logprobs"],
            advantages=each["mb_advantage"],
            response_mask=tokens,
        )
        padding = (~tokens).sum()
        assert padding > 0
        # Under the padding its log-probabilities are all 1, hence a ratio of 1 and a divergence of 0.
        assert ((ours.ratio_sum + padding) / tokens.numel()).item() == pytest.approx(each["mean_ratio"], abs=1e-5)
        k2 = masked_sum(kl_k2(each["new_logprobs"], each["mb_logprobs"]), tokens)
        assert (k2 / tokens.numel()).item() == pytest.approx(each["approxkl"], abs=1e-5)


def test_the_first_pass_has_ratio_one(case: Case) -> None:
    for each, _, _ in micro_batches(case)[:4]:  # 2 minibatches of 2 micro-batches: the first epoch
        close(each["ratio"], torch.ones_like(each["ratio"]))
    assert (micro_batches(case)[-1][0]["ratio"] - 1).abs().max() > 0.1


def test_trl_steps_once_an_epoch_or_once_a_micro_batch(case: Case) -> None:
    # 2 epochs of 2 minibatches of 2 micro-batches, where we take 4 steps (tests/modules/test_ppo.py). TRL leaves the
    # count to accelerate: it counts micro-batches up to 4, and on the last rollout of the data makes each a step.
    assert case["optimizer_steps"].tolist() == [2, 8]
    assert case["gradient_clips"] == 0  # max_grad_norm, though set, is not used


def test_trl_logs_averages_with_empty_places(case: Case) -> None:
    # It averages a table of epochs x minibatches x accumulation steps (2 x 2 x 4), of which only half is filled.
    mean = sum(each["mean_ratio"] for each in case["micro_batches"]) / 16
    assert case["logged"]["val/ratio"] == pytest.approx(mean, abs=1e-5)
    assert case["logged"]["val/ratio"] < 0.7


def test_trl_weighs_micro_batches_alike_whatever_their_tokens(case: Case) -> None:
    first, second = micro_batches(case)[-2:]  # the last minibatch
    counts = [tokens.sum().item() for _, tokens, _ in (first, second)]
    assert counts[0] != counts[1]
    theirs = (first[0]["pg_loss"] + second[0]["pg_loss"]) / 2
    new, old, advantages = (
        torch.cat([first[0][key], second[0][key]]) for key in ("new_logprobs", "mb_logprobs", "mb_advantage")
    )
    mask = torch.cat([first[1], second[1]])
    ours = ppo_policy_loss(logprobs=new, old_logprobs=old, advantages=advantages, response_mask=mask).loss.item()
    weighted = (first[0]["pg_loss"] * counts[0] + second[0]["pg_loss"] * counts[1]) / sum(counts)
    assert ours == pytest.approx(weighted, abs=1e-5)
    assert ours != pytest.approx(theirs, abs=1e-4)

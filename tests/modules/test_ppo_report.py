"""What an iteration reports, on numbers small enough to work out by hand."""

import math
import time
from typing import Any

import pytest
import torch
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor

from rlhf_lightning.algorithm.experience import Experience
from rlhf_lightning.functional.losses import PolicyLoss, ValueLoss
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.modules.ppo_report import Stopwatch, UpdateSums, explained_variance, rollout_metrics, sample_rows
from rlhf_lightning.rollout.collect import Rollout
from rlhf_lightning.rollout.reward_sources import Scores

NAN = torch.nan
# Two responses, of three tokens and of one; what lies under the mask must not count, whatever it is.
MASK = torch.tensor([[True, True, True], [True, False, False]])
SEQUENCES = SequenceBatch(torch.tensor([[5, 6, 7, 8], [5, 9, 0, 0]]), torch.tensor([1, 1]), torch.tensor([3, 1]))


def experience(**changes: Tensor) -> Experience:
    zeros = torch.zeros(2, 3)
    fields: dict[str, Any] = dict.fromkeys(
        ("old_logprobs", "old_values", "ref_logprobs", "rewards", "advantages", "returns"), zeros
    )
    return Experience(sequences=SEQUENCES, response_mask=MASK, **{**fields, **changes})


def rollout(**changes: Any) -> Rollout:
    zeros = torch.zeros(2, 3)
    total = torch.tensor([1.0, 4.0])
    fields: dict[str, Any] = {
        "sequences": SEQUENCES,
        "finished": torch.tensor([True, False]),
        "scores": Scores(total, {"only": total}),
        "old_logprobs": torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]]),
        "ref_logprobs": torch.tensor([[-1.5, -1.0, -4.0], [-6.5, 0.0, 0.0]]),
        "old_values": zeros,
        "sampler_logprobs": torch.tensor([[-1.0, -2.3, -2.4], [-4.5, 9.0, 9.0]]),
        "prompts": ["first", [{"role": "user", "content": "second"}]],
        "responses": ["a b c", "d"],
    }
    return Rollout(**{**fields, **changes})


def policy_loss(loss: float, ratio: float, kl: float, clipped: float) -> PolicyLoss:
    return PolicyLoss(*map(torch.tensor, (loss, ratio, kl, clipped, 1.0)))


def value_loss(loss: float, clipped: float) -> ValueLoss:
    return ValueLoss(torch.tensor(loss), torch.tensor(clipped))


def test_update_metrics_are_means_over_tokens_and_losses_over_minibatches() -> None:
    """Two minibatches: one of 4 tokens cut into micro-batches of 3 and 1, one of 2 tokens."""
    sums = UpdateSums(torch.device("cpu"))
    entropy = torch.tensor([[1.0, 2.0, 3.0], [4.0, NAN, NAN]])
    # Losses of micro-batches add up to those of their minibatch: 1.5 + 0.5 and 4.
    sums.add_micro_batch(
        torch.tensor(1.5),
        policy_loss(1.0, 3.3, 0.3, 1.0),
        value_loss(0.25, 2.0),
        torch.tensor(0.1),
        entropy[:1],
        MASK[:1],
    )
    sums.add_micro_batch(
        torch.tensor(0.5),
        policy_loss(0.5, 1.1, 0.1, 0.0),
        value_loss(0.0, 1.0),
        torch.tensor(0.2),
        entropy[1:],
        MASK[1:],
    )
    sums.add_micro_batch(
        torch.tensor(4.0), policy_loss(3.0, 1.6, 0.2, 2.0), value_loss(1.0, 0.0), None, None, MASK[:1, :2]
    )
    sums.minibatches = 2
    sums.add_step(torch.tensor(2.0))
    sums.add_step(None)
    sums.add_step(torch.tensor(5.0))
    metrics = {name: value.item() for name, value in sums.metrics(experience()).items()}
    assert sums.metrics(experience(), kl_loss=True)["train/kl_loss"].item() == pytest.approx((0.1 + 0.2) / 2)
    assert metrics.pop("train/explained_variance") != 0  # of returns that are all 0: not a number
    assert metrics == pytest.approx(
        {
            "train/loss": (2.0 + 4.0) / 2,
            "train/policy_loss": (1.5 + 3.0) / 2,
            "train/value_loss": (0.25 + 1.0) / 2,
            "train/ratio": 6.0 / 3,  # of the 6 tokens, 3 were guarded and are not in these two sums
            "train/approx_kl": 0.6 / 3,
            "train/clip_fraction": 3 / 6,
            "train/guarded_fraction": 3 / 6,
            "train/stopped_early": 0,
            "train/value_clip_fraction": 3 / 6,
            "train/entropy": 10 / 6,
            "train/grad_norm": 3.5,  # of the steps that were taken
        }
    )


def test_the_mean_ratio_is_that_of_the_tokens_that_were_not_guarded() -> None:
    """Two of three tokens count, with a ratio of 1 each."""
    sums, ones = UpdateSums(torch.device("cpu")), torch.ones(3)
    part = policy_loss(0.0, 2.0, 0.5, 0.0)._replace(guarded_sum=torch.tensor(1.0))
    sums.add_micro_batch(torch.tensor(0.0), part, None, None, None, ones[None].bool())
    sums.minibatches = 1
    metrics = sums.metrics(experience(), values=False)
    assert metrics["train/ratio"] == 1
    assert metrics["train/approx_kl"] == 0.25
    assert metrics["train/guarded_fraction"] == pytest.approx(1 / 3)


def test_sums_hold_no_graph() -> None:
    sums = UpdateSums(torch.device("cpu"))
    loss = torch.tensor(1.0, requires_grad=True)
    sums.add_micro_batch(
        loss, PolicyLoss(*[loss * 2] * 5), ValueLoss(loss * 3, loss), loss * 5, loss.expand(1, 3), MASK[:1]
    )
    sums.add_step(loss * 2)
    assert not any(value.requires_grad for value in (*sums.sums.values(), sums.tokens, sums.grad_norm))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[1.0, 2.0, 3.0], [6.0, NAN, NAN]], 1.0),  # a perfect critic
        ([[5.0, 5.0, 5.0], [5.0, NAN, NAN]], 0.0),  # a constant one
        # Residuals 1, 0, 0, 1 have variance 1/4; returns 1, 2, 3, 6 have mean 3 and variance 14/4.
        ([[0.0, 2.0, 3.0], [5.0, NAN, NAN]], 1 - 1 / 14),
        ([[-1.0, -2.0, -3.0], [-6.0, NAN, NAN]], -3.0),  # residuals twice the returns
    ],
)
def test_explained_variance(values: list[list[float]], expected: float) -> None:
    returns = torch.tensor([[1.0, 2.0, 3.0], [6.0, 99.0, NAN]])
    given = experience(returns=returns, old_values=torch.tensor(values))
    assert explained_variance(given).item() == pytest.approx(expected, abs=1e-6)


def test_rollout_metrics() -> None:
    rewards = torch.tensor([[0.5, 0.25, 0.0], [4.0, 0.0, 0.0]])
    metrics = rollout_metrics(rollout(), rewards=rewards, prefix="rollout")
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "rollout/score": 2.5,
            "rollout/score_std": 1.5,
            "rollout/rewards": (0.75 + 4.0) / 2,
            "rollout/kl": ((0.5 - 1.0 + 1.0) + 2.5) / 2,  # a response's sum, averaged over responses
            "rollout/kl_per_token": 3.0 / 4,
            "rollout/response_length": 2.0,
            "rollout/finished_fraction": 0.5,
            "rollout/repetition": 0.0,
            "rollout/sampler_gap": ((0.0 + 0.3 + 0.6) / 3 + 0.5) / 2,
        }
    )


def test_repetition_counts_the_tokens_of_each_response() -> None:
    ids = torch.tensor([[9, 1, 1, 1, 1, 1, 1], [9, 1, 2, 3, 4, 5, 0]])
    sequences = SequenceBatch(ids, torch.tensor([1, 1]), torch.tensor([6, 5]))
    zeros = torch.zeros(2, 6)
    names = ("old_logprobs", "ref_logprobs", "old_values", "sampler_logprobs")
    metrics = rollout_metrics(rollout(sequences=sequences, **dict.fromkeys(names, zeros)), prefix="val")
    assert metrics["val/repetition"].item() == pytest.approx((2 / 3 + 0) / 2)


def test_the_spread_of_scores_far_from_zero_keeps_its_digits() -> None:
    """Of s - 1 and s + 1 it is 1; in float32 the squares of 20,000 have no digit left for that."""
    total = torch.tensor([19_999.0, 20_001.0])
    metrics = rollout_metrics(rollout(scores=Scores(total, {})), prefix="rollout")
    assert metrics["rollout/score_std"] == 1


def test_rollout_metrics_name_the_parts_of_a_sum() -> None:
    scores = Scores(torch.tensor([1.0, 4.0]), {"kind": torch.tensor([1.0, 2.0]), "short": torch.tensor([0.0, 1.0])})
    metrics = rollout_metrics(rollout(scores=scores), prefix="rollout")
    assert metrics["rollout/score_kind"].item() == 1.5
    assert metrics["rollout/score_short"].item() == 0.5


def test_rollout_metrics_asked_for_by_name() -> None:
    metrics = rollout_metrics(rollout(), prefix="val", names=("score", "kl"))
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx({"val/score": 2.5, "val/kl": 1.5})


def test_sample_rows_are_plain_data() -> None:
    rows = sample_rows(rollout())
    assert rows == [
        {"prompt": "first", "response": "a b c", "score": 1.0, "kl": 0.5, "length": 3, "finished": True},
        {
            "prompt": [{"role": "user", "content": "second"}],
            "response": "d",
            "score": 4.0,
            "kl": 2.5,
            "length": 1,
            "finished": False,
        },
    ]
    assert [type(value) for value in rows[0].values()] == [str, str, float, float, int, bool]


def test_stopwatch() -> None:
    profiler = SimpleProfiler()
    watch = Stopwatch(torch.device("cpu"), profiler=profiler)
    with watch("rollout"):
        time.sleep(0.02)
    with pytest.raises(ArithmeticError), watch("update"):
        raise ArithmeticError
    assert 0.02 <= watch.seconds["rollout"] < 1
    assert 0 <= watch.seconds["update"] < 0.02
    metrics = watch.metrics(tokens=100)
    assert set(metrics) == {"time/rollout_s", "time/update_s", "time/tokens_per_s"}
    total = watch.seconds["rollout"] + watch.seconds["update"]
    assert math.isclose(metrics["time/tokens_per_s"], 100 / total)
    assert set(profiler.recorded_durations) == {"ppo/rollout", "ppo/update"}


def test_stopwatch_needs_no_profiler() -> None:
    watch = Stopwatch(torch.device("cpu"))
    with watch("rollout"):
        pass
    assert set(watch.seconds) == {"rollout"}

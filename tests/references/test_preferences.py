"""Our losses on preferences and their metrics against TRL 1.16's reward, DPO and KTO trainers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.algorithm.preference_losses import (
    HingeLoss,
    IPOLoss,
    Pairs,
    PreferenceLoss,
    RobustLoss,
    SigmoidLoss,
)
from rlhf_lightning.functional.losses import preference_loss
from rlhf_lightning.functional.preference import kto_loss, kto_reference_point, length_desensitised_logprobs
from rlhf_lightning.functional.reward_losses import center_loss
from rlhf_lightning.metrics import MarginStatistics, RewardAccuracy, TieShare

Case = dict[str, Any]
Read = Callable[[str, str], Case]
CLOSE = 1e-5


@pytest.mark.parametrize("name", ["plain", "margin"])
def test_bradley_terry_loss(reference: Read, name: str) -> None:
    case = reference("reward", name)
    margin = case["margin"] if name == "margin" else 0.0
    ours = preference_loss(case["chosen_scores"], case["rejected_scores"], margin=margin).mean()
    assert ours.item() == pytest.approx(case["loss"], abs=CLOSE)


def test_bradley_terry_loss_with_the_zero_centring_term(reference: Read) -> None:
    case = reference("reward", "margin_centred")
    chosen, rejected = case["chosen_scores"], case["rejected_scores"]
    ours = preference_loss(chosen, rejected, margin=case["margin"]).mean()
    ours = ours + case["center_rewards_coefficient"] * center_loss(chosen, rejected).mean()
    assert ours.item() == pytest.approx(case["loss"], abs=CLOSE)


def test_reward_metrics_but_for_ties(reference: Read) -> None:
    case = reference("reward", "plain")
    chosen, rejected, metrics = case["chosen_scores"], case["rejected_scores"], case["metrics"]
    margins, accuracy, ties = MarginStatistics(), RewardAccuracy(), TieShare()
    for metric in (margins, accuracy, ties):
        metric.update(chosen, rejected)
    assert margins.compute()["mean"].item() == pytest.approx(metrics["margin"], abs=CLOSE)
    # One pair has equal sides, which TRL counts as wrong and we as half.
    assert ties.compute().item() == 1 / 8
    assert accuracy.compute().item() == pytest.approx(metrics["accuracy"] + ties.compute().item() / 2, abs=1e-7)
    both = torch.cat([chosen, rejected])
    assert both.mean().item() == pytest.approx(metrics["mean_reward"], abs=CLOSE)


class RecordedPairs:
    """Log-ratios and lengths of a recorded batch, chosen rows first, made by our formulas from its token log-probs."""

    def __init__(self, case: Case) -> None:
        mask = case["shift_completion_mask"].bool()
        lengths = mask.sum(1)
        self.chosen_lengths, self.rejected_lengths = lengths.chunk(2)
        alpha = case["settings"].get("ld_alpha", 1.0)
        # Responses stand behind their prompts; moved to the front, as ours do.
        order = (~mask).int().argsort(dim=1, stable=True)
        shared = torch.minimum(self.chosen_lengths, self.rejected_lengths).repeat(2)
        self.logprobs, ref = (
            length_desensitised_logprobs(
                logprobs=case[name].gather(1, order),
                response_mask=mask.gather(1, order),
                shared_lengths=shared,
                alpha=alpha,
            )
            for name in ("per_token_logps", "ref_per_token_logps")
        )
        self.chosen, self.rejected = (self.logprobs - ref).chunk(2)

    def loss(self, loss: PreferenceLoss) -> Tensor:
        """Return the mean loss."""
        return loss.loss(Pairs(self.chosen, self.rejected, self.chosen_lengths, self.rejected_lengths)).mean()


LOSSES = {
    "sigmoid": SigmoidLoss(beta=0.3),
    "label_smoothing": SigmoidLoss(beta=0.3, label_smoothing=0.1),
    "robust": RobustLoss(beta=0.3, label_smoothing=0.1),
    "hinge": HingeLoss(beta=0.3),
    "ipo": IPOLoss(beta=0.3, per_token=True),
    "length_desensitised": SigmoidLoss(beta=0.3),
}


@pytest.mark.parametrize("name", LOSSES)
def test_dpo_losses(reference: Read, name: str) -> None:
    case = reference("dpo", name)
    assert case["settings"]["beta"] == LOSSES[name].beta
    assert case["settings"].get("label_smoothing", 0.0) == getattr(LOSSES[name], "label_smoothing", 0.0)
    assert RecordedPairs(case).loss(LOSSES[name]).item() == pytest.approx(case["loss"], abs=CLOSE)


@pytest.mark.parametrize("name", LOSSES)
def test_dpo_metrics(reference: Read, name: str) -> None:
    case = reference("dpo", name)
    pairs, metrics, beta = RecordedPairs(case), case["metrics"], case["settings"]["beta"]
    chosen, rejected = beta * pairs.chosen, beta * pairs.rejected
    accuracy = RewardAccuracy()
    accuracy.update(chosen, rejected)
    assert chosen.mean().item() == pytest.approx(metrics["rewards/chosen"], abs=CLOSE)
    assert rejected.mean().item() == pytest.approx(metrics["rewards/rejected"], abs=CLOSE)
    assert (chosen - rejected).mean().item() == pytest.approx(metrics["rewards/margins"], abs=CLOSE)
    assert accuracy.compute().item() == pytest.approx(metrics["rewards/accuracies"], abs=1e-6)  # no pair is a tie
    both = pairs.logprobs.chunk(2)
    assert both[0].mean().item() == pytest.approx(metrics["logps/chosen"], abs=CLOSE)
    assert both[1].mean().item() == pytest.approx(metrics["logps/rejected"], abs=CLOSE)


def test_ipo_of_whole_responses_is_the_papers_and_not_trls(reference: Read) -> None:
    case = reference("dpo", "ipo")
    pairs = RecordedPairs(case)
    ours = pairs.loss(IPOLoss(beta=0.3))
    by_hand = ((pairs.chosen - pairs.rejected) - 1 / 0.6).square().mean()
    assert ours.item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert abs(ours.item() - case["loss"]) > 1


@pytest.mark.parametrize("name", ["plain", "weighted"])
def test_kto_loss(reference: Read, name: str) -> None:
    case = reference("kto", name)
    settings, good = case["settings"], case["bool_labels"]
    point = kto_reference_point(case["KL_logps"] - case["ref_KL_logps"])
    assert point.item() == pytest.approx(case["kl"], abs=CLOSE)
    logratios = case["completion_logps"] - case["ref_completion_logps"]
    ours = kto_loss(
        logratios=logratios,
        desirable=good,
        reference_point=point,
        beta=settings["beta"],
        desirable_weight=settings.get("desirable_weight", 1.0),
        undesirable_weight=settings.get("undesirable_weight", 1.0),
    )
    assert ours.mean().item() == pytest.approx(case["loss"], abs=CLOSE)
    rewards = settings["beta"] * logratios
    assert rewards[good].mean().item() == pytest.approx(case["metrics"]["rewards/chosen"], abs=CLOSE)
    assert rewards[~good].mean().item() == pytest.approx(case["metrics"]["rewards/rejected"], abs=CLOSE)

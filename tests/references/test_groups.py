"""Our critic-free advantages and their losses against TRL 1.16's GRPO and RLOO trainers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.functional.advantages import group_relative, leave_one_out
from rlhf_lightning.functional.kl import kl_k3
from rlhf_lightning.functional.losses import (
    fixed_length_weights,
    ppo_policy_loss,
    sequence_mean_weights,
    token_mean_weights,
)

Case = dict[str, Any]
Read = Callable[[str, str], Case]


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "scale"), [("grpo", True), ("dr_grpo", False)])
def test_group_relative_advantages(reference: Read, name: str, scale: bool) -> None:
    case = reference("grpo", name)
    close(group_relative(case["rewards"], 4, scale=scale), case["advantages"])


def test_leave_one_out_advantages(reference: Read) -> None:
    case = reference("rloo", "rloo")  # the KL to the reference is already in these rewards
    close(leave_one_out(case["rewards"], 4), case["advantages"])


def test_trls_normalised_leave_one_out_divides_by_the_unbiased_deviation(reference: Read) -> None:
    case = reference("rloo", "normalised")
    bare = leave_one_out(case["rewards"], 4)
    close((bare - bare.mean()) / (bare.std() + 1e-4), case["advantages"])


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "grpo": sequence_mean_weights,
    "dr_grpo": lambda mask: fixed_length_weights(mask, length=6),
    "bnpo": token_mean_weights,
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("step", [0, 1])
def test_losses(reference: Read, name: str, step: int) -> None:
    case = reference("grpo", name)
    each, beta = case["losses"][step], case["settings"]["beta"]
    mask, new, old = each["mask"].bool(), each["per_token_logps"], each["old_per_token_logps"]
    if step == 1:  # the second update on the same rollout
        assert ((new - old).abs() > 0.3)[mask].any()
    ours = ppo_policy_loss(
        logprobs=new,
        old_logprobs=old,
        advantages=each["advantages"].expand_as(new),
        response_mask=mask,
        clip_range=0.2,
        clip_range_high=case["settings"].get("epsilon_high"),
        token_weights=WEIGHTS[name](mask),
    ).loss
    if beta:
        kl = kl_k3(new, each["ref_per_token_logps"])
        close(kl[mask], each["per_token_kl"][mask])
        ours = ours + beta * (WEIGHTS[name](mask) * kl).sum()
    assert ours.item() == pytest.approx(each["loss"], abs=1e-5)


def test_trls_default_weighs_the_kl_in_the_loss_by_the_ratio(reference: Read) -> None:
    each = reference("grpo", "grpo_weighted_kl")["losses"][1]
    mask, new, old = each["mask"].bool(), each["per_token_logps"], each["old_per_token_logps"]
    bare = kl_k3(new, each["ref_per_token_logps"])
    close((bare * (new - old).exp())[mask], each["per_token_kl"][mask])
    assert (bare - each["per_token_kl"])[mask].abs().max() > 0.1

"""Defaults that the sources fix."""

import inspect

import torch

from rlhf_lightning.modules.ppo import PPOModule


def test_the_default_optimizer_has_the_epsilon_of_the_source() -> None:
    build = inspect.signature(PPOModule).parameters["optimizer"].default
    optimizer = build([torch.nn.Parameter(torch.zeros(1))])
    # N+: AdamW with eps 1e-5 and no decay, where torch has 1e-8 and 0.01.
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["eps"] == 1e-5
    assert optimizer.param_groups[0]["weight_decay"] == 0

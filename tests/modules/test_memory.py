"""No tensor of an earlier phase is alive in the next."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning import Trainer

from rlhf_lightning import PPOModule, PromptDataModule
from rlhf_lightning.algorithm.critics import SeparateCritic, TrunkCritic
from rlhf_lightning.modules.ppo_report import Stopwatch
from rlhf_lightning.rollout.decoding import CachedSampler

MakePPO = Callable[..., PPOModule]


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage counted once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Live bytes at the start of each phase, by its name."""
    found: dict[str, list[int]] = {}
    timed = Stopwatch.__call__

    @contextlib.contextmanager
    def noted(self: Stopwatch, phase: str) -> Iterator[None]:
        found.setdefault(phase, []).append(live_bytes())
        with timed(self, phase):
            yield

    monkeypatch.setattr(Stopwatch, "__call__", noted)
    return found


def test_only_weights_and_optimizer_state_outlive_an_iteration(
    ppo: MakePPO,
    prompts: Callable[..., PromptDataModule],
    trainer: Callable[..., Trainer],
    live: dict[str, list[int]],
) -> None:
    outside = live_bytes()
    module = ppo(sampler=CachedSampler(pack_weights=True))
    trainer(max_steps=4).fit(module, datamodule=prompts(32))
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in module.parameters() if not p.requires_grad)
    adam = 2 * trained
    assert trained > 100_000
    # What a rollout leaves behind is of another order: ids, log-probabilities and rewards of 8 short responses.
    small = 40_000
    for phase, sizes in live.items():
        assert len(sizes) == 4
        for number, size in enumerate(sizes):
            expected = outside + trained + frozen + (adam if number else 0)
            assert abs(size - expected) < small, (phase, number, size - expected)
    assert len(set(live)) == 3


def test_what_is_kept_too_long_is_seen(
    ppo: MakePPO,
    prompts: Callable[..., PromptDataModule],
    trainer: Callable[..., Trainer],
    live: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The measure itself: gradients that stay show."""
    monkeypatch.setattr("lightning.pytorch.core.optimizer.LightningOptimizer.zero_grad", nothing, raising=False)
    module = ppo(sampler=CachedSampler(pack_weights=True))
    trainer(max_steps=2).fit(module, datamodule=prompts(16))
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    first, second = live["rollout"]
    assert second - first > 2.9 * trained  # Adam's two moments and the gradients


class Held:
    """What a graph keeps for its backward pass."""

    alive = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()  # with its graph it would hold itself
        Held.alive += tensor.nbytes

    def __del__(self) -> None:
        Held.alive -= self.tensor.nbytes


@pytest.mark.parametrize(("critic", "apart"), [(SeparateCritic, True), (TrunkCritic, False)])
def test_activations_of_the_policy_are_gone_when_a_critic_of_its_own_begins(
    ppo: MakePPO,
    prompts: Callable[..., PromptDataModule],
    trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
    critic: Any,
    apart: bool,
) -> None:
    held: list[int] = []
    values = critic.values

    def noted(self: Any, *arguments: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            held.append(Held.alive)
        return torch.as_tensor(values(self, *arguments))

    monkeypatch.setattr(critic, "values", noted)
    module = ppo(critic=critic(), ppo_epochs=1)
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda holder: holder.tensor):
        trainer(max_steps=1).fit(module, datamodule=prompts())
    assert len(held) == 2
    assert all(alive == 0 if apart else alive > 100_000 for alive in held), held


def nothing(*arguments: Any, **options: Any) -> None:
    """Leave the gradients where they are."""

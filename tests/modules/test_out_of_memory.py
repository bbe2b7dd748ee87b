"""A pass that runs out of memory is tried again with fewer rows, to the same end.

No GPU is needed: passes over more tokens than a limit raise what torch raises on one, forwards or backwards; backwards
behind the head, whose gradient is there by then.
"""

import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from rlhf_lightning.algorithm.advantages import LeaveOneOut
from rlhf_lightning.algorithm.critics import SeparateCritic, TrunkCritic
from rlhf_lightning.data.collate import LabelledBatch, PairBatch, collate_sequences
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.models.packed import hidden_states_at
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.kto import KTOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.rating import RatingModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.rollout.reward_model import RewardModel

KINDS = [SFTModule, RewardModule, RatingModule, DPOModule, KTOModule]


class Memory:
    """Has room for passes of so many tokens; fails where it is told.

    Attributes:
        spared: Passes over more tokens that still fit.
        failures: Tokens of the passes that did not fit.
        autocast: Whether passes ran under autocast.
    """

    def __init__(self) -> None:
        self.room, self.where, self.user = 10_000, "forward", ""
        self.spared = 0
        self.failures: list[int] = []
        self.alive: list[weakref.ref[Tensor]] = []
        self.autocast: set[bool] = set()

    def pass_of(self, user: str) -> Callable[..., Tensor]:
        def noted(backbone: Any, batch: SequenceBatch, *places: Tensor) -> Tensor:
            tokens = int(batch.lengths.sum())
            self.autocast.add(torch.is_autocast_enabled("cpu"))
            counts = torch.is_grad_enabled() == (self.where != "scoring") and self.user in ("", user)
            if self.failures and counts:
                assert not any(ref() is not None for ref in self.alive), "a failed pass is still in memory"
            fits = tokens <= self.room or not counts
            if not fits and self.spared:
                self.spared, fits = self.spared - 1, True
            if not fits and self.where != "backward":
                self.fail(tokens)
            listening = backbone.embed_tokens.register_forward_hook(self.watch) if not fits else None
            hidden = hidden_states_at(backbone, batch, *places)
            if listening is not None:
                listening.remove()
                hidden.register_hook(lambda gradient: self.fail(tokens))
            return hidden

        return noted

    def watch(self, layer: Any, inputs: Any, output: Tensor) -> None:
        """Watch what the first layer keeps for its backward pass, which is not reached."""
        self.alive.append(weakref.ref(output))

    def fail(self, tokens: int) -> None:
        self.failures.append(tokens)
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    made = Memory()
    for user in ("causal_lm", "scalar_head"):
        monkeypatch.setattr(f"rlhf_lightning.models.{user}.hidden_states_at", made.pass_of(user))
    return made


def batches(kind: type[LightningModule], number: int = 3) -> DataLoader[Any]:
    """Batches of six rows of 4 to 9 tokens."""
    made: list[Any] = []
    for start in range(number):
        rows = [([5, 6 + start], [20 + start] * (row + 1) + [4]) for row in range(6)]
        others = [([5, 6 + start], [50 + start] * (row % 3 + 2) + [4]) for row in range(6)]
        first, second = (collate_sequences(each, pad_id=4) for each in (rows, others))
        if issubclass(kind, SFTModule):
            made.append(first)
        elif kind in (RewardModule, DPOModule):
            made.append(PairBatch(first, second, None))
        else:
            made.append(LabelledBatch(first, torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])))
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


def trained(kind: Any, model: str, trainer: Callable[..., Trainer], **settings: Any) -> tuple[Tensor, dict[str, float]]:
    torch.manual_seed(0)  # the new head of a reward model
    module = kind(model, optimizer=lambda params: torch.optim.SGD(params, lr=0.02))
    run = trainer(max_epochs=1, **settings)
    run.fit(module, batches(kind))
    moved = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    return moved, {name: float(value) for name, value in run.callback_metrics.items()}


def close(one: tuple[Tensor, dict[str, float]], other: tuple[Tensor, dict[str, float]]) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-6)
    assert one[1] == pytest.approx(other[1], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_gone_over_again_in_smaller_parts(
    kind: Any,
    where: str,
    language_model: str,
    trainer: Callable[..., Trainer],
    memory: Memory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = trained(kind, language_model, trainer)
    memory.room, memory.where = 20, where
    with caplog.at_level(logging.WARNING, "rlhf_lightning"):
        close(trained(kind, language_model, trainer), plain)
    told = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert len(told) == len(memory.failures) <= 3  # each size once, and then never again
    assert told[0].startswith(f"out of memory in a pass of up to {memory.failures[0]} tokens; it is tried again")
    assert memory.failures == sorted(set(memory.failures), reverse=True)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_under_bf16_it_is_gone_over_again_in_bf16(
    where: str, language_model: str, trainer: Callable[..., Trainer], memory: Memory
) -> None:
    memory.room, memory.where = 20, where
    trained(SFTModule, language_model, trainer, precision="bf16-mixed")
    assert memory.failures
    assert memory.autocast == {True}


def test_accumulated_gradients_stay_where_it_fails_forwards(
    language_model: str, trainer: Callable[..., Trainer], memory: Memory
) -> None:
    plain = trained(SFTModule, language_model, trainer, accumulate_grad_batches=3)
    memory.room = 20
    close(trained(SFTModule, language_model, trainer, accumulate_grad_batches=3), plain)


def test_accumulated_gradients_are_never_lost(
    language_model: str, trainer: Callable[..., Trainer], memory: Memory
) -> None:
    """Where the second batch of a window fails backwards, the first one's gradients cannot be told from its own."""

    class Later(SFTModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            memory.room = 20 if batch_idx else 10_000

    memory.where = "backward"
    with pytest.raises(torch.OutOfMemoryError):
        trained(Later, language_model, trainer, accumulate_grad_batches=2)


def test_a_row_that_does_not_fit_alone_is_an_error(
    language_model: str, trainer: Callable[..., Trainer], memory: Memory
) -> None:
    memory.room = 5
    with pytest.raises(torch.OutOfMemoryError):
        trained(SFTModule, language_model, trainer)


PARTS: dict[str, dict[str, Any]] = {
    "critic": {"critic": SeparateCritic()},
    "trunk": {"critic": TrunkCritic()},
    "none": {"critic": None, "advantages": LeaveOneOut()},
}


@pytest.mark.parametrize(
    ("parts", "where", "user"),
    [
        ("critic", "late", ""),
        ("none", "late", ""),
        ("critic", "forward", ""),
        ("critic", "backward", "causal_lm"),
        ("critic", "forward", "scalar_head"),  # when the policy's gradients are there
        ("critic", "backward", "scalar_head"),
        ("trunk", "backward", ""),
        ("none", "backward", ""),
        ("critic", "scoring", ""),
        ("none", "scoring", "causal_lm"),
    ],
)
def test_ppo_tries_again_with_smaller_micro_batches(
    parts: str,
    where: str,
    user: str,
    ppo: Callable[..., PPOModule],
    prompts: Callable[..., PromptDataModule],
    trainer: Callable[..., Trainer],
    reward_model: str,
    memory: Memory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ends: list[tuple[Tensor, dict[str, float]]] = []
    # The pass of the self-check before the update is left out: it is read without a gradient first.
    for room in (10_000, 60):
        # "late" is when micro-batches of the same minibatch have been added up: of about three, in the third pass of
        # the update (the self-check has read the six of the rollout).
        memory.room, memory.where, memory.user = room, "backward" if where == "late" else where, user
        memory.spared = {"late": 8}.get(where, 0) if room < 100 else 0
        module = ppo(
            reward=RewardModel(reward_model),
            optimizer=lambda params: torch.optim.SGD(params, lr=0.02),
            max_tokens_per_microbatch=80 if where == "late" else 2048,
            **{name: type(part)() if part is not None else None for name, part in PARTS[parts].items()},
        )
        run = trainer(max_steps=2)
        run.fit(module, datamodule=prompts(16, responses_per_prompt=4 if parts == "none" else 1))
        moved = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
        metrics = {name: float(value) for name, value in run.callback_metrics.items() if not name.startswith("time/")}
        ends.append((moved, metrics))
    assert memory.failures
    sizes = len(set(memory.failures))
    assert len(memory.failures) <= 2 * sizes  # a reward model remembers for itself
    assert caplog.text.count("out of memory in a pass of up to") == len(memory.failures)
    close(ends[1], ends[0])

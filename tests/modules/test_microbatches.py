"""A training batch in parts: the same losses, metrics and weights, whatever the cut."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from rlhf_lightning.data.collate import LabelledBatch, PairBatch, collate_sequences
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.models.packed import hidden_states_at
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.kto import KTOModule
from rlhf_lightning.modules.rating import RatingModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.sft import SFTModule

Rows = list[tuple[list[int], list[int]]]
#: Of 3 to 9 tokens; the other sides of the pairs are of other lengths.
ROWS: Rows = [([5, 6 + n], [20 + n] * (n % 5 + 1) + [4]) for n in range(12)]
OTHERS: Rows = [([5, 6 + n], [50 + n] * (n % 3 + 2) + [4]) for n in range(12)]
LABELS = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0])


def of_rows(rows: Rows) -> SequenceBatch:
    return collate_sequences(rows, pad_id=4)


def batches(kind: type[LightningModule], size: int) -> DataLoader[Any]:
    """The rows as batches for a module."""
    made: list[Any] = []
    for start in range(0, len(ROWS), size):
        place = slice(start, start + size)
        first, second = of_rows(ROWS[place]), of_rows(OTHERS[place])
        if kind is SFTModule:
            made.append(first)
        elif kind in (RewardModule, DPOModule):
            made.append(PairBatch(first, second, LABELS[place] if kind is RewardModule else None))
        else:
            made.append(LabelledBatch(first, LABELS[place]))
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


KINDS = [SFTModule, RewardModule, RatingModule, DPOModule, KTOModule]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each pass with a gradient."""
    seen: list[int] = []

    def noted(backbone: Any, batch: SequenceBatch, *places: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(int(batch.lengths.sum()))
        return hidden_states_at(backbone, batch, *places)

    for user in ("causal_lm", "scalar_head"):
        monkeypatch.setattr(f"rlhf_lightning.models.{user}.hidden_states_at", noted)
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.05}, {"accumulate_grad_batches": 3}], ids=str)
def test_the_cut_changes_nothing(
    kind: Any,
    options: dict[str, Any],
    language_model: str,
    trainer: Callable[..., Trainer],
    weights: Callable[[LightningModule], dict[str, Tensor]],
    passes: list[int],
) -> None:
    results, logged, numbers = [], [], []
    for budget in (4096, 20, 1):
        torch.manual_seed(0)  # the new head of a reward model
        arguments = {"center_coef": 0.1} if kind is RewardModule else {}
        module = kind(language_model, max_tokens_per_microbatch=budget, optimizer=sgd, **arguments)
        passes.clear()
        run = trainer(max_epochs=2, **options)
        run.fit(module, batches(kind, 4))
        assert budget == 1 or max(passes) <= budget
        numbers.append(len(passes))
        results.append(weights(module))
        logged.append({name: float(value) for name, value in run.callback_metrics.items()})
    assert numbers[0] == 6 < numbers[1] < numbers[2] == 24
    for other, metrics in zip(results[1:], logged[1:], strict=True):
        assert metrics == pytest.approx(logged[0], rel=1e-4, abs=1e-5)
        for name, tensor in results[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_whole_batch(
    kind: Any, language_model: str, trainer: Callable[..., Trainer]
) -> None:
    gradients: list[Tensor] = []

    class Probe(kind):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            gradients.append(torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None]))

    for budget in (4096, 20):
        torch.manual_seed(0)
        module = Probe(language_model, max_tokens_per_microbatch=budget, optimizer=sgd)
        trainer(max_steps=1).fit(module, batches(kind, 12))
    whole, cut = gradients
    assert whole.norm() > 1e-3
    assert (cut - whole).norm() <= 1e-5 * whole.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_bit(
    kind: Any,
    language_model: str,
    trainer: Callable[..., Trainer],
    weights: Callable[[LightningModule], dict[str, Tensor]],
) -> None:
    results, computed_again = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = kind(language_model, gradient_checkpointing=checkpointing, optimizer=sgd)
        module.configure_model()
        again: list[bool] = []
        for part in module.modules():
            if type(part).__name__ == "LlamaMLP" and next(part.parameters()).requires_grad:
                part.register_forward_pre_hook(
                    lambda *_, again=again: again.append(torch._C._current_graph_task_id() != -1)
                )
        trainer(max_steps=2).fit(module, batches(kind, 4))
        computed_again.append(any(again))
        results.append(weights(module))
    assert computed_again == [False, True]
    for name, tensor in results[0].items():
        assert torch.equal(results[1][name], tensor)


def test_in_bf16_mixed_the_parts_go_backwards_too(
    language_model: str, trainer: Callable[..., Trainer], weights: Callable[[LightningModule], dict[str, Tensor]]
) -> None:
    results = []
    for budget in (4096, 1):
        module = SFTModule(language_model, max_tokens_per_microbatch=budget, optimizer=sgd)
        trainer(max_steps=2, precision="bf16-mixed").fit(module, batches(SFTModule, 4))
        results.append(torch.cat([tensor.flatten() for tensor in weights(module).values()]))
    untrained = SFTModule(language_model)
    untrained.configure_model()
    moved = results[0] - torch.cat([tensor.flatten() for tensor in weights(untrained).values()])
    assert (results[0] - results[1]).norm() < 0.05 * moved.norm()


def test_a_budget_below_one_is_refused(language_model: str) -> None:
    for kind in KINDS:
        with pytest.raises(UserError, match="max_tokens_per_microbatch is 0; it must be at least 1"):
            kind(language_model, max_tokens_per_microbatch=0)

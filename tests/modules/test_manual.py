"""Manual optimization beside Lightning: what counts as a step, and how one is taken."""

from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer

from rlhf_lightning.modules.manual import accumulating, clip_and_step, counted_as_one_step

MakeTrainer = Callable[..., Trainer]


class Toy(LightningModule):
    """Two weights, plain gradient descent with rate 1, and a step that a test writes."""

    def __init__(self, step: Callable[["Toy", LightningOptimizer], object]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weights = torch.nn.Parameter(torch.zeros(2))
        self.step = step
        self.results: list[object] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        self.results.append(self.step(self, optimizer))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weights], lr=1.0)


def fit(trainer: Trainer, step: Callable[[Toy, LightningOptimizer], object], batches: int = 1) -> Toy:
    module = Toy(step)
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(batches)))  # type: ignore[arg-type]
    return module


def three_steps(module: Toy, optimizer: LightningOptimizer) -> None:
    for _ in range(3):
        module.weights.grad = torch.ones(2)
        optimizer.step()


def three_counted_as_one(module: Toy, optimizer: LightningOptimizer) -> None:
    with counted_as_one_step(optimizer):
        three_steps(module, optimizer)


def test_lightning_counts_every_step_by_itself(trainer: MakeTrainer) -> None:
    """What the helper is for; where this fails, Lightning has changed and the helper may go."""
    run = trainer(max_epochs=1)
    fit(run, three_steps, batches=4)
    assert run.global_step == 12


def test_counted_as_one_step(trainer: MakeTrainer) -> None:
    run = trainer(max_epochs=1)
    module = fit(run, three_counted_as_one, batches=4)
    assert run.global_step == 4
    progress = run.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
    assert (progress.ready, progress.completed) == (4, 4)  # what checkpoints hold
    assert module.weights.tolist() == [-12.0, -12.0]  # all of them were taken


def test_max_steps_ends_after_as_many_blocks(trainer: MakeTrainer) -> None:
    run = trainer(max_steps=3)
    module = fit(run, three_counted_as_one, batches=10)
    assert (run.global_step, len(module.results)) == (3, 3)


def test_a_block_that_fails_counts_nothing_and_leaves_lightnings_hooks(trainer: MakeTrainer) -> None:
    def step(module: Toy, optimizer: LightningOptimizer) -> None:
        def failing() -> None:
            with counted_as_one_step(optimizer):
                optimizer.step()
                raise ArithmeticError

        with pytest.raises(ArithmeticError):
            failing()
        optimizer.step()

    run = trainer(max_epochs=1)
    fit(run, step)
    assert run.global_step == 1


@pytest.mark.parametrize(
    ("max_norm", "expected"),
    [
        (1.0, [-0.6, -0.8]),  # (3, 4) has norm 5 and is scaled to norm 1
        (10.0, [-3.0, -4.0]),
        (None, [-3.0, -4.0]),
    ],
)
def test_clip_and_step(trainer: MakeTrainer, max_norm: float | None, expected: list[float]) -> None:
    def step(module: Toy, optimizer: LightningOptimizer) -> torch.Tensor | None:
        module.weights.grad = torch.tensor([3.0, 4.0])
        return clip_and_step(optimizer, [module.weights], max_norm)

    module = fit(trainer(max_epochs=1), step)
    assert module.results == [torch.tensor(5.0)]  # the norm from before
    torch.testing.assert_close(module.weights.detach(), torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("max_norm", [1.0, None])
def test_no_step_on_a_gradient_that_is_not_finite(trainer: MakeTrainer, bad: float, max_norm: float | None) -> None:
    def step(module: Toy, optimizer: LightningOptimizer) -> torch.Tensor | None:
        module.weights.grad = torch.tensor([bad, 1.0])
        return clip_and_step(optimizer, [module.weights], max_norm)

    module = fit(trainer(max_epochs=1), step)
    assert module.results == [None]
    assert module.weights.tolist() == [0.0, 0.0]


def test_autocast_does_not_remember_the_weights_from_before_a_step(trainer: MakeTrainer) -> None:
    def step(module: Toy, optimizer: LightningOptimizer) -> list[float]:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
            before = torch.nn.functional.linear(torch.ones(2), module.weights)
            module.weights.grad = torch.ones(2)
            clip_and_step(optimizer, [module.weights], None)
            after = torch.nn.functional.linear(torch.ones(2), module.weights)
        return [before.item(), after.item()]

    module = fit(trainer(max_epochs=1), step)
    assert module.results == [[0.0, -2.0]]


def test_accumulating_needs_no_processes(trainer: MakeTrainer) -> None:
    """A strategy for one process has nothing to exchange; two processes are in test_ppo."""

    def step(module: Toy, optimizer: LightningOptimizer) -> None:
        for number in range(2):
            with accumulating(module, last=number == 1):
                module.manual_backward((module.weights * torch.tensor([1.0, 2.0])).sum())
        optimizer.step()

    module = fit(trainer(max_epochs=1), step)
    assert module.weights.tolist() == [-2.0, -4.0]

"""The two places where manual optimization has to reach into Lightning, each guarded by a test."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer

from rlhf_lightning.modules.nonfinite import gradient_norm


@contextlib.contextmanager
def counted_as_one_step(optimizer: LightningOptimizer) -> Iterator[None]:
    """Let Lightning count all optimizer steps inside as one.

    ``trainer.global_step`` then counts iterations, and so ``max_steps``, ``every_n_train_steps`` and ``fast_dev_run``
    mean iterations. It rests on two private hooks of Lightning's optimizer wrapper, which Lightning sets anew each
    batch.
    """
    before, after = optimizer._on_before_step, optimizer._on_after_step
    optimizer._on_before_step = optimizer._on_after_step = _nothing
    try:
        yield
    finally:
        optimizer._on_before_step, optimizer._on_after_step = before, after
    before()
    after()


def clip_and_step(
    optimizer: LightningOptimizer,
    parameters: list[torch.nn.Parameter],
    max_norm: float | None,
    *,
    admits: Callable[[torch.Tensor], bool] = lambda norm: bool(torch.isfinite(norm)),
) -> torch.Tensor | None:
    """Clip the gradients by their common norm, step, and return the norm from before.

    Args:
        optimizer: Lightning's wrapper, so that precision plugins keep working.
        parameters: What is trained.
        max_norm: Largest norm; ``None`` leaves the gradients as they are.
        admits: Told the norm, before gradients are clipped; says whether the step is to be taken.

    Returns:
        The norm, a scalar; ``None`` where no step was taken.
    """
    norm = gradient_norm(parameters)
    if not admits(norm):
        return None
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    optimizer.step()
    # Autocast may keep low-precision copies of the weights; after a step they are of yesterday.
    torch.clear_autocast_cache()
    return norm


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for a hook."""


@contextlib.contextmanager
def accumulating(module: LightningModule, *, last: bool) -> Iterator[None]:
    """Let processes exchange gradients only in the last backward pass of a minibatch."""
    block = getattr(module.trainer.strategy, "block_backward_sync", None)
    with contextlib.nullcontext() if last or block is None else block():
        yield

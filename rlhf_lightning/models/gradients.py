"""Gradients of large weights, added to ``.grad`` where they arise.

Autograd makes a tensor of the weight's size in each backward pass and then adds it; of a word embedding most of it is
zeros. Where a step has several passes, or head and embedding share their weight, that is most of what they cost.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding

_ADDING: ContextVar[bool] = ContextVar("whether gradients are added to .grad where they arise", default=False)


@contextmanager
def adding_in_place() -> Iterator[None]:
    """Let backward passes add to ``.grad`` themselves, while this lasts, where nobody waits for the gradient.

    Processes that exchange gradients wait for them: not with those.
    """
    token = _ADDING.set(True)
    try:
        yield
    finally:
        _ADDING.reset(token)


class WeightGradient:
    """The gradient of a weight, summed up product by product.

    Args:
        weight: Shape (rows, columns).
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._in_place = weight, _may_add(weight)
        self._begun = set[int]()  # rows that hold a sum, by their first
        known = weight.grad if self._in_place else None
        self._holds_all = known is not None
        self._total = torch.empty_like(weight) if known is None else known

    def add_product(self, rows: slice, a: Tensor, b: Tensor) -> None:
        """Add a · b to some rows; between two calls rows are the same or have none in common, and in the end all."""
        part = self._total[rows]
        if self._holds_all or rows.start in self._begun:
            add_product(part, a, b)
            return
        self._begun.add(rows.start)
        if part.dtype == a.dtype:
            torch.mm(a, b, out=part)
        else:
            part.copy_(a @ b)

    def result(self) -> Tensor | None:
        """Return what autograd is to add to the gradient: nothing where that is done, or nothing was added up."""
        if not self._holds_all and not self._begun:
            return None
        if not self._in_place:
            return self._total
        self._weight.grad = self._total
        return None


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a · b to a total, without a tensor of its size in between where the types agree."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


@contextmanager
def embedding_in_place(model: Any) -> Iterator[None]:
    """Let the word embedding of a model add its gradient in place, while its forward pass lasts.

    Args:
        model: A model of transformers.
    """
    words = model.get_input_embeddings()
    if type(words) is not nn.Embedding or words.sparse or words.scale_grad_by_freq or words.max_norm is not None:
        yield
        return

    vars(words)["forward"] = lambda ids: _Embedding.apply(words.weight, ids, words.padding_idx)
    try:
        yield
    finally:
        del vars(words)["forward"]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(weight, ids)
        ctx.padding = padding
        return embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, None, None]:
        weight, ids = ctx.saved_tensors
        if not _may_add(weight):
            padding = -1 if ctx.padding is None else ctx.padding
            whole = torch.ops.aten.embedding_dense_backward(slopes, ids, len(weight), padding, False)
            return whole.to(weight.dtype), None, None
        if ctx.padding is not None:
            slopes = slopes.masked_fill((ids == ctx.padding)[..., None], 0.0)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids.flatten(), slopes.reshape(-1, slopes.shape[-1]).to(weight.dtype))
        return None, None, None


def _may_add(weight: Tensor) -> bool:
    """Tell whether nobody looks at the gradient on its way: a leaf on a processor, without hooks."""
    hooks = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    return _ADDING.get() and weight.is_leaf and weight.requires_grad and weight.device.type == "cpu" and not hooks

"""Linear layers whose weights are repacked for the processor's matrix product while a model samples."""

import contextlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf_lightning.models.lora import is_adapted, is_linear, is_transposed, merged_weight

#: Weights with fewer numbers stay plain: a packed product costs some microseconds more to call.
SMALLEST = 2**15


class PackedLinears:
    """Runs a model's linear layers with weights packed by oneDNN, on a processor and in float32; others stay plain.

    Decoding multiplies few rows by large weights, which the plain product does at a fraction of the machine's speed.
    The packed product also gives a row the same bits whatever rows stand beside it. Costs a second copy of the weights
    of the linear layers for as long as it is kept, and about as much time as a few decoding steps to make.
    """

    def __init__(self) -> None:
        self._packed: dict[nn.Module, Tensor] = {}
        self._version: int | None = None

    @contextlib.contextmanager
    def applied(self, model: nn.Module, version: int | None = None) -> Iterator[None]:
        """Exchange the layers' forward; the model comes out as it went in, its parameters untouched.

        Args:
            model: Whose layers to exchange; nothing may be differentiated meanwhile.
            version: Of the weights; what was packed under the same one is used again. ``None`` packs anew: fused
                optimizers write to weights without a trace, so that nothing else tells.
        """
        if version is None or version != self._version:
            self.release()
        self._version = version
        exchanged = [layer for layer in _outermost(model) if can_be_packed(layer)] if packing_works() else []
        try:
            for module in exchanged:
                module.forward = self._packed_forward(module)
            yield
        finally:
            for module in exchanged:
                module.__dict__.pop("forward", None)

    def release(self) -> None:
        """Free the packed weights."""
        self._packed.clear()

    def _packed_forward(self, module: Any) -> Callable[[Tensor], Tensor]:
        if module not in self._packed:
            self._packed[module] = _pack(module)
        packed, bias, product = self._packed[module], module.bias, torch.ops.mkldnn._linear_pointwise.default
        return lambda x: product(x, packed, bias, "none", [], "")


def can_be_packed(module: nn.Module) -> bool:
    """Tell whether a module is a plain linear layer in float32 on a processor, and large enough.

    Args:
        module: Any; what only derives from a linear layer, such as a quantised or parametrised one, is not plain. One
            with an adapter is packed with it.
    """
    if "forward" in module.__dict__ or not is_linear(getattr(module, "base_layer", module)):
        return False
    weight = cast("Tensor", module.weight)
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() >= SMALLEST


@lru_cache(maxsize=1)
def packing_works() -> bool:
    """Tell whether this build of PyTorch has oneDNN's packed product; the operations are private, so it is tried."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight, bias = torch.ones(3, 4), torch.arange(20.0).view(5, 4), torch.ones(5)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        output = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    return torch.allclose(output, x @ weight.T + bias)


def _outermost(model: nn.Module) -> Iterator[nn.Module]:
    """Yield all modules but those within a layer that has an adapter, which is packed as one, merged."""
    yield model
    for child in () if is_adapted(model) else model.children():
        yield from _outermost(child)


@torch.no_grad()
def _pack(module: Any) -> Tensor:
    weight = merged_weight(module) if is_adapted(module) else module.weight.detach()
    weight = weight.t() if is_transposed(getattr(module, "base_layer", module)) else weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)

"""What a forward pass costs, found by running it on tensors without data."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_lightning.models.lora import LoRA, adapted_layers, add_adapters
from rlhf_lightning.models.packed import Layout, attending_apart, checkpoint_activations
from rlhf_lightning.rollout.linear import SMALLEST

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Trace:
    """One model and one forward pass of its backbone.

    Attributes:
        parameters: Numbers in its weights, shared ones once, those of adapters among them.
        trained: Of them, those that are trained: all, or adapters and a scalar head.
        linear: Of them, those of large linear layers, which sampling packs on a processor.
        embedding: Numbers of its word embedding.
        hidden: Size of a hidden state.
        layers: Blocks of the backbone.
        kept: Bytes that the pass keeps for its backward pass.
        flops: Floating-point operations of the matrix products.
    """

    parameters: int
    trained: int
    linear: int
    embedding: int
    hidden: int
    layers: int
    kept: int
    flops: float


def trace(
    config: "PretrainedConfig",
    *,
    scalar: bool,
    rows: int,
    length: int,
    mixed: bool,
    checkpointed: bool = False,
    lora: LoRA | None = None,
) -> Trace:
    """Run a model's backbone on fake tensors: nothing is loaded, allocated or computed.

    Args:
        config: The model's.
        scalar: True for a reward model or a critic, whose head has one output.
        rows: Sequences of the pass.
        length: Tokens of each.
        mixed: True for bf16-mixed, False for float32.
        checkpointed: Whether activations are computed again backwards, one layer at a time.
        lora: Adapters that it gets.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    factory = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    layers = int(getattr(config, "num_hidden_layers", 0))
    fake: Any = FakeTensorMode()
    with fake, torch.device("cpu"):
        model: Any = factory.from_config(config, dtype=torch.float32, trust_remote_code=False).train()
    if lora is not None:
        _add_empty_adapters(model, lora, fake)
    with fake, torch.device("cpu"):
        ids = torch.zeros(rows, length, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext():
            with FlopCounterMode(display=False) as counter:
                kept = _kept(model, ids)
            if checkpointed:
                checkpoint_activations(model)
                kept = _kept(model, ids) + kept // max(1, layers)
    embedding = model.get_input_embeddings().weight
    return Trace(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        linear=sum(_packed_numbers(name, module) for name, module in model.named_modules()),
        embedding=embedding.numel(),
        hidden=embedding.shape[1],
        layers=layers,
        kept=kept,
        flops=float(counter.get_total_flops()),
    )


def optimizer_bytes(factory: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> float:
    """Return the bytes of state that an optimizer keeps for each number of a float32 weight, found by one step.

    Example:
        >>> optimizer_bytes(lambda weights: torch.optim.AdamW(weights, lr=0.1))
        8.0
    """
    weight = nn.Parameter(torch.zeros(512, 512))  # large enough that tables of a fixed size do not count
    optimizer = factory([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    tensors = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor) and value.dim()]
    return sum(tensor.nbytes for tensor in tensors) / weight.numel()


def _kept(model: Any, ids: Tensor) -> int:
    """Return the bytes that a pass keeps for its backward pass, weights apart."""
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # what lies in a storage that is freed could share its number with a later one

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, _same):
        _run(model, ids)
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    return sum(kept.values())


def _run(model: Any, ids: Tensor) -> None:
    """Run the backbone, packed where its attention is ``sdpa``: fake tensors would have transformers make a mask."""
    if model.config._attn_implementation != "sdpa":
        model.base_model(input_ids=ids, use_cache=False)
        return
    rows, length = ids.shape
    positions = torch.arange(length).repeat(rows)[None]
    with attending_apart(model.config, Layout.of_sequences([length] * rows)):
        model.base_model(input_ids=ids.view(1, -1), position_ids=positions, use_cache=False)


def _add_empty_adapters(model: Any, lora: LoRA, fake: Any) -> None:
    """Add adapters without data; peft moves them about, which fake tensors do not bear."""
    with torch.device("meta"):
        add_adapters(model, lora)
    for layer in adapted_layers(model).values():
        for half in (*layer.lora_A.values(), *layer.lora_B.values()):
            with fake, torch.device("cpu"):
                half.weight = nn.Parameter(torch.empty(half.weight.shape))


def _packed_numbers(name: str, module: nn.Module) -> int:
    """Numbers that sampling packs of a layer; an adapter is packed with the layer that it belongs to."""
    plain = type(module) is nn.Linear and ".lora_" not in name
    numbers = int(module.weight.numel()) if plain else 0  # type: ignore[operator]
    return numbers if numbers >= SMALLEST else 0


def _same(tensor: Tensor) -> Tensor:
    return tensor

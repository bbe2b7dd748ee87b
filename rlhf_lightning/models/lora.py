"""Low-rank adapters: a model is trained by small matrices beside its frozen linear layers, and read without them."""

import copy
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

M = TypeVar("M", bound=nn.Module)

_NAME = "default"


@dataclass
class LoRA:
    """Adapters of a model: a linear layer W of d inputs learns W + alpha/rank · B A, where only A and B are trained.

    B starts at zero, so that the model begins as it was. Needs the package peft: ``pip install rlhf_lightning[lora]``.
    There is no dropout, as PPO compares two passes.

    Args:
        rank: Rows of A and columns of B, at least 1; higher can learn more, for more weights and optimizer state.
        alpha: Over the rank it is the weight of B A, above 0; higher learns faster. Adapters want about ten times the
            learning rate of full training.
        target_modules: Names of the layers that get adapters, such as ``[q_proj, v_proj]``, or ends of their full
            names; ``None`` takes all linear layers but the head.

    References:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; Schulman et al. 2025, "LoRA Without
        Regret" (all layers, alpha 32, the learning rate).
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range, and an installation without peft."""
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}; it must be at least 1.")
        if not self.alpha > 0:
            raise UserError(f"lora.alpha is {self.alpha}; it must be above 0.")
        if self.target_modules is not None and not self.target_modules:
            raise UserError("lora.target_modules is empty; name at least one, or leave it out for all linear layers.")
        if importlib.util.find_spec("peft") is None:
            raise UserError("lora needs the package peft; install it by: pip install 'rlhf_lightning[lora]'.")


def add_adapters(model: "PreTrainedModel", lora: LoRA | None) -> "PreTrainedModel":
    """Freeze a model and give it adapters, in place; a scalar head of its own stays trainable.

    Args:
        model: A causal language model, or a sequence classifier, of transformers.
        lora: The adapters; ``None`` leaves the model as it is.

    Returns:
        The model, still of its own class.

    Raises:
        UserError: If a target is no linear layer of the model.
    """
    if lora is None:
        return model
    from peft import LoraConfig, inject_adapter_in_model

    names = _targets(model, lora.target_modules)
    transposed = {is_transposed(model.get_submodule(name)) for name in names}
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=names,
        fan_in_fan_out=transposed == {True},
    )
    inject_adapter_in_model(config, model, adapter_name=_NAME)
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
    return model


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a plain linear layer; what only derives from one, such as a quantised one, is not."""
    return type(module) is nn.Linear or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Tell whether a layer holds the transpose of a linear layer's weight, as GPT-2's do."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_adapted(module: nn.Module) -> bool:
    """Tell whether a layer has an adapter."""
    return hasattr(module, "base_layer") and hasattr(module, "get_delta_weight")


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if is_adapted(module)}


def adapter_settings(model: nn.Module) -> dict[str, list[float]]:
    """Return rank and alpha of each adapter of a module, by the name of its layer; plain data, for checkpoints."""
    layers = adapted_layers(model).items()
    return {name: [layer.r[_NAME], float(layer.lora_alpha[_NAME])] for name, layer in layers}


def describe_adapters(settings: dict[str, list[float]]) -> str:
    """Say in words what :func:`adapter_settings` said.

    Example:
        >>> describe_adapters({"policy.q_proj": [8, 16.0], "policy.v_proj": [8, 16.0]})
        'adapters of rank 8 and alpha 16 on 2 layers'
    """
    kinds = sorted({(rank, alpha) for rank, alpha in settings.values()})
    counts = {kind: sum(tuple(setting) == kind for setting in settings.values()) for kind in kinds}
    told = [f"rank {rank:g} and alpha {alpha:g} on {counts[rank, alpha]} layers" for rank, alpha in kinds]
    return f"adapters of {', '.join(told)}" if told else "no adapters"


def lora_of_settings(settings: dict[str, list[float]]) -> LoRA | None:
    """Return the adapters of one model from what :func:`adapter_settings` said of it."""
    if not settings:
        return None
    rank, alpha = next(iter(settings.values()))
    return LoRA(rank=int(rank), alpha=alpha, target_modules=list(settings))


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """Return the weight of an adapted layer with its adapter added, of the shape of the layer's own."""
    weight: Tensor = layer.base_layer.weight
    with torch.autocast(weight.device.type, enabled=False):
        return weight + layer.get_delta_weight(_NAME)


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of the model without adapters that equals this one, by the names that they have there."""
    layers = adapted_layers(model)
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        layer = layers.get(owner.removesuffix(".base_layer"))
        if layer is not None:
            plain = f"{owner.removesuffix('.base_layer')}.{kind}"
            yield plain, merged_weight(layer) if kind == "weight" else parameter
        elif ".lora_" not in name:
            yield name, parameter


def merged(model: M) -> M:
    """Return a model without adapters that equals this one; it shares the weights of all layers that have none."""
    return _without_adapters(model, merge=True) if adapted_layers(model) else model


def before_adapters(model: M) -> M:
    """Return the model as it was before its adapters, over the same frozen weights: a reference without a copy."""
    return _without_adapters(model, merge=False)


def share_frozen_weights(module: nn.Module) -> None:
    """Let the models within a module share those weights of their backbones that are frozen and equal, in place.

    So a critic with adapters takes no memory for the reward model, or the policy, that it starts from.
    """
    kept: dict[str, list[nn.Parameter]] = {}
    models: list[Any] = [part for part in module.modules() if getattr(part, "base_model", part) is not part]
    for backbone in (model.base_model for model in models):
        for name, parameter in list(backbone.named_parameters()):
            if parameter.requires_grad:
                continue
            known = kept.setdefault(name.replace(".base_layer.", "."), [])
            twin = next((weight for weight in known if _same_numbers(weight, parameter)), None)
            if twin is None:
                known.append(parameter)
            else:
                owner, _, kind = name.rpartition(".")
                setattr(backbone.get_submodule(owner), kind, twin)
    for model in models:
        model.tie_weights()  # a head that was one with the embedding


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and one.device == other.device and torch.equal(one, other))


def _without_adapters(model: M, *, merge: bool) -> M:
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    plain = copy.deepcopy(model, shared)
    for name, layer in adapted_layers(plain).items():
        base = layer.base_layer
        if merge:
            base.weight = nn.Parameter(merged_weight(layer), requires_grad=False)
        plain.set_submodule(name, base)
    vars(plain).pop("peft_config", None)
    return plain


def _targets(model: "PreTrainedModel", wanted: list[str] | None) -> list[str]:
    """Return the full names of the layers that are to get adapters."""
    prefix, kind = model.base_model_prefix, type(model).__name__
    found = [f"{prefix}.{name}" for name, module in model.base_model.named_modules() if is_linear(module)]
    if not found:
        raise UserError(f"lora: {kind} has no linear layer that could get an adapter; leave lora out.")
    for target in wanted or []:
        if not any(_ends_with(name, target) for name in found):
            known = sorted({name.rpartition(".")[2] for name in found})
            raise UserError(
                f"lora.target_modules: {target!r} is no linear layer of {kind}.{did_you_mean(target, known)} "
                f"It has {', '.join(known)}."
            )
    return [name for name in found if wanted is None or any(_ends_with(name, target) for target in wanted)]


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")

"""What a checkpoint says of the run that wrote it: its parts, its data, the machine and the versions."""

import inspect
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

if TYPE_CHECKING:
    from rlhf_lightning.modules.base import ModelModule

_VERSIONS = ("torch", "lightning", "transformers")
_MODELS = ("transformers.", "peft.", "torch.nn.")  # weights, which are no settings
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LONGEST_HEAD = 100_000  # letters of a card that may hold its metadata


def training_record(module: "ModelModule") -> dict[str, Any]:
    """Describe the run of a module, as far as its config need not tell.

    Args:
        module: In training, its models made.

    Returns:
        Strings, numbers, lists and dicts alone: ``versions`` by package; ``hardware``, its kind and number, and no name
        of a machine; ``precision``; ``start``, the model's ``name`` as it was given and the ``hub`` name that it goes
        back to, ``None`` where it was trained from scratch or that is unknown; ``parameters`` that were ``trained``,
        and those ``exported``; ``parts``, the objects that the module was given or made by default, with their
        arguments; ``data``: ``source``, ``val_source``, ``counts`` of rows and ``digest`` of the training rows.
    """
    from rlhf_lightning import __version__

    trainer = module.trainer
    trained = {id(p): p.numel() for p in module.parameters() if p.requires_grad}
    return {
        "versions": {"rlhf_lightning": __version__, **{name: version(name) for name in _VERSIONS}},
        "hardware": _hardware(module.device, trainer.world_size),
        "precision": str(trainer.precision),
        "start": {"name": module.model_name, "hub": _hub_origin(module)},
        "parameters": {
            "trained": sum(trained.values()),
            "exported": sum(p.numel() for name, p in module.exported_model.named_parameters() if "lora_" not in name),
        },
        "parts": _parts(module),
        "data": _data(getattr(trainer, "datamodule", None)),
    }


def _hardware(device: torch.device, processes: int) -> str:
    kind = f"processor ({platform.machine()})"
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    elif device.type != "cpu":
        kind = device.type
    return f"{processes} × {kind}"


def _hub_origin(module: "ModelModule") -> str | None:
    """Return the hub name of the model that training began with, or that the card in its folder goes back to."""
    if not getattr(module, "pretrained", True) or module.model_name.startswith("builtin:"):
        return None
    folder = Path(module.model_name).expanduser()
    name = _base_of_card(folder / "README.md") if folder.is_dir() else module.model_name
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) else None


def _base_of_card(card: Path) -> Any:
    """Return what a model card names as its base model; ``None`` where it names none, or is no card."""
    try:
        head = re.match(r"\s*---\n(.*?)\n---", card.read_text(encoding="utf-8")[:_LONGEST_HEAD], flags=re.DOTALL)
        return yaml.safe_load(head[1]).get("base_model") if head else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        return None


def _parts(module: "ModelModule") -> dict[str, Any]:
    found = {name: _described(getattr(module, name, None)) for name in _arguments(module)}
    optimizers, schedules = module.trainer.optimizers, module.trainer.lr_scheduler_configs
    found["optimizer"] = _optimizer(optimizers[0]) if optimizers else None
    found["lr_scheduler"] = _described(schedules[0].scheduler) if schedules else None
    return {name: part for name, part in found.items() if isinstance(part, dict)}


def _optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Describe an optimizer by the arguments that it was made with; a schedule changes its groups, not these."""
    cls = type(optimizer)
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": _described(dict(optimizer.defaults))}


def _described(value: Any) -> Any:
    """Return plain data as it is, an object as its class with its arguments; ``None`` for what is neither."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _described(item) for name, item in value.items()}
    cls = type(value)
    if isinstance(value, torch.Tensor | type) or inspect.isroutine(value) or cls.__module__.startswith(_MODELS):
        return None
    arguments = {name: _described(getattr(value, name)) for name in _arguments(value) if hasattr(value, name)}
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}


def _arguments(value: Any) -> list[str]:
    return [name for name in inspect.signature(type(value).__init__).parameters if name != "self"]


def _data(datamodule: Any) -> dict[str, Any]:
    if datamodule is None:
        return {}
    found = {name: getattr(datamodule, name, None) for name in ("source", "val_source")}
    stream = datamodule.state_dict().get("stream", {})
    return {
        **{name: value for name, value in found.items() if isinstance(value, str)},
        "counts": {str(name): int(n) for name, n in getattr(datamodule, "counts", {}).items() if n},
        "digest": stream.get("digest"),
    }

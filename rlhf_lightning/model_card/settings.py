"""Which settings of a run a reader wants to know: those that matter, and those that are not the default."""

import importlib
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from rlhf_lightning.model_card.records import RunRecords, arguments_of

#: Shown whatever their value is.
_MATTER = {
    *("policy", "model", "reward", "path", "function", "lr", "ppo_epochs", "minibatch_size", "max_grad_norm", "coef"),
    *("estimator", "gamma", "gae_lambda", "clip_range", "temperature", "max_new_tokens", "beta", "label_smoothing"),
    *("rollout_batch_size", "responses_per_prompt", "max_length", "max_prompt_length"),
}
#: What has an effect on speed and memory alone, or says where something is kept.
_OF_NO_EFFECT = {
    *("max_tokens_per_microbatch", "gradient_checkpointing", "offload_frozen", "max_nonfinite", "fused", "foreach"),
    *("capturable", "token_cache", "reference_cache", "val_batch_size", "batch_size_of_scoring", "sampler"),
}
#: Of the Trainer's arguments, those that change the result; each with the value that is no news.
_TRAINER = {
    "max_epochs": -1,
    "max_steps": -1,
    "limit_train_batches": 1.0,
    "overfit_batches": 0.0,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": 0,
    "precision": None,
}


def setting_rows(records: RunRecords) -> list[tuple[str, str]]:
    """Return name and value of the settings to be shown, as in the config, in its order."""
    settings = records.settings
    model = {"class_path": _class_path(settings.get("model")), "init_args": records.model_settings}
    data = {"class_path": _class_path(settings.get("data")), "init_args": records.data_settings}
    rows = [*_rows("model", model), *_rows("data", data)]
    trainer = arguments_of(settings.get("trainer"))
    rows += [
        (f"trainer.{key}", trainer[key]) for key, usual in _TRAINER.items() if trainer.get(key) not in (None, usual)
    ]
    rows += [(key, settings[key]) for key in ("seed_everything",) if isinstance(settings.get(key), int)]
    return [(name, written_value(value)) for name, value in rows]


def written_value(value: Any) -> str:
    """Write a value of a config as the config has it.

    Example:
        >>> written_value([0.9, 0.95]), written_value(True), written_value("a b"), written_value(None)
        ('[0.9, 0.95]', 'true', 'a b', 'null')
    """
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(written_value, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {written_value(item)}" for key, item in value.items()) + "}"
    return str(value)


def classes_of(value: Any) -> Iterator[str]:
    """Yield the path of each class that a config names, the outer ones first."""
    if isinstance(value, Mapping):
        if isinstance(value.get("class_path"), str):
            yield value["class_path"]
        for item in value.values():
            yield from classes_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from classes_of(item)


@cache
def own_class(path: str) -> type | None:
    """Return a class of this package or one of torch's optimizers; ``None`` for all else, which is not imported.

    A config beside a checkpoint may come from a stranger, and importing a module runs it.

    Example:
        >>> own_class("rlhf_lightning.PPOModule").__name__, own_class("os.path")
        ('PPOModule', None)
    """
    module, _, name = path.rpartition(".")
    if not f"{module}.".startswith(("rlhf_lightning.", "torch.optim.")):
        return None
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None
    return found if isinstance(found, type) else None


def _class_path(value: Any) -> str:
    return str(value.get("class_path") or "") if isinstance(value, Mapping) else ""


def _rows(prefix: str, part: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a class and of the objects that it is given."""
    defaults = _defaults(str(part["class_path"]))
    for name, value in arguments_of(part).items():
        key = f"{prefix}.{name}"
        if name in _OF_NO_EFFECT or value is None:
            continue
        if isinstance(value, Mapping) and "class_path" in value:
            yield key, str(value["class_path"]).rpartition(".")[2]
            yield from _rows(key, value)
        elif isinstance(value, list) and any(isinstance(item, Mapping) and "class_path" in item for item in value):
            yield from _listed(key, value)
        elif isinstance(value, Mapping) and _is_object(defaults.get(name)):
            inner = type(defaults[name])
            path = f"{inner.__module__}.{inner.__qualname__}"
            yield from _rows(key, {"class_path": path, "init_args": value})
        elif name in _MATTER or key == "data.batch_size" or value != defaults.get(name, inspect.Parameter.empty):
            yield key, value


def _listed(key: str, parts: list[Any]) -> Iterator[tuple[str, Any]]:
    for number, part in enumerate(parts):
        if isinstance(part, Mapping) and "class_path" in part:
            yield f"{key}[{number}]", str(part["class_path"]).rpartition(".")[2]
            yield from _rows(f"{key}[{number}]", part)


def _is_object(value: Any) -> bool:
    return type(value).__module__.startswith("rlhf_lightning.")


def _defaults(path: str) -> dict[str, Any]:
    cls = own_class(path)
    if cls is None:
        return {}
    # The nearest class wins; those behind it are asked for what it passes on. A config has lists in place of tuples.
    asked = [own for own in reversed(cls.__mro__) if "__init__" in vars(own) and own is not object]
    given = [p for own in asked for p in inspect.signature(vars(own)["__init__"]).parameters.values()]
    return {p.name: list(p.default) if isinstance(p.default, tuple) else p.default for p in given}

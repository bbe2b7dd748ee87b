"""What the types of a config's arguments take: in words, as names of classes, and whether null is among it."""

import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

import jsonargparse

_READABLE = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def known_classes(typehint: Any) -> list[str]:
    """Return the short names of the classes that a key of this type may name, ours first.

    Example:
        >>> known_classes(inspect.Parameter | None)
        ['Parameter']
    """
    found: dict[str, bool] = {}
    queue = list(_classes_in(typehint))
    while queue:
        cls = queue.pop()
        queue.extend(type.__subclasses__(cls))
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            ours = cls.__module__.startswith("rlhf_lightning")
            found[cls.__name__] = found.get(cls.__name__, False) or ours
    return sorted(found, key=lambda name: (not found[name], name))


def _classes_in(typehint: Any) -> Iterator[type]:
    if isinstance(typehint, type) and not typing.get_args(typehint):
        if typehint.__module__ not in ("builtins", "collections.abc") and typehint.__name__ != "Tensor":
            yield typehint
        return
    parts = typing.get_args(typehint)
    callable_type = typing.get_origin(typehint) is not None and "Callable" in str(typing.get_origin(typehint))
    for part in parts[-1:] if callable_type else parts:
        yield from _classes_in(part)


def readable_type(typehint: Any) -> str:
    """Return what values a type takes, in words.

    Example:
        >>> readable_type(int | None)
        'an integer or null'
        >>> readable_type(typing.Literal["truncate", "drop"])
        "one of 'truncate', 'drop'"
    """
    if typehint is None:
        return ""
    if typehint in _READABLE:
        return _READABLE[typehint]
    origin, parts = typing.get_origin(typehint), typing.get_args(typehint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, parts))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(readable_type(part) for part in parts if getattr(part, "__name__", "") != "Tensor")
    if origin is list:
        return f"a list [{readable_type(parts[0])}, ...]"
    return typehint.__name__ if isinstance(typehint, type) and not parts else plain(str(typehint))


def plain(text: str) -> str:
    """Return the names of types in a text without their packages.

    Example:
        >>> plain("<class 'collections.abc.Sized'> | None")
        'Sized | None'
    """
    return re.sub(r"(?:\w+\.)+(\w+)", r"\1", re.sub(r"<class '([^']+)'>", r"\1", text))


def misplaced_nulls(value: Any, path: list[str]) -> Iterator[tuple[list[str], Any]]:
    """Yield each argument of a class that is null and must not be; jsonargparse takes a null as "not given".

    Args:
        value: What was parsed, or a part of it.
        path: The keys that lead to it.

    Yields:
        The keys that lead to the argument, and its type.
    """
    if isinstance(value, list):
        for part in value:
            yield from misplaced_nulls(part, path)
    elif isinstance(value, jsonargparse.Namespace) and isinstance(value.get("class_path"), str):
        arguments = value.get("init_args") or jsonargparse.Namespace()
        for name, typehint in _arguments_without_null(value["class_path"]):
            if arguments.get(name, typehint) is None:
                yield [*path, name], typehint
        yield from misplaced_nulls(arguments, path)
    elif isinstance(value, jsonargparse.Namespace):
        for key, part in vars(value).items():
            yield from misplaced_nulls(part, [*path, key])


def _arguments_without_null(class_path: str) -> Iterator[tuple[str, Any]]:
    """Yield name and type of the optional arguments of a class whose type and default both exclude null."""
    module, _, name = class_path.rpartition(".")
    cls: Any = getattr(sys.modules.get(module), name, None)
    if not callable(cls):  # Not resolved, as it stands under a key that nobody knows; that is reported later.
        return
    try:
        signatures = _signatures(cls)
    except (AttributeError, NameError, TypeError, ValueError):  # What only a type checker can read, or no class.
        return
    for name, typehint, parameter in signatures:
        optional = parameter.default is not None and parameter.default is not parameter.empty
        if optional and not _takes_null(typehint):
            yield name, typehint


def _takes_null(typehint: Any) -> bool:
    parts = typing.get_args(typehint)
    return typehint in (None, type(None), Any, object) or any(map(_takes_null, parts))


def _signatures(cls: Any) -> list[tuple[str, Any, inspect.Parameter]]:
    """Return name, type and parameter of all that a class takes, by ``**kwargs`` also what its parents take."""
    classes = [] if inspect.isfunction(cls) else [part for part in cls.__mro__ if "__init__" in vars(part)]
    functions = [vars(part)["__init__"] for part in classes] or [cls]
    found = []
    for function in functions:
        hints, parameters = typing.get_type_hints(function), inspect.signature(function).parameters
        found += [(name, hints.get(name, Any), parameter) for name, parameter in parameters.items()]
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return found

"""Reward functions of the user's own: found by their path, called with the columns they take, checked."""

import contextlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.data.shapes import Prompt
from rlhf_lightning.errors import UserError, did_you_mean
from rlhf_lightning.rollout.time_limit import TooLong, call_within


class RewardFunctionError(UserError):
    """What a reward function did wrong, and what it had been given.

    Attributes:
        row: Number of the response that it went wrong with; ``None`` where that cannot be known.
        rows: Prompt, response and other columns of that response, or of all of them.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row
        self.rows: list[dict[str, Any]] = []


@contextlib.contextmanager
def rows_told(prompts: Sequence[Prompt], responses: Sequence[str], columns: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Give a failure of a reward function the rows that it had been given; ``columns`` are the others of each row."""
    try:
        yield
    except RewardFunctionError as failure:
        given = zip(prompts, responses, columns, strict=True)
        rows = [{"prompt": prompt, "response": response, "columns": other} for prompt, response, other in given]
        failure.rows = rows if failure.row is None else [rows[failure.row]]
        raise


def load_function(path: str) -> Callable[..., Sequence[Any]]:
    """Load a function by ``package.module:name`` or ``path/to/file.py:name``.

    Raises:
        UserError: If the form, the module, the file or the name is wrong.
    """
    module_name, separator, name = path.rpartition(":")
    if not separator or not name:
        raise UserError(f"function {path!r} must have the form package.module:name or path/to/file.py:name.")
    try:
        module = _module_of_file(Path(module_name)) if module_name.endswith(".py") else import_module(module_name)
    except UserError:
        raise
    except Exception as error:  # whatever the user's own code raises
        file = f"{module_name.replace('.', '/')}.py"
        advice = f" For the file give '{file}:{name}'." if Path(file).is_file() else ""
        raise UserError(f"function {path!r} cannot be imported: {described_failure(error)}.{advice}") from error
    function = getattr(module, name, None)
    if function is None:
        raise UserError(f"function {path!r}: {module_name} has no function {name!r}.{did_you_mean(name, dir(module))}")
    if not callable(function):
        raise UserError(f"function {path!r}: {name!r} is a {type(function).__name__}, not a function.")
    return function


def named_function(
    function: str | Callable[..., Sequence[Any]], name: str | None
) -> tuple[Callable[..., Sequence[Any]], str]:
    """Return a reward function and what it is called.

    Args:
        function: The function itself, or where it is: see :func:`load_function`.
        name: What to call it; ``None`` takes its own name.

    Raises:
        UserError: If it cannot be found, or cannot take prompts and responses by place.
    """
    if isinstance(function, str):
        path, function = function, load_function(function)
        name = name or path.rsplit(":", 1)[-1]
    name = name or str(getattr(function, "__name__", type(function).__name__))
    signature = inspect.signature(function)
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    by_place = sum(
        kind in {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD} for kind in kinds
    )
    if by_place < 2 and inspect.Parameter.VAR_POSITIONAL not in kinds:
        raise UserError(
            f"reward function {name!r} has the form {name}{signature}; it must take prompts and responses by place: "
            f"{name}(prompts, responses, **columns)."
        )
    return function, name


def checked_timeout(timeout_s: float | None) -> float | None:
    """Return a time limit, above 0, or ``None`` for none.

    Raises:
        UserError: If it is not above 0.
    """
    if timeout_s is not None and not timeout_s > 0:
        raise UserError(f"timeout_s is {timeout_s}; it must be above 0, or null for any time.")
    return timeout_s


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.glob("*.py")]
        raise UserError(f"the file '{path}' of a reward function does not exist.{did_you_mean(path.name, siblings)}")
    spec = importlib.util.spec_from_file_location(f"reward_file.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses, among others, look their module up there
    spec.loader.exec_module(module)
    return module


def described_failure(error: BaseException) -> str:
    """Return what the user's own code raised, and in which line of which file.

    Example:
        >>> described_failure(ValueError("no"))
        'ValueError: no'
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError | ModuleNotFoundError):
        place = ""  # The first tells its place itself; the other's is in the import system.
    return shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...") + place


def columns_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Turn rows into columns; a value that a row lacks is ``None``."""
    names = {name: None for row in rows for name in row}
    return {name: [row.get(name) for row in rows] for name in names if name not in {"prompts", "responses"}}


def call_with_columns(
    function: Callable[..., Sequence[Any]],
    prompts: list[Prompt],
    responses: list[str],
    columns: dict[str, list[Any]],
    *,
    name: str,
    expected: str = "one number for each response",
    timeout_s: float | None = None,
) -> list[Any]:
    """Call a reward function with those columns that its signature takes.

    Args:
        function: What the user wrote.
        prompts: As text or chat messages.
        responses: As text.
        columns: By name, one value for each response.
        name: Of the function, for errors.
        expected: What it must return, for errors.
        timeout_s: Seconds that it may take; ``None`` is any time.

    Raises:
        RewardFunctionError: If it asks for a column that the rows lack, fails, takes too long, or returns no list.
    """
    parameters = list(inspect.signature(function).parameters.values())
    # Prompts and responses go in by place, whatever the function calls them; a column of that name stays out.
    named = [p for p in parameters[2:] if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}]
    lacking = [p.name for p in named if p.default is p.empty and p.name not in columns]
    if lacking:
        raise RewardFunctionError(
            f"reward function {name!r} asks for the column {lacking[0]!r}, but the prompts' rows have "
            f"{', '.join(columns) or 'no columns'}.{did_you_mean(lacking[0], columns)}"
        )
    wanted = {p.name for p in named}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        wanted = set(columns) - {p.name for p in parameters[:2]} | wanted
    given = {key: column for key, column in columns.items() if key in wanted}
    try:
        numbers = call_within(timeout_s, lambda: _written_out(function(prompts, responses, **given)))
    except TooLong as limit:
        raise RewardFunctionError(
            f"reward function {name!r} has not returned within {timeout_s:g} s (timeout_s){limit.place}; make it "
            "give up earlier by itself, or allow it more."
        ) from None
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        raise RewardFunctionError(f"reward function {name!r} failed: {described_failure(error)}.") from error
    if not isinstance(numbers, Iterable):
        raise RewardFunctionError(f"reward function {name!r} returned {numbers}; it must return {expected}.")
    return list(numbers)


def _written_out(returned: Any) -> Any:
    """Run generators to their end, within which the user's code may fail or take its time."""
    if isinstance(returned, Iterator):
        returned = list(returned)
    if isinstance(returned, list | tuple):
        return [list(each) if isinstance(each, Iterator) else each for each in returned]
    return returned


def as_numbers(numbers: Iterable[Any], name: str, row: int | None = None) -> Tensor:
    """Return what a reward function called ``name`` returned as a tensor, float32.

    Args:
        numbers: One for each response, or for each token of one.
        name: Of the function, for errors.
        row: Number of the response whose tokens they are of; ``None`` where they are of the responses.

    Raises:
        RewardFunctionError: If something among it is no number.
    """
    converted = []
    for place, number in enumerate(numbers):
        try:
            converted.append(float(number))
        except Exception as error:  # whatever an object of the user's raises
            message = f"reward function {name!r} must return numbers: {error}."
            raise RewardFunctionError(message, place if row is None else row) from error
    return torch.tensor(converted)

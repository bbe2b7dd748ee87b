"""Rows out of local files and hub datasets; what cannot be read is said in one line, with the file and the line."""

import codecs
import csv
import gzip
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

from rlhf_lightning.errors import UserError, did_you_mean

Row = dict[str, Any]

_JSON_KINDS = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
_BUILTIN_PREFIX = "builtin:demo/"
_LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_rows(source: str, *, split: str = "train") -> list[Row]:
    """Read a data set into memory, one dict per row.

    Args:
        source: A ``.jsonl``, ``.ndjson``, ``.json`` or ``.csv`` file (also with ``.gz``), a ``.parquet`` file,
            ``builtin:demo/<name>``, or a hub name as ``owner/name`` or ``owner/name:config``. A ``.json`` file holds a
            list of objects or one object a line. Whatever exists on disk is read from disk.
        split: Split of a hub data set; a file has no splits and ignores it.

    Returns:
        At least one row, in the order of the source. Values of a ``.csv`` are text.

    Raises:
        UserError: If the source is missing, empty, or not what its name says; with file and line.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "pairs.jsonl")
        >>> _ = path.write_text('{"prompt": "Hi"}')
        >>> read_rows(str(path))
        [{'prompt': 'Hi'}]
    """
    check_source(source)
    if source.startswith("builtin:"):
        rows = _read_builtin(source)
    elif os.path.isfile(source):
        rows = _read_file(Path(source))
    else:
        rows = _read_hub(source, split)
    if not rows:
        raise UserError(f"data source {source!r} holds no rows; give one with at least one row.")
    return rows


def check_source(source: str) -> None:
    """Refuse a source that is not there, without reading it; what the hub has is not asked.

    Raises:
        UserError: If it is a folder or a file that does not exist, naming what comes near.
    """
    if os.path.isdir(source):
        raise UserError(f"data source {source!r} is a folder; give one of its files: {_listed(Path(source))}.")
    if not (source.startswith("builtin:") or os.path.isfile(source) or is_hub_name(source)):
        raise UserError(f"data file {source!r} does not exist.{_nearest_file(Path(source))}")


def named_sources(source: str | list[str]) -> list[str]:
    """Return the sources that a setting names, one or several.

    Raises:
        UserError: If it names none, or one of them twice.

    Example:
        >>> named_sources("pairs.jsonl"), named_sources(["pairs.jsonl", "dolly.jsonl"])
        (['pairs.jsonl'], ['pairs.jsonl', 'dolly.jsonl'])
    """
    names = [source] if isinstance(source, str) else list(source)
    if not names:
        raise UserError("the list of data sources is empty; name at least one.")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"data source {twice!r} is named twice in a list of sources; leave one out.")
    return names


def is_hub_name(source: str) -> bool:
    """Return whether ``source`` can only be meant as a data set on the hub.

    Example:
        >>> is_hub_name("HumanLLMs/Human-Like-DPO-Dataset"), is_hub_name("pairs.jsonl")
        (True, False)
    """
    path_like = source.startswith((".", "/", "~", "builtin:")) or source.count("/") > 1 or "\\" in source
    return bool(source) and not (path_like or _kind(source) in _READERS or os.path.exists(source))


def line_of_row(source: str, number: int) -> str:
    r"""Return where a row lies in its file, as `` (line 3)``; empty where that says no more than the row's number.

    Args:
        source: What :func:`read_rows` has read.
        number: Of the row, from 1.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "pairs.csv")
        >>> _ = path.write_text("prompt\nHi\nBye\n")
        >>> line_of_row(str(path), 2)
        ' (line 3)'
    """
    path, reader = Path(source), _READERS.get(_kind(source))
    if reader not in (_read_json_lines, _read_json, _read_csv) or not path.is_file():
        return ""
    text = _text(path)
    if reader is _read_csv:
        table = csv.DictReader(io.StringIO(text, newline=""))
        next(itertools.islice(table, number - 1, None), None)
        line = table.line_num
    elif reader is _read_json and text.lstrip().startswith("["):
        return ""
    else:
        full = (at for at, line in enumerate(text.split("\n"), start=1) if line.strip())
        line = next(itertools.islice(full, number - 1, None), number)
    return "" if line == number else f" (line {line})"


def _read_builtin(source: str) -> list[Row]:
    if not source.startswith(_BUILTIN_PREFIX):
        raise UserError(f"no built-in data {source!r}; built-in sources are named {_BUILTIN_PREFIX}<name>.")
    from rlhf_lightning.demo import builtin_rows

    return list(builtin_rows(source.removeprefix(_BUILTIN_PREFIX)))


def _read_file(path: Path) -> list[Row]:
    reader = _READERS.get(_kind(path.name))
    if reader is None:
        raise UserError(
            f"data file '{path}' is of no kind that is read here; give one of {', '.join(sorted(_READERS))}."
        )
    return reader(path)


def _kind(name: str) -> str:
    """Return the ending that tells the format, such as ``.jsonl`` or ``.jsonl.gz``."""
    stem, gz = (name[:-3], ".gz") if name.lower().endswith(".gz") else (name, "")
    return Path(stem).suffix.lower() + gz


def _read_json_lines(path: Path) -> list[Row]:
    lines = enumerate(_text(path).split("\n"), start=1)
    return [_json_object(line, f"'{path}' line {number}") for number, line in lines if line.strip()]


def _read_json(path: Path) -> list[Row]:
    text = _text(path)
    if not text.lstrip().startswith("["):
        return _read_json_lines(path)
    rows = _json_value(text, f"'{path}'")
    return [_checked_object(row, f"'{path}' element {number}") for number, row in enumerate(rows, start=1)]


def _json_object(text: str, where: str) -> Row:
    return _checked_object(_json_value(text, where), where)


def _json_value(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
        if _LONE_SURROGATE.search(text):  # half a character: valid JSON, but no tokenizer takes it
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: a text holds half a character (a lone surrogate); repair the file.") from error
    except json.JSONDecodeError as error:
        at = f"line {error.lineno} " if "\n" in text.strip() else ""
        raise UserError(f"{where}: not JSON ({error.msg}, {at}column {error.colno}); expected JSON objects.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: JSON that cannot be read ({' '.join(str(error).split())[:100]}).") from error
    return value


def _checked_object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where}: a JSON {_JSON_KINDS[type(value)]}, where an object with named columns was expected.")
    return value


def _read_csv(path: Path) -> list[Row]:
    text = _text(path)
    previous = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        names = list(reader.fieldnames or [])
        if len(set(names)) != len(names):
            raise UserError(f"'{path}' line 1: two columns have the same name ({', '.join(names)}); rename one.")
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"'{path}' line {reader.line_num}: not {len(names)} values as the header has; quote commas."
                )
            rows.append(dict(row))
    except csv.Error as error:
        raise UserError(f"'{path}': not CSV ({error}).") from error
    finally:
        csv.field_size_limit(previous)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        OverflowError,
        MemoryError,
    ) as error:  # as of damaged numbers and names
        raise UserError(f"'{path}': not a parquet file ({shorten(str(error), 150, placeholder=' ...')}).") from error
    return rows


def _text(path: Path) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if path.name.lower().endswith(".gz") else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"'{path}' cannot be read: {error}.") from error
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"'{path}' line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); save it as UTF-8."
        ) from error


def _read_hub(source: str, split: str) -> list[Row]:
    import datasets

    name, _, config = source.partition(":")
    try:
        rows: list[Row] = datasets.load_dataset(name, config or None, split=split).to_list()
    except Exception as error:  # the hub client raises errors of half a dozen packages
        reason = shorten(str(error), 200, placeholder=" ...").rstrip(".")
        raise UserError(
            f"data source {source!r} (split {split!r}) is no file here and could not be loaded from the hub: {reason}. "
            f"For a local file give its path with its ending.{did_you_mean(source, _usable(Path()))}"
        ) from error
    return rows


def _usable(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if _kind(entry.name) in _READERS)


def _listed(folder: Path) -> str:
    names = _usable(folder)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more if names else f"none is {', '.join(sorted(_READERS))}"


def _nearest_file(path: Path) -> str:
    folder = path.expanduser().parent
    if not os.path.isdir(folder):
        return f" Its folder '{folder}' does not exist either."
    return did_you_mean(path.name, _usable(folder)) or f" Files in '{folder}': {_listed(folder)}."


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".ndjson.gz": _read_json_lines,
    ".json": _read_json,
    ".json.gz": _read_json,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".parquet": _read_parquet,
}

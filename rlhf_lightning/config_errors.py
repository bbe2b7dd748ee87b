"""What is wrong in a config, in one line.

jsonargparse reports a mistake in a nested config as a tree of everything that it tried. The parsers here keep the
innermost report and say it in one line: the whole key, what was given, what was expected, and the nearest right name.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml

from rlhf_lightning.config_types import known_classes, misplaced_nulls, plain, readable_type
from rlhf_lightning.errors import UserError, did_you_mean, nearest

_UNKNOWN_KEY = (
    re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'"),
    re.compile(r"Subcommand '[^']+' does not accept option '(?P<key>[^']+)'"),
    re.compile(r"Option '(?P<key>[^']+)' is not accepted"),
    re.compile(r"unrecognized arguments: --(?P<key>[^\s=]+)"),
)
_UNKNOWN_CLASS = (
    re.compile(r"Expected a dot import path string: (?P<name>\S+)"),
    re.compile(r"Unexpected import path format: (?P<name>\S+)"),
    re.compile(r"Import path (?P<name>\S+) does not correspond to a subclass"),
    re.compile(r"Expected an instantiatable class, but (?P<name>\S+) is abstract"),
)
_NOT_IMPORTED = re.compile(
    r"given class_path '(?P<name>[^']+)':\s+(?P<reason>No module named \S+|module \S+ has no attribute \S+)"
)
_WRONG_VALUE = re.compile(r"Expected (?:an?|to be one of) (?P<want>.+?)\. Got value: (?P<given>.*)", re.DOTALL)
_NO_CLASS = re.compile(r"Not a valid subclass of \w+\. Got value: (?P<given>.*)")
_NOT_CALLABLE = re.compile(
    r"expects a function or a callable class.*?(?:Got|Given) value: (?:Namespace\(class_path=)?'?(?P<given>[^',)\n]+)",
    re.DOTALL,
)
_CLASS_KEYS = ("class_path", "init_args")
_REQUIRED = re.compile(r"the following arguments are required: (?P<keys>.+)")
_NO_FILE = re.compile(r"File does not exist: '?(?P<path>[^'\n]+)'?")
_NOISE = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a path but", "Expected a <class 'None")


class OneLineErrors(jsonargparse.ArgumentParser):
    """A parser that reports a mistake in one line and exits with status 2; it takes whole names only."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        # The parsers of the classes in a config are made without arguments; they would guess at what is mistyped.
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Report ``message`` on stderr and exit; a nested parser hands it outwards together with itself."""
        if not self.exit_on_error:
            failure = argparse.ArgumentError(None, message)
            failure.parser = self  # type: ignore[attr-defined]
            raise failure from ex
        sys.stderr.write(f"error: {explain(self, message, ex)}\n")
        prog = re.sub(r" \[options\]", "", self.prog)
        self.exit(2, f"See all keys and their meaning: {prog} --help\n")

    def parse_args(self, args: Any = None, *more: Any, **kwargs: Any) -> jsonargparse.Namespace:  # type: ignore[override]
        """Parse as jsonargparse does; a config that is no text, and a misplaced null, are reported like the rest."""
        if args is not None and not self.exit_on_error:
            # A nested parser gets the null of a command line written as Python does, and would read it as text.
            args = [f"{argument[:-4]}null" if argument.endswith("=None") else argument for argument in args]
        try:
            settings = super().parse_args(args, *more, **kwargs)
        except UnicodeDecodeError as fault:
            self.error(str(fault), fault)
        for path, typehint in misplaced_nulls(settings, []) if self.exit_on_error else ():
            key = ".".join(path[1:] if path[0] in _given(self)[:1] else path)
            self.error(f"{key} is null, expected {readable_type(typehint)}")
        return settings


def explain(parser: jsonargparse.ArgumentParser, message: str, ex: BaseException | None = None) -> str:
    """Return one line for what a parser reports.

    Args:
        parser: The parser whose ``error`` was called.
        message: What it was called with.
        ex: The exception behind it; the innermost one of its chain holds the reason.
    """
    chain = list(_causes(ex))
    report = _Report(parser, message, chain)
    for rule in _RULES:
        line = rule(report)
        if line:
            return line
    return _shortened(report.message)


def refusal_of_constructor(failure: BaseException) -> BaseException | None:
    """Return what a constructor raised, from within what jsonargparse made of it; ``None`` if there is nothing such.

    Args:
        failure: What ``instantiate_classes`` raised. A ``UserError`` anywhere in its chain comes first, else what the
            chain began with, if it is of a kind that says that an argument is wrong.
    """
    chain = list(_causes(failure))
    mistakes = [e for e in chain if isinstance(e, UserError)]
    if mistakes:
        return mistakes[0]
    return chain[-1] if isinstance(chain[-1], ValueError | TypeError) else None


class _Report:
    """What the rules read: the innermost message, the parser that raised it, and the key that leads to it."""

    def __init__(self, parser: jsonargparse.ArgumentParser, message: str, chain: list[BaseException]) -> None:
        parsers = [getattr(e, "parser", None) or getattr(e, "subcommand_parser", None) for e in chain]
        self.outer = parser
        self.parser = next((p for p in reversed(parsers) if p is not None), parser)
        self.chain = chain
        self.message = message
        texts = [message, *map(str, chain)]
        self.leaf = texts[-1]
        # The report of the innermost key, with all the alternatives that were tried for it.
        self.local = next((text for text in reversed(texts) if text.startswith("Parser key ")), self.leaf)
        found = [re.match(r'Parser key "([^"]+)"', str(e)) for e in chain if not isinstance(e, argparse.ArgumentError)]
        if not any(found):
            found = [re.match(r'Parser key "([^"]+)"', message)]
        self.path = [match[1] for match in found if match]
        owners = re.findall(r"Problem with given class_path '([^']+)'", message)
        # A class that is called later, as an optimizer is, is not named in the report; its key says enough.
        self.owner = owners[-1].rpartition(".")[2] if owners and "callable class" not in message else ""

    def actions(self) -> list[Any]:
        """Return the actions of the parser that refused, its subcommands' included."""
        subcommands = getattr(self.parser, "_subcommands_action", None)
        children = list(getattr(subcommands, "_name_parser_map", {}).values())
        chosen = [c for name, c in getattr(subcommands, "_name_parser_map", {}).items() if name in _given(self.outer)]
        return [action for p in [self.parser, *(chosen or children)] for action in p._actions]

    def known_keys(self) -> list[str]:
        """Return the keys that the refusing parser takes."""
        hidden = ("help", "config", "subcommand", argparse.SUPPRESS)
        keys = {a.dest for a in self.actions() if a.dest not in hidden and not a.dest.startswith("print_")}
        return sorted(key for key in keys if not key.endswith(".help"))

    def typehint(self) -> Any:
        """Return the annotation of the innermost key, or ``None`` where it has none."""
        key = self.path[-1] if self.path else ""
        return next((getattr(a, "_typehint", None) for a in self.actions() if a.dest == key), None)

    def key(self, *more: str) -> str:
        """Return the dotted key of the mistake, as it is written on the command line."""
        parts = [part for part in ".".join([*self.path, *more]).split(".") if part not in ("init_args", "dict_kwargs")]
        given = _given(self.outer)
        return ".".join(parts[1:] if len(parts) > 1 and parts[0] in given[:1] else parts)


def _causes(ex: BaseException | None) -> Iterator[BaseException]:
    while ex is not None:
        yield ex
        ex = ex.__cause__ or ex.__context__


def _given(parser: jsonargparse.ArgumentParser) -> list[str]:
    return list(getattr(parser, "args", None) or [])


def _yaml_fault(report: _Report) -> str | None:
    fault = next((e for e in report.chain if isinstance(e, yaml.YAMLError | UnicodeDecodeError)), None)
    if fault is None:
        return None
    if isinstance(fault, UnicodeDecodeError):
        return f"{_faulty_file(report)} is not UTF-8 text (byte {fault.start})"
    mark = getattr(fault, "problem_mark", None)
    problem = getattr(fault, "problem", None) or "not valid YAML"
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{_faulty_file(report)}{where}: not valid YAML: {problem}"


def _config_paths(report: _Report) -> list[str]:
    given = _given(report.outer)
    following = [b for a, b in itertools.pairwise(given) if a in ("--config", "-c")]
    return following + [a.partition("=")[2] for a in given if a.startswith(("--config=", "-c="))]


def _faulty_file(report: _Report) -> str:
    for path in _config_paths(report):
        try:
            yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            return path
        except OSError:
            continue
    return "the given config"


def _missing_file(report: _Report) -> str | None:
    folder = re.search(r"Path is not a file: '([^']+)'", report.leaf)
    if folder:
        return f"{folder[1]} is a folder, where a YAML file was expected"
    match = _NO_FILE.search(report.leaf)
    if not match:
        return None
    path = Path(match["path"])
    if not path.parent.is_dir():
        return f"no file {path}: there is no folder {path.parent}"
    return f"no file {path}.{did_you_mean(path.name, [entry.name for entry in path.parent.iterdir()])}"


def _unknown_key(report: _Report) -> str | None:
    match = next((m for p in _UNKNOWN_KEY if (m := p.search(report.leaf))), None)
    if match is None:
        stray = re.search(r"unrecognized arguments: (\S+)", report.leaf)
        return f"unexpected argument '{stray[1]}'; options are written as --key value" if stray else None
    if " is not accepted before subcommand" in report.leaf:
        return f"options go after the command: rlhf-lightning fit --config FILE, not before it ({match['key']})"
    key = ".".join(part for part in (match.groupdict().get("group"), match["key"]) if part)
    if key == "class_path" and report.path:
        return f"{report.key()} has arguments beside class_path; write them under init_args"
    wrong, siblings, parent = _first_unknown(key, report.known_keys())
    owner = f" of {report.owner}" if report.owner else ""
    close = nearest(wrong, siblings)
    structural = nearest(wrong, _CLASS_KEYS) if report.path and not close else None
    advice = f"Known here: {_listing(siblings)}."
    if close or structural:
        advice = f"Did you mean '{structural or report.key(*parent, str(close))}'?"
    return f"'{report.key(*parent, wrong)}' is not a key{owner}. {advice}"


def _first_unknown(key: str, known: Iterable[str]) -> tuple[str, list[str], list[str]]:
    """Return the first part of ``key`` that no known key has, what could stand in its place, and what leads to it."""
    level = [name.split(".") for name in known]
    parent: list[str] = []
    for part in key.split("."):
        heads = sorted({names[0] for names in level})
        deeper = [names[1:] for names in level if names[0] == part and len(names) > 1]
        if part not in heads or not deeper:
            return part, heads, parent
        level, parent = deeper, [*parent, part]
    return parent[-1], sorted({names[0] for names in level}), parent[:-1]


def _unknown_class(report: _Report) -> str | None:
    failed = _NOT_IMPORTED.search(report.local)
    match = failed or next((m for t in (report.leaf, report.local) for p in _UNKNOWN_CLASS if (m := p.search(t))), None)
    classes = known_classes(report.typehint())
    if match is None or not classes:
        return None
    name = match["name"]
    if match.re not in (_NOT_IMPORTED, *_UNKNOWN_CLASS[:2]) or _is_class_of_ours(name):
        if "." in name and name not in " ".join(_given(report.outer)):  # put there for arguments that came without one
            return f"{report.key()} has arguments, but names no class: give --{report.key()} {classes[0]} too."
        return f"{report.key()}: {name} is not one of its classes. Known: {_listing(classes)}."
    close = nearest(name.rpartition(".")[2], classes)
    advice = f"Did you mean '{close}'?" if close else f"Known: {_listing(classes)}."
    if ":" in name and "FunctionReward" in classes:  # the way in which a reward function is named
        advice = f"For a function give --{report.key()} FunctionReward --{report.key('function')} {name}."
    reason = f" ({failed['reason']})" if failed else ""
    return f"{report.key()}: there is no class '{name}'{reason}. {advice}"


def _not_a_class(report: _Report) -> str | None:
    """Say what is lacking where a class with its arguments was expected."""
    match = _NO_CLASS.search(report.leaf)
    if not match:
        return None
    words = re.findall(r"(\w+)'?[=:]", match["given"])
    typo = next((word for word in words if word not in _CLASS_KEYS and nearest(word, _CLASS_KEYS)), None)
    if typo:
        return f"'{report.key(typo)}' is not a key. Did you mean '{nearest(typo, _CLASS_KEYS)}'?"
    classes = _listing(known_classes(report.typehint()))
    return f"{report.key()} must name a class by class_path, with its arguments under init_args. Known: {classes}."


def _not_callable(report: _Report) -> str | None:
    """Say what is lacking where a class was expected that is called later, as an optimizer is."""
    match = _NOT_CALLABLE.search(report.local)
    if not match:
        return None
    classes = _listing(known_classes(report.typehint()))
    return f"{report.key()}: {_clipped(match['given'])} is not one of its classes. Known: {classes}."


def _is_class_of_ours(name: str) -> bool:
    ours = [module for key, module in list(sys.modules.items()) if key.startswith("rlhf_lightning.")]
    return any(isinstance(getattr(module, name, None), type) for module in ours)


def _missing_key(report: _Report) -> str | None:
    match = _REQUIRED.search(report.leaf)
    if not match:
        return None
    keys = [report.key(*key.split(".")) for key in match["keys"].split(", ")]
    names = " and ".join(f"'{key}'" for key in keys)
    owner = f" of {report.owner}" if report.owner else ""
    return f"{names}{owner} must be given: in the config, or on the command line as --{keys[0]} VALUE"


def _wrong_value(report: _Report) -> str | None:
    match = _WRONG_VALUE.search(report.leaf)
    if not match or not report.path:
        return None
    given = match["given"].strip()
    shown = "null" if given == "None" else repr(_clipped(given))
    return f"{report.key()} is {shown}, expected {readable_type(report.typehint()) or plain(match['want'])}"


def _not_a_mapping(report: _Report) -> str | None:
    if not report.leaf.startswith("Unexpected config"):
        return None
    paths = _config_paths(report) or ["the config"]
    return f"{paths[-1]} is empty or not a mapping of keys to values; see --print_config for the shape"


_RULES = (
    _yaml_fault,
    _missing_file,
    _unknown_key,
    _unknown_class,
    _not_a_class,
    _not_callable,
    _missing_key,
    _wrong_value,
    _not_a_mapping,
)


def _clipped(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _listing(names: list[str], limit: int = 12) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _shortened(message: str) -> str:
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    return _clipped(" ".join(line for line in lines if line and not line.startswith(_NOISE)), 400)

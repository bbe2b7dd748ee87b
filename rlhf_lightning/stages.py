"""The stages of a pipeline: read from YAML, turned into command lines, and remembered on the disk."""

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf_lightning.errors import UserError, did_you_mean

TRAINER_STAGES = ("fit", "validate", "test")
FUNCTION_STAGES = ("compare",)
STATE = "stage.json"
_PIPELINE_KEYS = ("run_dir", "stages")
_STAGE_KEYS = ("name", "command", "config", "set")


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline.

    Attributes:
        name: Folder of the stage below the pipeline's.
        command: ``fit``, ``validate``, ``test`` or ``compare``.
        config: The YAML file of that command.
        overrides: Values of single keys, on top of the config; ``{run_dir}`` in them is the pipeline's folder.
    """

    name: str
    command: str
    config: Path
    overrides: dict[str, Any] = field(default_factory=dict)

    def folder(self, run_dir: Path) -> Path:
        """Return the stage's folder."""
        return run_dir / self.name

    def arguments(self, run_dir: Path, ckpt_path: str | None = None) -> list[str]:
        """Return the stage's command line, without the program's name."""
        place = "run_dir" if self.command in TRAINER_STAGES else "output"
        argv = [self.command, f"--config={self.config}", f"--{place}={self.folder(run_dir)}"]
        argv += [f"--{key}={_as_argument(value, run_dir)}" for key, value in self.overrides.items()]
        return argv + ([f"--ckpt_path={ckpt_path}"] if ckpt_path else [])

    def fingerprint(self) -> str:
        """Return what tells these inputs from others: command, config and overrides, without comments and layout."""
        inputs = [self.command, read_yaml(self.config), self.overrides]
        return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass
class StageState:
    """What is known of a stage that was started; kept in its folder as ``stage.json``.

    Attributes:
        status: ``running`` (also when it was killed) or ``done``.
        fingerprint: :meth:`Stage.fingerprint` of the inputs it ran with.
        run: Name of this one execution.
        after: ``run`` of the stage before it, whose results it read; ``None`` for the first.
        seconds: Time it took, over all its attempts.
        table: The table that ``compare`` returned, to be printed again.
    """

    status: str
    fingerprint: str
    run: str
    after: str | None
    seconds: float = 0.0
    table: str = ""

    def write(self, folder: Path) -> None:
        """Write the state into the stage's folder; the file is whole at every moment."""
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f".{STATE}.unfinished"
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump(vars(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(folder / STATE)

    @classmethod
    def read(cls, folder: Path) -> "StageState | None":
        """Return the state in a stage's folder; ``None`` where the stage was never started there."""
        try:
            return cls(**json.loads((folder / STATE).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as fault:
            raise UserError(
                f"{folder / STATE} is damaged ({fault}); remove the folder to run this stage anew."
            ) from None


def read_pipeline(path: str | Path) -> tuple[Path, list[Stage]]:
    """Read a pipeline file.

    Args:
        path: YAML with ``run_dir``, and ``stages``: a list of name, command, config (relative to this file) and
            ``set`` (optional).

    Returns:
        The default run folder and the stages.

    Raises:
        UserError: If the file or anything in it cannot be right.
    """
    path = Path(path)
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold the keys run_dir and stages; it holds {_kind(content)}.")
    _refuse_unknown(content, _PIPELINE_KEYS, str(path))
    entries = content.get("stages")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: stages must be a list of at least one stage; it is {_kind(entries)}.")
    stages = [_read_stage(entry, f"{path}, stage {number}", path.parent) for number, entry in enumerate(entries, 1)]
    names = [stage.name for stage in stages]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two stages are called {name!r}; each needs its own folder.")
    return Path(str(content.get("run_dir") or f"runs/{path.parent.name or path.stem}")), stages


def _read_stage(entry: Any, where: str, folder: Path) -> Stage:
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be a mapping with {', '.join(_STAGE_KEYS)}; it is {_kind(entry)}.")
    _refuse_unknown(entry, _STAGE_KEYS, where)
    for key in ("name", "command", "config"):
        if not isinstance(entry.get(key), str):
            raise UserError(f"{where}: {key} must be given as text; it is {_kind(entry.get(key))}.")
    if not re.fullmatch(r"[\w-]+", entry["name"]):
        raise UserError(f"{where}: name {entry['name']!r} becomes a folder; use letters, digits, - and _ only.")
    commands = (*TRAINER_STAGES, *FUNCTION_STAGES)
    if entry["command"] not in commands:
        advice = did_you_mean(entry["command"], commands) or f" Use one of {', '.join(commands)}."
        raise UserError(f"{where}: there is no stage command {entry['command']!r}.{advice}")
    overrides = entry.get("set") or {}
    if not isinstance(overrides, dict):
        raise UserError(f"{where}: set must map dotted keys to values; it is {_kind(overrides)}.")
    return Stage(entry["name"], entry["command"], folder / entry["config"], overrides)


def _refuse_unknown(content: dict[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in known:
            advice = did_you_mean(str(key), known) or f" Known: {', '.join(known)}."
            raise UserError(f"{where}: '{key}' is not a key.{advice}")


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        UserError: If the file is missing, not UTF-8 or not YAML (with its line).
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as fault:
        raise UserError(f"{path} is not UTF-8 text (byte {fault.start}).") from None
    except yaml.YAMLError as fault:
        mark = getattr(fault, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {getattr(fault, 'problem', None) or fault}") from None
    except OSError:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"no file {path}.{did_you_mean(path.name, siblings)}") from None


def _as_argument(value: Any, run_dir: Path) -> str:
    if isinstance(value, str):
        return value.replace("{run_dir}", str(run_dir))
    return json.dumps(value).replace("{run_dir}", json.dumps(str(run_dir))[1:-1])


def _kind(value: Any) -> str:
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"

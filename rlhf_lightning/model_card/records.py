"""What a run has recorded of itself: in its checkpoint, and in its folder where that is there."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf_lightning.checkpoint_files import CHECKPOINT_KEY, CHECKPOINTS, RUN_KEY, read_head
from rlhf_lightning.errors import UserError
from rlhf_lightning.loggers import read_metrics


@dataclass(frozen=True)
class RunRecords:
    """The records of one run, as they were written.

    Attributes:
        module: Name of the module's class.
        model_class: Name of the trained model's class in transformers.
        step: Training steps until then (of PPO: iterations).
        settings: Content of ``config.yaml``, or as much of it as the checkpoint holds.
        record: What :func:`rlhf_lightning.modules.training_record.training_record` noted; empty in older checkpoints.
        metrics: Rows of ``metrics.jsonl`` up to the checkpoint.
        samples: Rows of ``samples.jsonl`` up to the checkpoint.
        name: What the run's folder is called; ``None`` without one.
    """

    module: str
    model_class: str
    step: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    name: str | None = None

    @property
    def scores(self) -> bool:
        """Whether the model gives scores, as a reward model does, and no text."""
        return self.model_class.endswith("ForSequenceClassification")

    @property
    def model_settings(self) -> dict[str, Any]:
        """The module's arguments; those that were left to the module are what it made of them."""
        given = arguments_of(self.settings.get("model"))
        parts = self.record.get("parts") or {}
        return given | {name: part for name, part in parts.items() if given.get(name) is None}

    @property
    def data_settings(self) -> dict[str, Any]:
        """The data module's arguments."""
        return arguments_of(self.settings.get("data"))

    @property
    def data(self) -> dict[str, Any]:
        """Sources, counts and digest of the data."""
        named = {key: value for key, value in self.data_settings.items() if key in ("source", "val_source") and value}
        return {**named, **(self.record.get("data") or {})}

    def setting(self, *names: str) -> Any:
        """Return a setting of the module by its path, such as ``("sampling", "max_new_tokens")``; ``None`` if unset."""
        value: Any = self.model_settings
        for name in names:
            value = arguments_of(value).get(name)
        return value

    def last(self, *keys: str) -> float | None:
        """Return the last number that was logged under the first of these names that was logged at all."""
        for key in keys:
            values = [row[key] for row in self.metrics if isinstance(row.get(key), int | float)]
            if values:
                return float(values[-1])
        return None


def arguments_of(value: Any) -> dict[str, Any]:
    """Return the arguments of what a config holds, whether it names a class or is plain.

    Example:
        >>> arguments_of({"class_path": "FixedKL", "init_args": {"coef": 0.05}}), arguments_of({"a": 1})
        ({'coef': 0.05}, {'a': 1})
    """
    if not isinstance(value, Mapping):
        return {}
    inner = value.get("init_args") if "class_path" in value else value
    return dict(inner) if isinstance(inner, Mapping) else {}


def records_of_checkpoint(checkpoint: Path) -> RunRecords:
    """Read the records of a checkpoint that can be exported, and of the run's folder that it lies in.

    Raises:
        UserError: If a log of the run's folder is damaged.
    """
    head = read_head(checkpoint)
    packed, state = head.get(CHECKPOINT_KEY), head.get(RUN_KEY)
    packed, state = _plain(packed), _plain(state)
    run_dir = checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else None
    step = head.get("global_step")
    return records_of_run(
        run_dir,
        module=str(packed.get("module") or ""),
        model_class=str(packed.get("class")),
        step=step if isinstance(step, int) else 0,
        record=_plain(packed.get("record")),
        before=state.get("next_step"),
        settings=kept_settings(head.get("hyper_parameters"), head.get("datamodule_hyper_parameters")),
    )


def records_of_run(
    run_dir: Path | None,
    *,
    module: str,
    model_class: str,
    step: int,
    record: Mapping[str, Any],
    before: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> RunRecords:
    """Gather the records of a run.

    Args:
        run_dir: The run's folder; ``None`` where nothing but the checkpoint is left.
        module: Name of the module's class.
        model_class: Name of the trained model's class.
        step: Training steps.
        record: As the checkpoint has it.
        before: First step that is logged behind the checkpoint; ``None`` takes all.
        settings: Taken where the folder holds no config of this module.

    Raises:
        UserError: If a log is damaged.
    """
    config = {} if run_dir is None else _config(run_dir / "config.yaml")
    named = str(_plain(config.get("model")).get("class_path", ""))
    is_own = run_dir is not None and named.rpartition(".")[2] == module
    if run_dir is None or (config and not is_own):  # the folder of another run
        return RunRecords(module, model_class, step, settings or {}, record)
    metrics, samples = _metrics(run_dir / "metrics.jsonl"), _lines(run_dir / "samples.jsonl")
    metrics, samples = ([row for row in rows if before is None or row["step"] < before] for rows in (metrics, samples))
    own = config if is_own else settings or {}
    return RunRecords(module, model_class, step, own, record, metrics, samples, run_dir.resolve().name)


def kept_settings(module: Any, data: Any) -> dict[str, Any]:
    """Return the settings that a module and its data keep, as far as they are plain, in the form of a config.

    Example:
        >>> kept_settings({"_class_path": "rlhf_lightning.SFTModule", "model": "a/b"}, None)["model"]
        {'class_path': 'rlhf_lightning.SFTModule', 'init_args': {'model': 'a/b'}}
    """
    return {key: _as_config(kept) for key, kept in (("model", module), ("data", data)) if isinstance(kept, Mapping)}


def _as_config(kept: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in kept.items() if isinstance(value, bool | int | float | str | list)}
    own = {name: value for name, value in plain.items() if not name.startswith("_")}
    return {"class_path": str(plain.get("_class_path", "")), "init_args": own}


def _plain(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _config(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as fault:
        raise UserError(f"'{path}', the run's config, cannot be read; put it back or move it away.") from fault
    return _plain(content)


def _metrics(path: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(path) if path.exists() else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise UserError(f"'{path}', the run's log, is damaged; mend it or move it away.") from fault


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log; a last line without an end was not written to its end."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [{**row, "step": int(row["step"])} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise UserError(f"'{path}', the run's samples, is damaged; mend it or move it away.") from fault

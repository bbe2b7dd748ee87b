"""A list of stages from one command: each an ordinary command with its config, finished ones skipped."""

import argparse
import gc
import logging
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from rlhf_lightning.errors import UserError, did_you_mean
from rlhf_lightning.stages import TRAINER_STAGES, Stage, StageState, read_pipeline

logger = logging.getLogger("rlhf_lightning")

_DATA_KEYS = ("data.source", "data.val_source", "prompts", "likelihood.source", "pairs.source")
_MODEL_KEYS = (
    "model.model",
    "model.policy",
    "model.reference",
    "model.critic.init_from",
    "model.reward.path",
    "reward.path",
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See rlhf-lightning pipeline --help.")


def pipeline_command(argv: list[str]) -> int:
    """Run ``pipeline`` with the command line's arguments; return the exit status."""
    parser = _Parser(
        prog="rlhf-lightning pipeline", description=str(run_pipeline.__doc__).splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML with run_dir and stages")
    parser.add_argument("--run_dir", metavar="DIR", help="folder of all stages; default: the one in the config")
    parser.add_argument("--stages", metavar="NAME,NAME", help="run these only; default: all, in order")
    options = parser.parse_args(argv)
    run_pipeline(options.config, run_dir=options.run_dir, only=options.stages.split(",") if options.stages else None)
    return 0


def run_pipeline(config: str | Path, *, run_dir: str | Path | None = None, only: list[str] | None = None) -> None:
    """Run the stages of a pipeline in order; skip what is finished, take up what was interrupted.

    A stage is finished when it ran to its end with the same inputs and after the same run of the stage before it.
    One that was interrupted starts from its last checkpoint. One whose inputs changed runs again, and all after it;
    its old folder is moved aside, nothing is deleted.

    Args:
        config: The pipeline file; :func:`rlhf_lightning.stages.read_pipeline` describes it.
        run_dir: Folder of all stages instead of the one that the file names.
        only: Names of the stages to run; the others are left as they are.

    Raises:
        UserError: If anything in the pipeline or one of its configs cannot work; none of them has started then.
    """
    default_dir, stages = read_pipeline(config)
    folder = Path(run_dir) if run_dir else default_dir
    names = [stage.name for stage in stages]
    for name in only or []:
        if name not in names:
            advice = did_you_mean(name, names) or f" Stages: {', '.join(names)}."
            raise UserError(f"{config} has no stage {name!r}.{advice}")
    fingerprints = {stage.name: stage.fingerprint() for stage in stages}
    _check_all([stage for stage in stages if not only or stage.name in only], folder)
    before: str | None = None
    for number, stage in enumerate(stages, 1):
        label = f"[{number}/{len(stages)}] {stage.name}"
        if only and stage.name not in only:
            state = StageState.read(stage.folder(folder))
        else:
            state = _settle(stage, folder, fingerprints[stage.name], before, label)
        before = state.run if state and state.status == "done" else None


def _check_all(stages: list[Stage], run_dir: Path) -> None:
    """Check every stage's config, so that a mistake in the last one does not wait for the first to end."""
    written: list[Path] = []  # by the stages before
    for stage in stages:
        argv = stage.arguments(run_dir)
        try:
            if stage.command in TRAINER_STAGES:
                from rlhf_lightning.cli import check_command

                settings = check_command(argv)
                inputs = {key.replace(".init_args", ""): value for key, value in settings.items()}
            else:
                from rlhf_lightning.commands import check_function_command

                inputs = check_function_command(stage.command, argv[1:])
            _check_inputs(inputs, written)
        except UserError as mistake:
            raise UserError(f"stage {stage.name}: {mistake} (No stage was started.)") from mistake
        except SystemExit:
            print(f"in stage {stage.name}; no stage was started.", file=sys.stderr)
            raise
        written.append(stage.folder(run_dir))


def _check_inputs(inputs: dict[str, Any], written: list[Path]) -> None:
    """Refuse data and models that do not exist and that no stage before is going to write into its folder."""
    from rlhf_lightning.data.readers import check_source
    from rlhf_lightning.evaluation.named_models import named_models
    from rlhf_lightning.models.loading import resolve_model

    named = inputs | _inputs_of_comparison(inputs)
    each = [(key, one) for key, value in named.items() for one in (value if isinstance(value, list) else [value])]
    for key, value in each:
        if not isinstance(value, str) or any(Path(value).is_relative_to(folder) for folder in written):
            continue
        if key in _DATA_KEYS:
            check_source(value)
        elif key in _MODEL_KEYS:
            resolve_model(value)
        elif key.startswith("models."):
            named_models({key.removeprefix("models."): value})


def _inputs_of_comparison(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the models and the data that the arguments of ``compare`` name, by key; nothing for other commands."""
    sets = {
        f"{key}.source": [one.source for one in (inputs.get(key) or {}).values()] for key in ("likelihood", "pairs")
    }
    rewards = [inputs.get("reward"), *(inputs.get("judges") or {}).values()]
    paths = [getattr(reward, "path", None) for reward in rewards]
    return (
        {f"models.{name}": path for name, path in (inputs.get("models") or {}).items()} | sets | {"reward.path": paths}
    )


def _settle(stage: Stage, run_dir: Path, fingerprint: str, before: str | None, label: str) -> StageState:
    """Bring one stage to its end, if it is not there already, and return its state."""
    folder = stage.folder(run_dir)
    state = StageState.read(folder)
    fits = state is not None and state.fingerprint == fingerprint and state.after == before
    if state is not None and fits and state.status == "done":
        print(f"{label}: finished earlier, skipped", flush=True)
        if state.table:
            print(f"{state.table}\nreport: {folder / 'report.html'}", flush=True)
        return state
    from rlhf_lightning.checkpoint_files import kept_checkpoints  # imports torch, which a skipped stage has no need of

    kept = kept_checkpoints(folder / "checkpoints")
    if state is not None and fits and stage.command == "fit" and kept:
        print(f"{label}: taken up from {kept[0]}", flush=True)
        return _execute(stage, run_dir, state, "auto")
    if folder.exists() and any(folder.iterdir()):
        print(
            f"{label}: {_reason(state, fingerprint, before)}; its old folder is kept as {_move_aside(folder)}",
            flush=True,
        )
    print(f"{label}: {stage.command} --config {stage.config}", flush=True)
    fresh = StageState(status="running", fingerprint=fingerprint, run=secrets.token_hex(8), after=before)
    return _execute(stage, run_dir, fresh, None)


def _reason(state: StageState | None, fingerprint: str, before: str | None) -> str:
    """Say why a stage that has a folder already starts anew."""
    if state is None:
        return "was not run by this pipeline"
    if state.fingerprint != fingerprint:
        return "has other inputs than before"
    return "an earlier stage has run again" if state.after != before else "was interrupted before its first checkpoint"


def _execute(stage: Stage, run_dir: Path, state: StageState, checkpoint: str | None) -> StageState:
    folder = stage.folder(run_dir)
    state.write(folder)
    start = time.monotonic()
    try:
        result = _call(stage.arguments(run_dir, checkpoint))
    except UserError as mistake:
        raise UserError(f"stage {stage.name}: {mistake}") from mistake
    finally:
        state.seconds += time.monotonic() - start
        _free_memory()
    state.status = "done"
    state.table = str(result["table"]) if isinstance(result, dict) else ""
    state.write(folder)
    print(f"{stage.name}: done in {state.seconds:.0f} s", flush=True)
    return state


def _call(argv: list[str]) -> Any:
    """Run a command here; one that starts processes, which repeat their parent's command line, in its own process."""
    if argv[0] in TRAINER_STAGES:
        from rlhf_lightning.cli import check_command, needs_processes, run_command

        if not needs_processes(check_command(argv)):
            return run_command(argv)
        status = subprocess.run([sys.executable, "-m", "rlhf_lightning", *argv], check=False).returncode
        if status:
            raise SystemExit(status)
        return None
    from rlhf_lightning.commands import run_function_command

    return run_function_command(argv[0], argv[1:])


def _move_aside(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return folder.rename(aside)


def _free_memory() -> None:
    """Give back what the stage held: its models go with their Trainer, which stands in reference cycles."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()

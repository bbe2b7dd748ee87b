"""The command line: ``python -m rlhf_lightning <command> ...`` or ``rlhf-lightning <command> ...``.

Answers to ``--help``, ``--version`` and a mistyped command are given before torch and Lightning are imported.
"""

import errno
import logging
import os
import sys
from typing import TextIO

from rlhf_lightning.errors import UserError, did_you_mean
from rlhf_lightning.interruption import INTERRUPTED, end_with_starter

TRAINER_COMMANDS = {
    "fit": "train a module: SFTModule, RewardModule, PPOModule or your own",
    "validate": "run a module on the validation set",
    "test": "run a module on the test set",
    "predict": "run a module's predictions",
}
OTHER_COMMANDS = {
    "plan": "tell what memory and time a fit will need, before anything is loaded",
    "pipeline": "run a list of stages, each from its config; finished ones are skipped",
    "compare": "compare models on prompts: a table and an HTML report",
    "export": "write a checkpoint's model as a Hugging Face folder",
    "generate": "try a model in the terminal",
}
COMMANDS = {**TRAINER_COMMANDS, **OTHER_COMMANDS}
EXAMPLES = (
    "rlhf-lightning pipeline --config configs/demo/pipeline.yaml",
    "rlhf-lightning fit --config configs/demo/ppo.yaml --model.ppo_epochs 2 --run_dir runs/ppo",
    "rlhf-lightning fit --model PPOModule --data PromptDataModule --print_config",
    "rlhf-lightning generate --model runs/ppo/model --prompt 'How was your day?'",
)


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The command and its arguments; ``None`` takes them from ``sys.argv``.

    Returns:
        The exit status: 0 when it worked, 2 after a mistake of the user's (told in one line on stderr), 130 and 143
        when it was interrupted or asked to stop. Any other failure is a bug and raises.

    Example:
        >>> main(["--version"])
        rlhf_lightning ...
        0
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    # Threads that wait actively take the cores from whoever has work: on two busy cores the demo's model trained two to
    # seven times slower so. To be set before torch is imported; what the user has set stays.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if argv else 2
    if argv[0] == "--version":
        from rlhf_lightning import __version__

        print(f"rlhf_lightning {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        return _refuse_command(argv[0])
    _show_own_log()
    end_with_starter()
    try:
        return _dispatch(argv)
    except UserError as mistake:
        print(f"error: {' '.join(str(mistake).split())}", file=sys.stderr)
        return 2
    except OSError as failure:
        if failure.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f" ({failure.filename})" if failure.filename else ""
        print(f"error: {failure.strerror}{place}; make room and start the same command again.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as ending:
        return _status(ending)


def run() -> None:
    """Run the command of ``sys.argv`` and end the process with its status."""
    sys.exit(main())


def help_text() -> str:
    """Return what bare ``--help`` prints."""
    lines = ["usage: rlhf-lightning <command> [--config FILE] [--key value ...]", "", "commands:"]
    lines += [f"  {name:<10}{meaning}" for name, meaning in COMMANDS.items()]
    lines += ["", "All keys of a command: rlhf-lightning <command> --help", "", "examples:"]
    return "\n".join(lines + [f"  {example}" for example in EXAMPLES])


class _ToStderr(logging.StreamHandler[TextIO]):
    """Writes to whatever ``sys.stderr`` is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _show_own_log() -> None:
    """Show what the package has to say while it works; other libraries keep their own settings."""
    log = logging.getLogger("rlhf_lightning")
    log.setLevel(logging.INFO)
    if not any(isinstance(handler, _ToStderr) for handler in log.handlers):
        log.addHandler(_ToStderr())


def _dispatch(argv: list[str]) -> int:
    command, arguments = argv[0], argv[1:]
    if command in TRAINER_COMMANDS:
        from rlhf_lightning.cli import run_command

        run_command(argv)
    elif command == "pipeline":
        from rlhf_lightning.pipeline import pipeline_command

        return pipeline_command(arguments)
    elif command == "plan":
        from rlhf_lightning.planning.command import plan_command

        return plan_command(arguments)
    else:
        from rlhf_lightning.commands import run_function_command

        run_function_command(command, arguments)
    return 0


def _refuse_command(word: str) -> int:
    if word.startswith("-"):
        advice = f" Options go after the command: rlhf-lightning fit {word} ..."
    else:
        advice = did_you_mean(word, COMMANDS) or f" Commands: {', '.join(COMMANDS)}."
    print(f"error: there is no command '{word}'.{advice}", file=sys.stderr)
    return 2


def _status(ending: SystemExit) -> int:
    if isinstance(ending.__context__, KeyboardInterrupt):
        return INTERRUPTED  # Lightning catches it and exits with 1.
    if type(ending).__name__ == "SIGTERMException" and ending.code is None:
        return 143
    if ending.code is None or isinstance(ending.code, int):
        return ending.code or 0
    print(ending.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    run()

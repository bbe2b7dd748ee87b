"""``plan``: what a ``fit`` with the same arguments will need of memory and time, before anything is loaded."""

import argparse
from collections.abc import Sequence
from typing import Any

from rlhf_lightning.cli import checked_objects
from rlhf_lightning.errors import UserError
from rlhf_lightning.planning.estimate import Phase, Setting, estimate
from rlhf_lightning.planning.machine import gpu, this_processor

HELP = """usage: rlhf-lightning plan --config FILE [--key value ...] [--gpu NAME] [--gpus N]

Tells memory by part, and seconds, of each phase of a training iteration. Takes what fit takes, and:

  --gpu NAME  for a GPU of this name (h200, h100, a100, l40s, a10, l4, rtx4090); left out, for this processor
  --gpus N    processes that share the batch, one a GPU (default: trainer.devices, or 1)

All sequences are taken to be as long as the config allows."""


def plan_command(argv: Sequence[str]) -> int:
    """Print the plan; return the exit status.

    Args:
        argv: The arguments of ``fit``, and ``--gpu`` and ``--gpus``.

    Raises:
        UserError: If something that the user gave cannot work.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(HELP)
        return 0
    own, rest = _own_arguments(argv)
    settings, module, data = checked_objects(["fit", *rest])
    mixed = _is_mixed(str(settings.trainer.precision))
    machine = gpu(own.gpu, mixed=mixed) if own.gpu else this_processor()
    setting = Setting(machine, mixed, _number(own.gpus or settings.trainer.devices))
    print(report(estimate(module, data, setting), setting))
    return 0


def report(phases: Sequence[Phase], setting: Setting) -> str:
    """Return the table of parts and phases, and what follows from it."""
    machine, names = setting.machine, list(dict.fromkeys(name for phase in phases for name in phase.parts))
    lines = [f"{'MiB':<20}" + "".join(f"{phase.name:>12}" for phase in phases)]
    for name in names:
        cells = [phase.parts.get(name, 0.0) / 2**20 for phase in phases]
        if any(cells):
            lines.append(f"{name:<20}" + "".join(f"{cell:12,.0f}" for cell in cells))
    lines.append(f"{'together':<20}" + "".join(f"{phase.total / 2**20:12,.0f}" for phase in phases))
    lines.append(f"{'seconds':<20}" + "".join(f"{phase.seconds:12,.2f}" for phase in phases))
    peak = max(phase.total for phase in phases)
    each = f" for each of {setting.processes} processes" if setting.processes > 1 else ""
    seconds = sum(phase.seconds for phase in phases)
    unit = "an iteration" if len(phases) > 1 else "a step"
    lines.append(f"{machine.name}: at most {peak / 2**20:,.0f} MiB{each}, about {_rounded(seconds)} s {unit}")
    if machine.memory is not None:
        verdict = "fits" if peak < machine.memory else "does NOT fit"
        lines.append(f"It {verdict} into {machine.memory / 2**20:,.0f} MiB.")
    return "\n".join(lines)


def _rounded(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds < 10 else f"{seconds:,.0f}"


def _own_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gpu")
    parser.add_argument("--gpus")
    return parser.parse_known_args(list(argv))


def _number(given: Any) -> int:
    if given in (None, "auto"):
        return 1
    if str(given).isdecimal() and int(given) > 0:
        return int(given)
    raise UserError(f"--gpus is {given!r}; expected a number of at least 1.")


def _is_mixed(precision: str) -> bool:
    if precision in ("bf16-mixed",):
        return True
    if precision in ("32-true", "32", "None"):
        return False
    raise UserError(f"plan knows trainer.precision 32-true and bf16-mixed, not {precision}.")

"""Stop training runs at random moments, take them up again, and compare their ends with runs that were never stopped.

    python tools/kill_runs.py [--modules sft reward dpo kto ppo rloo] [--kills 200] [--terms 50] [--seed 0]
        [--places save step ...] [--processes 2]

Each module trains a model of a few thousand parameters on the built-in demo for eight steps, with a checkpoint every
second step and two validations; one undisturbed run of it is the measure. A disturbed run is stopped one to three
times, then left to finish; each time it starts by the same command, with ``--ckpt_path auto``. Half of the moments are
uniform over what the undisturbed run took; the other half lie within a place or right behind it: one of ``PLACES`` is
drawn, one of the times that the undisturbed run came there, and up to twice the time that it spent there, all evenly.
With ``--places`` all moments are drawn from these. ``--terms`` are such runs stopped by SIGTERM, which has to end with
status 143, or -15 before training began, instead of SIGKILL. With ``--processes 2`` each run is one of two, as
``trainer.devices=2`` starts them; the first of them is stopped, and the other has to end by itself.

Compared are, bit for bit, the last checkpoint (weights, optimizer, schedule, counters, places in the data; not
Lightning's own counts of epochs and batches, which tell whether a run ended within its last epoch), the best one's
step, the lines of metrics.jsonl and samples.jsonl as they stand and the curves of TensorBoard (but for times, speeds
and the self-check that each start makes), and the exported model. Runs are forks of one process that has imported
everything, so that a start takes a second.
"""

import argparse
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from run_ends import differences, end_of  # type: ignore[import-not-found]

STEPS = 8
TINY = "{hidden_size: 16, intermediate_size: 32, num_attention_heads: 2, num_key_value_heads: 2}"
COMMON = (
    "--trainer.accelerator=cpu --trainer.enable_progress_bar=false --model.optimizer.lr=0.01 --ckpt_path=auto "
    f"--trainer.max_steps={STEPS} --trainer.val_check_interval=3 --trainer.check_val_every_n_epoch=null "
    "--trainer.log_every_n_steps=1 --trainer.callbacks=RunCheckpoint --trainer.callbacks.every_n_steps=2 "
    "--trainer.callbacks.mode=min"
).split()
#: By which the best checkpoint is kept.
MONITORS = {"ppo": "val/score", "rloo": "val/score"}
PAIRS = shlex.split("--data.source=builtin:demo/train --data.limit=24 --data.val_size=4 --data.batch_size=4")
PROMPTS = shlex.split(
    "--data=PromptDataModule --data.source=builtin:demo/prompts --data.limit=20 --data.val_size=4 "
    "--data.rollout_batch_size=8 --model.policy=start/model --model.reward=FunctionReward "
    "--model.reward.function=score.py:score --model.sampling.max_new_tokens=6 --model.minibatch_size=4 "
    "--model.ppo_epochs=2 --data.max_prompt_length=64"
)
MODULES = {
    "sft": ["--model=SFTModule", "--model.model=start/model", "--data=DemonstrationDataModule", *PAIRS],
    "reward": ["--model=RewardModule", "--model.model=start/model", "--data=PreferenceDataModule", *PAIRS],
    "dpo": ["--model=DPOModule", "--model.policy=start/model", "--data=PreferenceDataModule", *PAIRS],
    "kto": ["--model=KTOModule", "--model.policy=start/model", "--data=UnpairedDataModule", *PAIRS],
    "ppo": ["--model=PPOModule", "--model.critic=SeparateCritic", "--model.kl=AdaptiveKL", *PROMPTS],
    "rloo": [
        "--model=PPOModule",
        "--model.critic=null",
        "--model.value_objective=null",
        "--model.advantages=LeaveOneOut",
        *PROMPTS,
        "--data.responses_per_prompt=4",
    ],
}
#: Where runs are stopped on purpose: a name, and the function that does it.
PLACES = {
    "save": "rlhf_lightning.checkpointing:RunCheckpoint._save",
    "rollout": "rlhf_lightning.modules.rollout_module:RolloutModule.sample",
    "scoring": "rlhf_lightning.modules.rollout_module:RolloutModule.score",
    "optimizer": "torch.optim:AdamW.step",
    "log": "rlhf_lightning.loggers:JSONLines.write",
    "step": "lightning.pytorch.trainer.connectors.logger_connector.logger_connector:"
    "_LoggerConnector.update_train_step_metrics",
    "validation": "lightning.pytorch.loops.evaluation_loop:_EvaluationLoop.run",
    "export": "rlhf_lightning.callbacks.export:ExportModel.on_train_end",
}


class Visit(NamedTuple):
    """A time that a run came to a place."""

    place: str
    number: int
    seconds: float


class Moment(NamedTuple):
    """When to stop a run: so long after it came to a place for the n-th time; the place "" is its start."""

    place: str
    number: int
    delay: float


@dataclass
class Measure:
    """What an undisturbed run took and came to."""

    seconds: float
    visits: list[Visit]
    end: dict[str, Any]


@dataclass
class Tally:
    """What came of the disturbed runs of one module."""

    stops: Counter[str] = field(default_factory=Counter)
    equal: int = 0
    runs: int = 0
    faults: list[str] = field(default_factory=list)


# --- a run in a process of its own ------------------------------------------------------------------------------------


def launch(arguments: list[str], log: Path, moment: Moment | None, stop: int) -> tuple[int, list[Visit], float]:
    """Run ``fit`` in a fork, send it a signal at a moment; return its status, its visits and its seconds."""
    reading, writing = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.close(reading)
        os._exit(run(arguments, log, writing))
    os.close(writing)
    killer = Killer(child, moment, stop)
    killer.reached("", 1)
    visits: list[Visit] = []
    with os.fdopen(reading, encoding="utf-8") as lines:
        for line in lines:
            kind, place, number, seconds = line.split()
            if kind == "begin":
                killer.reached(place, int(number))
            else:
                visits.append(Visit(place, int(number), float(seconds)))
    _, status = os.waitpid(child, 0)
    killer.cancel()
    wait_for_others(child)
    return os.waitstatus_to_exitcode(status), visits, time.monotonic() - start


def wait_for_others(group: int, patience: float = 120.0) -> None:
    """Wait until the processes that a run started are gone too."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise SystemExit(f"process group {group} goes on {patience:.0f} seconds after its first process has ended")


class Killer:
    """Sends a signal so long after a moment's place was reached."""

    def __init__(self, child: int, moment: Moment | None, stop: int) -> None:
        self.child, self.moment, self.stop = child, moment, stop
        self.timer: threading.Timer | None = None

    def reached(self, place: str, number: int) -> None:
        """Start the clock where this is the place."""
        if self.moment is not None and (place, number) == self.moment[:2]:
            self.timer = threading.Timer(self.moment.delay, os.kill, (self.child, self.stop))
            self.timer.start()

    def cancel(self) -> None:
        """Send nothing any more."""
        if self.timer is not None:
            self.timer.cancel()


def run(arguments: list[str], log: Path, told: int) -> int:
    """Do what the command line does, telling of each visit to a place; return the status."""
    from rlhf_lightning.__main__ import main

    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for place, path in PLACES.items():
        watch(place, path, told)
    sys.argv = [str(Path(__file__).resolve()), "fit", *arguments]  # by which Lightning starts further processes
    try:
        return main(["fit", *arguments])
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def watch(place: str, path: str, told: int) -> None:
    """Tell when a function begins and how long it took."""
    import importlib

    module, _, names = path.partition(":")
    owner, name = names.split(".")
    kind = getattr(importlib.import_module(module), owner)
    function: Callable[..., Any] = getattr(kind, name)
    count = 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        number, start = count, time.monotonic()
        os.write(told, f"begin {place} {number} 0\n".encode())
        result = function(*args, **kwargs)
        os.write(told, f"end {place} {number} {time.monotonic() - start:.6f}\n".encode())
        return result

    setattr(kind, name, watched)


# --- runs and what they came to ---------------------------------------------------------------------------------------


def arguments_of(module: str, run_dir: Path) -> list[str]:
    """Return what follows ``fit``."""
    monitor = f"--trainer.callbacks.monitor={MONITORS.get(module, 'val/loss')}"
    return [*MODULES[module], *COMMON, monitor, f"--run_dir={run_dir}"]


def measure(module: str, folder: Path) -> Measure:
    """Make the undisturbed run, twice: it has to be the same in itself."""
    ends = []
    for number in (1, 2):
        run_dir = folder / f"{module}-whole-{number}"
        status, visits, seconds = launch(arguments_of(module, run_dir), folder / f"{module}.log", None, 0)
        if status:
            raise SystemExit(f"{module} ends with {status}:\n{(folder / f'{module}.log').read_text()[-2000:]}")
        ends.append(end_of(run_dir))
    if differing := differences(*ends):
        raise SystemExit(f"{module}: two undisturbed runs differ in {differing[:5]}")
    return Measure(seconds, visits, ends[0])


def draw_moment(measure: Measure, generator: random.Random, only: list[str] | None) -> Moment:
    """Draw when to stop a run."""
    places = sorted({visit.place for visit in measure.visits if only is None or visit.place in only})
    if only is None and generator.random() < 0.5:
        return Moment("", 1, generator.uniform(0, measure.seconds))
    place = generator.choice(places)
    visit = generator.choice([visit for visit in measure.visits if visit.place == place])
    return Moment(place, visit.number, generator.uniform(0, 2 * visit.seconds))


def disturb(
    module: str, number: int, folder: Path, known: Measure, tally: Tally, stop: int, left: int, only: list[str] | None
) -> int:
    """Stop one run up to three times, let it finish, and compare; return how many stops it took."""
    import torch

    generator = random.Random(f"{module} {number} {stop}")
    run_dir, log = folder / f"{module}-{stop}-{number}", folder / f"{module}-{stop}-{number}.log"
    stops = 0
    for _ in range(min(left, generator.randint(1, 3))):
        moment = draw_moment(known, generator, only)
        status, _, _ = launch(arguments_of(module, run_dir), log, moment, stop)
        if status == 0:
            break  # it was over before the moment came
        stops += 1
        tally.stops[moment.place or "any time"] += 1
        if status not in {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15)}[signal.Signals(stop)]:
            tally.faults.append(f"{module} {number}: status {status} after {moment}; {log}")
        checkpoint = run_dir / "checkpoints" / "last.ckpt"
        if checkpoint.exists():
            torch.load(checkpoint, weights_only=True)  # raises where it is damaged
    status, _, _ = launch(arguments_of(module, run_dir), log, None, 0)
    differing = [f"status {status}"] if status else differences(end_of(run_dir), known.end)
    tally.runs += 1
    tally.equal += not differing
    if differing:
        tally.faults.append(f"{module} {number}: differs in {differing[:5]} ({len(differing)}); {log}")
    return stops


def prepare(folder: Path) -> None:
    """Write the reward function and the model that all start from."""
    (folder / "score.py").write_text(
        "def score(prompts, responses):\n    return [len(set(r)) / 9 for r in responses]\n"
    )
    start = shlex.split("--model=SFTModule --model.model=builtin:demo --model.pretrained=false --trainer.max_steps=1")
    options = [f"--model.config_overrides={TINY}", "--run_dir=start", "--trainer.accelerator=cpu"]
    data = ["--data=DemonstrationDataModule", "--data.source=builtin:demo/train", "--data.limit=8"]
    status, _, _ = launch([*start, *options, *data], folder / "start.log", None, 0)
    if status:
        raise SystemExit((folder / "start.log").read_text())


def main() -> int:
    if sys.argv[1:2] == ["fit"]:  # a further process of a run
        from rlhf_lightning.__main__ import main as fit

        return fit(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", choices=list(MODULES), default=list(MODULES))
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs, over all modules")
    parser.add_argument("--terms", type=int, default=50, help="SIGTERMs, over all modules")
    parser.add_argument("--places", nargs="+", choices=list(PLACES), help="draw all moments from these")
    parser.add_argument("--processes", type=int, default=1, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="number of the first run: it draws the moments")
    options = parser.parse_args()
    if options.processes > 1:
        COMMON.extend([f"--trainer.devices={options.processes}", "--trainer.strategy=ddp"])
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import rlhf_lightning.cli  # noqa: F401 - imported once, for all forks

    folder = Path(tempfile.mkdtemp(prefix="kill_runs-"))
    os.chdir(folder)
    prepare(folder)
    bad = 0
    for stop, wanted in ((signal.SIGKILL, options.kills), (signal.SIGTERM, options.terms)):
        (folder / stop.name).mkdir()
        for place, module in enumerate(options.modules):
            share = wanted * (place + 1) // len(options.modules) - wanted * place // len(options.modules)
            if not share:
                continue
            known, tally, number = measure(module, folder / stop.name), Tally(), options.seed
            while sum(tally.stops.values()) < share:
                left = share - sum(tally.stops.values())
                disturb(module, number, folder / stop.name, known, tally, stop, left, options.places)
                number += 1
            stops = ", ".join(f"{name} {count}" for name, count in tally.stops.most_common())
            print(
                f"{stop.name} {module:7} {share} stops ({stops}): {tally.equal} of {tally.runs} runs equal", flush=True
            )
            print("".join(f"  {fault}\n" for fault in tally.faults), end="", flush=True)
            bad += len(tally.faults)
    if bad:
        return 1
    shutil.rmtree(folder)  # the logs are of use to whoever looks for a fault
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Train PPO twice for a long time, once undisturbed and once killed again and again, and compare the ends.

    python tools/soak.py [--steps 4000] [--life 45] [--seed 0] [-- further arguments of fit, with absolute paths]

The runs are those of ``tools/kill_runs.py`` for PPO with a separate critic (8 responses an iteration, two epochs), but
longer: a checkpoint every fifth iteration, a validation every fiftieth. Both go on at the same time. The lives of the
disturbed one are drawn from an exponential distribution of ``--life`` seconds in the mean, its moments are therefore
anywhere, and it ends by SIGKILL until it is done. ``--steps`` decides how long it takes.

Printed are whether both ended alike, bit for bit, in what ``tools/kill_runs.py`` compares; of the undisturbed run the
resident memory after its warm-up (its first tenth) and at its end, as medians over tenths of its time, and the fewest
open files in each tenth. Status 1 where the ends differ, memory grew by 2 % or more, or files stay open.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import kill_runs  # type: ignore[import-not-found]
from run_ends import differences, end_of  # type: ignore[import-not-found]

MOST_GROWTH = 0.02
_LONGER = "--trainer.val_check_interval=50 --trainer.callbacks.every_n_steps=5"


@dataclass
class Watch:
    """Resident memory (MiB) and open files of a process, every few seconds.

    Attributes:
        process: Its number.
        every: Seconds between two looks.
        memory: What was seen, in order.
        files: Likewise.
    """

    process: int
    every: float = 2.0
    memory: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def start(self) -> None:
        """Look from a thread of its own, until the process is gone."""
        threading.Thread(target=self._look_on, daemon=True).start()

    def _look_on(self) -> None:
        folder = Path(f"/proc/{self.process}")
        page = os.sysconf("SC_PAGE_SIZE") / 2**20
        while True:
            try:
                pages = int((folder / "statm").read_text().split()[1])
                files = len(os.listdir(folder / "fd"))
            except OSError:
                return
            if not pages:  # it has ended, and nobody has asked how
                return
            self.memory.append(pages * page)
            self.files.append(files)
            time.sleep(self.every)

    def tenths(self) -> list[float]:
        """Return the median of the memory in each tenth of the time, MiB."""
        size = len(self.memory) / 10
        return [statistics.median(self.memory[int(k * size) : int((k + 1) * size)]) for k in range(10)]

    def least_files(self) -> list[int]:
        """Return the fewest open files in each tenth: one that is written is open for a moment, one forgotten stays."""
        size = len(self.files) / 10
        return [min(self.files[int(k * size) : int((k + 1) * size)]) for k in range(10)]


def fork(arguments: list[str], log: Path) -> int:
    """Run ``fit`` in a process of its own; return its number."""
    child = os.fork()
    if child == 0:
        os._exit(kill_runs.run(arguments, log, os.open(os.devnull, os.O_WRONLY)))
    return child


def disturb(arguments: list[str], log: Path, life: float, generator: random.Random) -> tuple[int, list[str]]:
    """Start a run and kill it, until it ends by itself; return how often it was killed, and what went wrong."""
    kills = 0
    while True:
        moment = kill_runs.Moment("", 1, generator.expovariate(1 / life))
        status, _, _ = kill_runs.launch(arguments, log, moment, signal.SIGKILL)
        if status != -signal.SIGKILL:
            return kills, [f"the disturbed run ended with {status}; {log}"] if status else []
        kills += 1


def arguments_of(run_dir: Path, steps: int, further: list[str]) -> list[str]:
    """Return what follows ``fit``; what comes later prevails."""
    return [*kill_runs.arguments_of("ppo", run_dir), *_LONGER.split(), f"--trainer.max_steps={steps}", *further]


def report(watch: Watch) -> list[str]:
    """Print what was seen of the undisturbed run; return what is wrong with it."""
    tenths, files = watch.tenths(), watch.least_files()
    growth = tenths[-1] / tenths[1] - 1
    print(f"memory, MiB, by tenths of the time: {', '.join(f'{value:.1f}' for value in tenths)}")
    print(f"growth after the warm-up: {growth:.2%}; open files, the fewest in each tenth: {files}", flush=True)
    faults = [f"memory grew by {growth:.2%}"] if growth >= MOST_GROWTH else []
    return faults + ([f"open files: {files[1]}, at the end {files[-2]}"] if files[-2] > files[1] else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="iterations of each run")
    parser.add_argument("--life", type=float, default=45.0, help="mean seconds from a start to a kill")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments")
    parser.add_argument("further", nargs="*", help="of fit, such as --model.policy=/folder/of/a/model")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import rlhf_lightning.cli  # noqa: F401 - imported once, for all forks

    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    os.chdir(folder)
    kill_runs.prepare(folder)
    start = time.monotonic()
    whole = fork(arguments_of(folder / "whole", options.steps, options.further), folder / "whole.log")
    watch = Watch(whole)
    watch.start()
    generator = random.Random(options.seed)
    disturbed = arguments_of(folder / "disturbed", options.steps, options.further)
    kills, faults = disturb(disturbed, folder / "disturbed.log", options.life, generator)
    minutes = (time.monotonic() - start) / 60
    status = os.waitstatus_to_exitcode(os.waitpid(whole, 0)[1])
    if status:
        faults.append(f"the undisturbed run ended with {status}; {folder / 'whole.log'}")
    if not faults:
        faults = differences(end_of(folder / "disturbed"), end_of(folder / "whole"))
    alike = "they differ: " + ", ".join(faults[:5]) if faults else "equal"
    print(f"{options.steps} iterations, {kills} kills in {minutes:.1f} minutes: {alike}")
    faults += report(watch)
    if faults:
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

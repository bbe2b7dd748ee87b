"""Put deliberate faults into the package, one at a time, and tell which of them the tests catch.

Each fault of ``tools/faults.yaml`` names a file, a piece of its text and what to put in its place. The tree is copied,
the fault is put in, and the tests of that file run; where they pass, those of the folders that use it run too. A fault
that no test notices is a survivor.

    python tools/mutation_check.py [--only WORD] [--jobs N]
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PARTS = ("rlhf_lightning", "tests", "configs", "tools", "docs", "pyproject.toml", "README.md", "CHANGELOG.md")
WIDER = (
    "tests/functional",
    "tests/models",
    "tests/algorithm",
    "tests/rollout",
    "tests/modules",
    "tests/references",
    "tests/end_to_end/test_taking_up.py",
)


@dataclass(frozen=True)
class Fault:
    """A piece of a file of the package and what to put in its place."""

    file: str
    what: str
    old: str
    new: str

    @property
    def own_tests(self) -> list[str]:
        """The test files that mirror the file, of the module and of what the module is made of."""
        folder, name = Path(self.file).parent, Path(self.file).stem
        return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests" / folder).glob(f"test_{name}*.py"))]

    def apply(self, text: str) -> str:
        """Return the file's text with the fault.

        Raises:
            SystemExit: If the piece is not there exactly once.
        """
        if text.count(self.old) != 1:
            raise SystemExit(f"{self.file}: {self.old!r} stands there {text.count(self.old)} times; expected once.")
        return text.replace(self.old, self.new)


def read_faults(path: Path) -> list[Fault]:
    """Read the list, by file."""
    listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [Fault(file, **fault) for file, faults in listed.items() for fault in faults]


def catching_test(fault: Fault | None) -> str | None:
    """Return the test that fails with the fault (``None``: without any) in place, or ``None`` where all pass."""
    with tempfile.TemporaryDirectory() as place:
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
            copy(ROOT / part, Path(place) / part)
        if fault is not None:
            file = Path(place) / "rlhf_lightning" / fault.file
            file.write_text(fault.apply(file.read_text(encoding="utf-8")), encoding="utf-8")
        for tests in ([] if fault is None else fault.own_tests, list(WIDER)):
            caught = _first_failure(Path(place), tests) if tests else None
            if caught:
                return caught
    return None


def _first_failure(place: Path, tests: list[str]) -> str | None:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", *tests]
    settings = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=place, env=settings, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
    return found[1] if found else f"pytest ended with {done.returncode}"


def main() -> int:
    """Run all faults and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="take the faults whose file or description has this word")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    arguments = parser.parse_args()
    faults = [
        fault
        for fault in read_faults(Path(__file__).with_name("faults.yaml"))
        if arguments.only in f"{fault.file} {fault.what}"
    ]
    for fault in faults:
        fault.apply((ROOT / "rlhf_lightning" / fault.file).read_text(encoding="utf-8"))
    broken = catching_test(None)
    if broken:
        raise SystemExit(f"{broken} fails without any fault; mend it first.")
    survivors = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for fault, caught in zip(faults, pool.map(catching_test, faults), strict=True):
            survivors += caught is None
            print(f"{fault.file:32} {fault.what:64} {caught or 'SURVIVES'}", flush=True)
    print(f"{len(faults) - survivors} of {len(faults)} faults caught ({1 - survivors / max(len(faults), 1):.1%})")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Run every command that the README shows, as it stands there, in order, in a copy of this checkout.

Each command's seconds are printed; the first that fails ends it. Installation and tests are left to ``.ci/run`` and
``tools/fresh_clone.sh`` unless ``--setup`` is given: without it ``.venv`` of the copy is the environment of this run.

Usage: python tools/readme_commands.py [--setup] [--keep DIR] [--readme FILE]
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SETUP = "python3 -m venv "
#: Parts of commands that are not run, and why.
NOT_RUN = {
    "configs/smollm/a": "needs the hub",
    "configs/smollm/b": "needs the hub",
    "configs/smollm/ours": "needs the hub",
    "-m pytest": "the tests: run by .ci/run and tools/fresh_clone.sh",
}


class Outcome(NamedTuple):
    """What came of a command."""

    command: str
    seconds: float
    said: str
    ok: bool = True


def shown_commands(text: str) -> list[str]:
    """Return the lines of the fenced shell blocks, without comments."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, flags=re.DOTALL)
    lines = [re.sub(r"\s+#\s.*$", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def run_one(command: str, folder: Path, *, setup: bool) -> Outcome:
    """Run one command, or say why not."""
    said = "ok"
    if command.startswith(SETUP) and not setup:
        command, said = command.rpartition("&& ")[2], "ok (what stands before it: tools/fresh_clone.sh)"
    reason = next((why for part, why in NOT_RUN.items() if part in command and not setup), None)
    if reason:
        return Outcome(command, 0.0, f"not run: {reason}")
    print(f"\n$ {command}", flush=True)
    start = time.monotonic()
    if command.startswith("tensorboard "):
        ok = answers(command, folder)
        said = "started, gave its page, stopped" if ok else "gave no page"
    else:
        status = subprocess.run(command, shell=True, cwd=folder, env=environment(folder), check=False).returncode
        ok, said = status == 0, said if status == 0 else f"FAILED with status {status}"
    return Outcome(command, time.monotonic() - start, said, ok)


def answers(command: str, folder: Path, patience: float = 120.0) -> bool:
    """Start a server, ask for the page whose address it prints, and stop it."""
    log = folder / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            f"exec {command}", shell=True, cwd=folder, env=environment(folder), stdout=output, stderr=output
        )
    try:
        end = time.monotonic() + patience
        while time.monotonic() < end and server.poll() is None:
            address = re.search(r"https?://localhost:\d+\S*", log.read_text())
            if address:
                direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
                with direct.open(address[0], timeout=60) as page:
                    return page.status == 200 and b"TensorBoard" in page.read()
            time.sleep(0.5)
    finally:
        server.terminate()
        server.wait()
    print(log.read_text(), flush=True)
    return False


def environment(folder: Path) -> dict[str, str]:
    """Return the variables under which the copy's code is run by the commands of this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(folder)}


def copy_checkout(folder: Path) -> None:
    """Copy the files that git knows, as they are now."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--setup", action="store_true", help="run the installation and the tests too, as they stand")
    parser.add_argument("--keep", type=Path, help="folder to work in and to leave; default: one that is removed")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args()
    commands = shown_commands(options.readme.read_text(encoding="utf-8"))
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.keep or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        copy_checkout(folder)
        if not options.setup and not (folder / ".venv").exists():
            (folder / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)
        for command in commands:
            outcomes.append(run_one(command, folder, setup=options.setup))
            if not outcomes[-1].ok:
                break
    print("\nseconds  outcome, command")
    for outcome in outcomes:
        print(f"{outcome.seconds:7.1f}  {outcome.said}: {outcome.command}")
    print(f"{sum(outcome.seconds for outcome in outcomes):7.1f}  in all; {len(outcomes)} of {len(commands)} commands")
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

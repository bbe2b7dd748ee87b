"""A long run that is killed again and again ends as the undisturbed one, and what grows in it is seen."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def soak(load_tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return load_tool("soak")


def test_memory_that_grows_and_files_that_stay_open_are_faults(soak: ModuleType) -> None:
    steady = soak.Watch(0, memory=[50.0] * 10 + [100.0] * 89 + [101.0], files=[3] * 10 + [9, 10] * 44 + [4, 3])
    growing = soak.Watch(0, memory=[100.0 + 0.03 * k for k in range(100)], files=[9] * 50 + [10] * 50)
    assert soak.report(steady) == []
    assert soak.report(growing) == ["memory grew by 2.39%", "open files: 9, at the end 10"]


@pytest.mark.slow
def test_a_minute_of_kills_changes_nothing() -> None:
    command = [sys.executable, str(TOOLS / "soak.py"), "--steps=120", "--life=4", "--seed=3"]
    run = subprocess.run(command, capture_output=True, text=True)
    # So short a run is all warm-up: its memory is not judged here.
    assert "120 iterations, " in run.stdout, run.stdout + run.stderr
    assert "minutes: equal" in run.stdout
    assert "120 iterations, 0 kills" not in run.stdout


def test_a_process_that_has_ended_and_was_not_asked_how_counts_no_more(soak: ModuleType) -> None:
    child = os.fork()
    if child == 0:
        time.sleep(0.5)
        os._exit(0)
    watch = soak.Watch(child, every=0.1)
    watch.start()
    time.sleep(1.0)
    os.waitpid(child, 0)
    assert len(watch.memory) > 2
    assert min(watch.memory) > 1

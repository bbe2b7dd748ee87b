"""Ctrl-C as a user presses it: on a process of its own, from outside."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from rlhf_lightning.__main__ import main
from rlhf_lightning.interruption import Interruption

TINY = "{hidden_size: 16, intermediate_size: 32, num_attention_heads: 2, num_key_value_heads: 2}"
SFT = ["--model=SFTModule", "--model.model=builtin:demo", "--model.pretrained=false", "--trainer.max_steps=20"]
SFT += [f"--model.config_overrides={TINY}", "--data=DemonstrationDataModule", "--data.source=builtin:demo/train"]
SFT += ["--data.limit=80", "--data.batch_size=4", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


class Slow(Callback):
    """Dwells in each step from the third on."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step >= 2:
            time.sleep(self.seconds)


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fit(folder: str, *more: str) -> int:
    return main(["fit", *SFT, f"--run_dir={folder}", *more])


def losses(folder: str) -> list[float]:
    log = Path(folder, "metrics.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [row["train/loss"] for row in rows if "train/loss" in row]


def last_checkpoint(folder: str) -> dict[str, Any]:
    return dict(torch.load(Path(folder, "checkpoints/last.ckpt"), weights_only=True))


def two_steps_are_done(*, saved: bool) -> bool:
    if not saved:
        return len(losses("run")) >= 2
    return Path("run/checkpoints/last.ckpt").exists() and last_checkpoint("run")["global_step"] == 2


def press_ctrl_c(*more: str, seconds: float, times: int = 1, group: bool = True) -> tuple[int, str]:
    """Start a fit of slow steps, press Ctrl-C once two are logged, or saved; return its status and what it said."""
    slow = ["--trainer.callbacks=test_interruption.Slow", f"--trainer.callbacks.seconds={seconds}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_lightning", "fit", *SFT, "--run_dir=run", *slow, *more],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of processes of its own, as a terminal makes it
        # Where the tests run in the background, a shell may have told them to ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    until, said = time.monotonic() + 120, ""
    while process.poll() is None and not two_steps_are_done(saved=times == 2) and time.monotonic() < until:
        time.sleep(0.02)
    for _ in range(times):
        (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
        while "finishing this step" not in said and (line := process.stderr.readline()):
            said += line
    with process:
        try:
            return process.wait(timeout=60), said + process.stderr.read()
        finally:
            process.kill()


def check_that_it_stopped_well(status: int, said: str) -> None:
    assert status == 130, said
    step = last_checkpoint("run")["global_step"]
    assert 3 <= step < 20
    assert f"checkpoint of step {step}: run/checkpoints/last.ckpt; --ckpt_path auto takes it up\n" in said
    assert len(losses("run")) == step
    assert not Path("run/model").exists()


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_run_that_ctrl_c_stopped_goes_on_as_if_it_had_not() -> None:
    check_that_it_stopped_well(*press_ctrl_c(seconds=0.5))
    assert fit("run", "--ckpt_path=auto") == 0
    assert fit("whole") == 0
    assert losses("run") == losses("whole")
    resumed, whole = last_checkpoint("run")["state_dict"], last_checkpoint("whole")["state_dict"]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert Path("run/model").exists()


def test_second_ctrl_c_does_not_wait_for_the_step() -> None:
    every_step = ["--trainer.callbacks+=RunCheckpoint", "--trainer.callbacks.every_n_steps=1"]
    status, said = press_ctrl_c(*every_step, seconds=600, times=2)
    assert status == 130, said
    assert last_checkpoint("run")["global_step"] == 2
    assert "checkpoint of step 2: run/checkpoints/last.ckpt; --ckpt_path auto takes it up\n" in said


@pytest.mark.slow
@pytest.mark.parametrize("group", [True, False])
def test_all_processes_stop_at_the_same_step_whichever_was_asked(group: bool) -> None:
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=9"]
    status, said = press_ctrl_c(*two, seconds=0.5, group=group)
    check_that_it_stopped_well(status, said)
    assert said.count("finishing this step") == 1 + group
    assert said.count("takes it up") == 1


def test_only_the_main_thread_listens_and_an_own_handler_stays() -> None:
    listener = threading.Thread(target=Interruption().listen)
    listener.start()
    listener.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interruption = Interruption()
        interruption.listen()
        interruption.forget()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_forked_data_worker_survives_the_first_ctrl_c() -> None:
    interruption = Interruption()
    interruption.listen()
    try:
        worker = os.fork()
        if worker == 0:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            os._exit(3 if interruption.asked else 0)
        assert os.waitpid(worker, 0)[1] == 0
    finally:
        interruption.forget()


#: Starts a further process as Lightning does, and waits.
STARTER = """
import subprocess, sys, time
further = "from rlhf_lightning.interruption import end_with_starter; import time; "
further += "end_with_starter(grace=0.1); print('there', flush=True); time.sleep(60)"
process = subprocess.Popen([sys.executable, "-c", further], stdout=subprocess.PIPE, text=True)
process.stdout.readline()
print(process.pid, flush=True)
time.sleep(60)
"""


def goes_on(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to look at processes")
@pytest.mark.parametrize(
    ("environment", "ends"),
    [({"LOCAL_RANK": "1"}, True), ({"LOCAL_RANK": "0"}, False), ({"LOCAL_RANK": "1", "SLURM_PROCID": "1"}, False)],
)
def test_further_process_ends_when_the_first_is_killed(environment: dict[str, str], ends: bool) -> None:
    command = [sys.executable, "-c", STARTER]
    with subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        further = int(starter.stdout.readline())
        starter.kill()
    until = time.monotonic() + (20 if ends else 2)
    while goes_on(further) and time.monotonic() < until:
        time.sleep(0.05)
    assert goes_on(further) is not ends
    if not ends:
        os.kill(further, signal.SIGKILL)

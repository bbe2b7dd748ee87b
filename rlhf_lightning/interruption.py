"""Signals as requests: a Ctrl-C waits for a good moment, a second one does not; SIGUSR1 has the job queued again.

And what no process is told of: that the one which started it was killed.
"""

import logging
import os
import signal
import subprocess
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

logger = logging.getLogger("rlhf_lightning")

#: Exit status of a process that Ctrl-C ended, as shells give it: 128 + SIGINT.
INTERRUPTED = 130
#: Exit status of a process that SIGTERM ended: 128 + SIGTERM.
TERMINATED = 143
#: Exit status of a process that a signal asked to stop and be started again: 128 + SIGUSR1.
REQUEUE = 138


def end_with_starter(grace: float = 10.0) -> None:
    """Have a further process of a run, started by its first, end some seconds after that one is gone.

    One that is killed (SIGKILL, or by the system where memory runs out) tells nobody. The others would wait for it in
    their next exchange, in the first one for half an hour, and keep the GPU's memory that the run needs to start again.
    What torchrun and SLURM started is theirs to end.

    Args:
        grace: Seconds that a process may still take after the first one's end, which can be the regular one.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0" or os.environ.keys() & {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"}:
        return
    threading.Thread(target=_end_with, args=(os.getppid(), grace), daemon=True).start()


def _end_with(starter: int, grace: float) -> None:
    while os.getppid() == starter:
        time.sleep(1)
    time.sleep(grace)
    os._exit(1)


class Interruption:
    """Takes note of the first SIGINT while it listens; the second raises ``KeyboardInterrupt``, as any would.

    SIGUSR1, which SLURM sends before a job's time is up (``#SBATCH --signal=USR1@120``), is taken note of too.
    Lightning's own handler saves right where the signal arrives, within a step. Of several processes each takes note of
    SIGTERM too: within the signal, Lightning's handler waits for an exchange with the other processes, which may be
    waiting for one of another kind.

    Attributes:
        asked: Whether this process was asked to stop.
        requeue: Whether it was asked so by SIGUSR1, to be started again.
        terminated: Whether it was asked so by SIGTERM; of several processes alone.
        agreed: Whether all processes of the run are to stop now.

    Example:
        >>> before = signal.signal(signal.SIGINT, signal.default_int_handler)
        >>> interruption = Interruption()
        >>> interruption.listen()
        >>> signal.raise_signal(signal.SIGINT)
        >>> interruption.asked
        True
        >>> interruption.forget()
        >>> interruption.asked, signal.getsignal(signal.SIGINT) is signal.default_int_handler
        (False, True)
        >>> _ = signal.signal(signal.SIGINT, before)
    """

    def __init__(self) -> None:
        self.asked = self.requeue = self.terminated = self.agreed = False
        self._postponed = False
        self._others: list[Any] = []  # that SIGTERM is to reach too
        self._listener = 0  # process that listens
        self._requeue_signal = getattr(signal, "SIGUSR1", None)  # Windows has none
        self._in_slurm = False

    @property
    def status(self) -> int:
        """Exit status of a process that was asked to stop."""
        return REQUEUE if self.requeue else TERMINATED if self.terminated else INTERRUPTED

    def take_over_requeue(self, trainer: "Trainer") -> None:
        """Keep Lightning from queueing the job again by itself, and remember whether it would have."""
        from lightning.pytorch.plugins.environments import SLURMEnvironment

        environment = trainer._accelerator_connector.cluster_environment  # There is no public name.
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._in_slurm, environment.auto_requeue = True, False
            self._requeue_signal = environment.requeue_signal or self._requeue_signal

    def ask_for_requeue(self, trainer: "Trainer") -> None:
        """Have SLURM queue the job again where SIGUSR1 stopped it; to be called once all is saved."""
        if not (self.agreed and self.requeue and self._in_slurm and trainer.is_global_zero):
            return
        job, array = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_ARRAY_JOB_ID")
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else job
        try:
            subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
            logger.warning("SLURM job %s is queued again", job)
        except (OSError, subprocess.CalledProcessError) as failure:
            logger.warning("scontrol requeue %s failed (%s); queue the job again yourself", job, failure)

    def listen(self, *, several: bool = False) -> None:
        """Begin; only in the main thread, and only where nobody else has decided what a signal does.

        Args:
            several: Whether the run has several processes. SIGTERM is Lightning's again when the run has ended.
        """
        self.forget()
        if threading.current_thread() is not threading.main_thread():
            return
        if several:
            before = signal.signal(signal.SIGTERM, self._note)
            if before != self._note:
                self._others = list(getattr(before, "signal_handlers", [None]))[1:]  # the first is Lightning's own
            self._listener = os.getpid()
        for number, default in self._defaults():
            if signal.getsignal(number) is default:
                signal.signal(number, self._note)
                self._listener = os.getpid()

    def forget(self) -> None:
        """End, and leave the handlers as they were found."""
        self.asked = self.requeue = self.terminated = self.agreed = False
        if self._listener == os.getpid() and threading.current_thread() is threading.main_thread():
            self._listener = 0
            for number, default in self._defaults():
                if signal.getsignal(number) == self._note:  # Lightning ignores further signals while it ends.
                    signal.signal(number, default)

    def _defaults(self) -> list[tuple[int, Any]]:
        requeue = [] if self._requeue_signal is None else [(self._requeue_signal, signal.SIG_DFL)]
        return [(signal.SIGINT, signal.default_int_handler), *requeue]

    def stops(self, trainer: "Trainer") -> bool:
        """Agree with the other processes, and :meth:`stop` where any was asked.

        All processes have to call this at the same point: Ctrl-C reaches them one after the other, or only one of them.
        """
        from rlhf_lightning.distributed import any_process  # imports torch, which the command line wants to do late

        self.go_on(trainer)
        agreed, requeue, terminated = any_process(*self.requests)
        if agreed:
            self.stop(trainer, requeue=requeue, terminated=terminated)
        return agreed

    @property
    def requests(self) -> tuple[bool, bool, bool]:
        """What this process was asked: to stop, by SIGUSR1, by SIGTERM."""
        return self.asked, self.requeue, self.terminated

    def stop(self, trainer: "Trainer", *, requeue: bool = False, terminated: bool = False) -> None:
        """Have Lightning stop as at SIGTERM: it logs the step, validates where due, and raises ``SIGTERMException``."""
        self.agreed, self.requeue, self.terminated = True, requeue, terminated
        trainer._signal_connector.received_sigterm = True  # There is no public way to ask for it.

    def postpone(self, trainer: "Trainer") -> None:
        """Hold back a SIGTERM that Lightning has noted, until :meth:`go_on`."""
        if trainer._signal_connector.received_sigterm:
            self._postponed, trainer._signal_connector.received_sigterm = True, False

    def go_on(self, trainer: "Trainer") -> None:
        """Let Lightning see what was held back."""
        if self._postponed:
            self._postponed, trainer._signal_connector.received_sigterm = False, True

    def wait(self, trainer: "Trainer") -> None:
        """Take back what :meth:`stops` asked for, until it is called again."""
        if self.agreed:
            trainer._signal_connector.received_sigterm = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._listener:
            return  # A forked data worker inherits the handler; it has to serve the step that is being finished.
        if signum == self._requeue_signal:
            logger.warning("asked to be queued again: finishing this step, then saving")
            self.asked = self.requeue = True
            return
        if signum == signal.SIGTERM:
            logger.warning("asked to stop: finishing this step, then saving")
            self.asked = self.terminated = True
            for handler in filter(callable, self._others):
                handler(signum, frame)
            return
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        logger.warning("finishing this step, then saving; press Ctrl-C again to stop at once")

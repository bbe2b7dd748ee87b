"""Ctrl-C as a request: the first one waits for a good moment, the second one does not."""

import logging
import os
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

logger = logging.getLogger("rlhf_lightning")

#: Exit status of a process that Ctrl-C ended, as shells give it: 128 + SIGINT.
INTERRUPTED = 130


class Interruption:
    """Takes note of the first SIGINT while it listens; the second raises ``KeyboardInterrupt``, as any would.

    Attributes:
        asked: Whether this process was asked to stop.
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
        self.asked = self.agreed = False
        self._postponed = False
        self._listener = 0  # process that listens

    def listen(self) -> None:
        """Begin; only in the main thread, and only where nobody else has decided what SIGINT does."""
        self.forget()
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._listener = os.getpid()

    def forget(self) -> None:
        """End, and leave the handler as it was found."""
        self.asked = self.agreed = False
        if self._listener == os.getpid() and threading.current_thread() is threading.main_thread():
            self._listener = 0
            if signal.getsignal(signal.SIGINT) == self._note:  # Lightning ignores further signals while it ends.
                signal.signal(signal.SIGINT, signal.default_int_handler)

    def stops(self, trainer: "Trainer") -> bool:
        """Agree with the other processes, and :meth:`stop` where any was asked.

        All processes have to call this at the same point: Ctrl-C reaches them one after the other, or only one of them.
        """
        from rlhf_lightning.distributed import any_process  # imports torch, which the command line wants to do late

        self.go_on(trainer)
        (agreed,) = any_process(self.asked)
        if agreed:
            self.stop(trainer)
        return agreed

    def stop(self, trainer: "Trainer") -> None:
        """Have Lightning stop as at SIGTERM: it logs the step, validates where due, and raises ``SIGTERMException``."""
        self.agreed = True
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
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        logger.warning("finishing this step, then saving; press Ctrl-C again to stop at once")

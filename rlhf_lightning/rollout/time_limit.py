"""Code of the user's own, given a limited time."""

import signal
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

ResultT = TypeVar("ResultT")


class TooLong(BaseException):
    """Raised where the time is over; no ``Exception``, which the user's code may catch to try again.

    Attributes:
        place: File and line that were reached, in brackets behind a blank.
    """

    def __init__(self, frame: FrameType | None) -> None:
        super().__init__()
        lines = traceback.extract_stack(frame, limit=1) if frame is not None else []
        self.place = f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""


def call_within(seconds: float | None, function: Callable[[], ResultT]) -> ResultT:
    """Call a function, and give up waiting for it after some time.

    In the main thread an alarm of the system (``SIGALRM``) interrupts it, in sleeping, in reading from a network and
    between any two steps of Python, though not within a foreign library that does not return. Elsewhere, and where the
    alarm has another use, it runs in a thread of its own, which is left behind when its time is over: to be followed by
    the end of the process.

    Args:
        seconds: Time limit; ``None`` is none.
        function: Takes nothing.

    Raises:
        TooLong: If it has not returned in time.

    Example:
        >>> call_within(5.0, lambda: 3)
        3
    """
    if seconds is None:
        return function()
    if threading.current_thread() is threading.main_thread() and _alarm_is_free():
        return _under_alarm(seconds, function)
    return _in_thread(seconds, function)


def _alarm_is_free() -> bool:
    return hasattr(signal, "setitimer") and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def _under_alarm(seconds: float, function: Callable[[], ResultT]) -> ResultT:
    def ring(signum: int, frame: FrameType | None) -> None:
        raise TooLong(frame)

    before = signal.signal(signal.SIGALRM, ring)
    # It rings on, as a bare `except:` may swallow it once.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        return function()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _in_thread(seconds: float, function: Callable[[], ResultT]) -> ResultT:
    outcome: dict[str, Any] = {}
    gradients = torch.is_grad_enabled()

    def run() -> None:
        try:
            with torch.set_grad_enabled(gradients):  # which each thread has of its own
                outcome["result"] = function()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True, name="reward function")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TooLong(None)
    if "error" in outcome:
        raise outcome["error"]
    result: ResultT = outcome["result"]
    return result

import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_lightning.rollout.time_limit import TooLong, call_within


def in_thread(function: Callable[[], Any]) -> Any:
    """Call a function in a thread that is not the main one, and return or raise what it does."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert found, "it hangs"
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def here(function: Callable[[], Any]) -> Any:
    return function()


def sleeps() -> None:
    time.sleep(60)


def spins() -> None:
    while True:
        pass


def searches() -> None:
    re.match(r"(a+)+$", "a" * 60 + "b")  # takes exponentially long


def tries_again() -> None:
    for _ in range(4):
        try:
            time.sleep(60)
        except Exception:
            continue


def swallows() -> None:
    try:
        time.sleep(60)
    except:  # noqa: E722
        time.sleep(60)


@pytest.mark.parametrize("hangs", [sleeps, spins, searches, tries_again, swallows])
def test_what_does_not_return_is_given_up(hangs: Callable[[], None]) -> None:
    began = time.monotonic()
    with pytest.raises(TooLong) as limit:
        call_within(0.1, hangs)
    assert time.monotonic() - began < 3
    assert re.fullmatch(r" \(test_time_limit\.py, line \d+\)", limit.value.place) or hangs is searches


def test_beside_the_main_thread_it_is_left_behind() -> None:
    with pytest.raises(TooLong):
        in_thread(lambda: call_within(0.1, sleeps))


@pytest.mark.parametrize("where", [here, in_thread])
@pytest.mark.parametrize("seconds", [None, 5.0])
def test_what_returns_in_time_is_as_if_called(where: Callable[..., Any], seconds: float | None) -> None:
    assert where(lambda: call_within(seconds, lambda: [1, 2])) == [1, 2]
    with pytest.raises(KeyError, match="no"):
        where(lambda: call_within(seconds, lambda: dict[str, int]()["no"]))

    def gradients() -> bool:
        with torch.no_grad():
            return call_within(seconds, torch.is_grad_enabled)

    assert where(gradients) is False


def test_the_alarm_is_left_as_it_was_found() -> None:
    before = signal.getsignal(signal.SIGALRM)
    call_within(5.0, lambda: None)
    with pytest.raises(TooLong):
        call_within(0.05, sleeps)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_an_alarm_of_somebody_elses_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(TooLong):
            call_within(0.1, sleeps)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        time.sleep(0.4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rung == [signal.SIGALRM]

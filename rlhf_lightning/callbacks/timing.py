"""How far a run is and how long it will take."""

import lightning.pytorch as pl

#: Shares of an iteration that its phases take, believed until one iteration has been timed.
FIRST_GUESS = {"rollout": 0.5, "score": 0.1, "update": 0.4}


def run_ends(trainer: pl.Trainer) -> bool:
    """Tell whether the present step is the last by a limit of steps or epochs; what stops early cannot be foreseen."""
    steps, epochs = trainer.fit_loop.max_steps, trainer.fit_loop.max_epochs
    if 0 <= steps <= trainer.global_step:
        return True
    return epochs is not None and trainer.is_last_batch and 0 <= epochs <= trainer.current_epoch + 1


class PhaseTimer:
    """Turns "phase, done of total" into the share of the iteration that is done.

    The phases of an iteration follow one another. How long each takes, relative to the others, is measured in the
    previous iteration, and guessed in the first.

    Example:
        >>> timer = PhaseTimer()
        >>> timer.advance("rollout", 32, 64, now=0.0)
        0.25
        >>> timer.advance("update", 0, 4, now=6.0)
        0.6
        >>> timer.finish(now=8.0)
        >>> timer.advance("rollout", 1, 2, now=8.0)
        0.375
    """

    def __init__(self) -> None:
        self._expected = dict(FIRST_GUESS)
        self._measured: dict[str, float] = {}
        self._phase: str | None = None
        self._since = 0.0
        self._share = 0.0

    def advance(self, phase: str, done: int, total: int, *, now: float) -> float:
        """Take note of where the iteration is.

        Args:
            phase: Name of the phase, such as "rollout".
            done: Parts of the phase that are done.
            total: Parts that it has.
            now: A clock's seconds.

        Returns:
            Share of the iteration that is done, in [0, 1]; it never falls within an iteration.
        """
        if phase != self._phase:
            self._close(now)
            self._phase = phase
        names = list(self._expected)
        before = names[: names.index(phase)] if phase in names else [name for name in names if name in self._measured]
        passed = sum(self._expected[name] for name in before)
        current = self._expected.get(phase, 0.0) * (min(done / total, 1.0) if total else 0.0)
        whole = sum(self._expected.values())
        self._share = max(self._share, (passed + current) / whole if whole else 0.0)
        return self._share

    def finish(self, *, now: float) -> None:
        """End the iteration: what was measured is what the next one expects."""
        self._close(now)
        if self._measured:
            self._expected = self._measured
        self._measured, self._phase, self._share = {}, None, 0.0

    def _close(self, now: float) -> None:
        """Add the time since the last change of phase to the phase that ends."""
        if self._phase is not None:
            self._measured[self._phase] = self._measured.get(self._phase, 0.0) + now - self._since
        self._since = now


def seconds_left(*, done: float, begun_at: float, total: float | None, elapsed: float) -> float | None:
    """Estimate the time to the end from the mean speed since this launch.

    Args:
        done: Iterations done, with the share of the current one.
        begun_at: Iterations done before this launch (a resumed run), which took none of ``elapsed``.
        total: Iterations of the whole run; ``None`` where it has no end.
        elapsed: Seconds since this launch.

    Returns:
        Seconds, or ``None`` where there is nothing to estimate from.

    Example:
        >>> seconds_left(done=12.5, begun_at=10, total=20, elapsed=50.0)
        150.0
    """
    if total is None or done <= begun_at:
        return None
    return max(0.0, elapsed * (total - done) / (done - begun_at))


def clock(seconds: float | None) -> str:
    """Write a time span the way a clock shows it; ``None`` is unknown.

    Example:
        >>> clock(65.2), clock(3671), clock(180000), clock(None)
        ('1:05', '1:01:11', '2d 02:00', '?')
    """
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

import pytest

from rlhf_lightning.callbacks.timing import FIRST_GUESS, PhaseTimer, clock, seconds_left


def test_the_first_iteration_is_shared_out_by_guess() -> None:
    timer = PhaseTimer()
    assert timer.advance("rollout", 1, 2, now=0) == pytest.approx(FIRST_GUESS["rollout"] / 2)
    assert timer.advance("score", 0, 5, now=1) == pytest.approx(FIRST_GUESS["rollout"])
    assert timer.advance("update", 4, 4, now=2) == pytest.approx(1)


def test_the_next_iteration_is_shared_out_as_measured() -> None:
    timer = PhaseTimer()
    for phase, begin in (("rollout", 0.0), ("score", 6.0), ("update", 7.0)):
        timer.advance(phase, 0, 1, now=begin)
    timer.finish(now=10.0)  # 6, 1 and 3 seconds
    assert timer.advance("rollout", 1, 4, now=10.0) == pytest.approx(0.15)
    assert timer.advance("score", 1, 2, now=16.0) == pytest.approx(0.65)
    assert timer.advance("update", 1, 3, now=17.0) == pytest.approx(0.8)


def test_phases_with_other_names_are_learnt() -> None:
    timer = PhaseTimer()
    timer.advance("tune", 0, 1, now=0.0)
    timer.advance("grow", 0, 1, now=1.0)
    timer.finish(now=4.0)
    assert timer.advance("grow", 1, 3, now=5.0) == pytest.approx(0.5)


def test_the_share_never_falls_within_an_iteration_and_starts_anew_after_it() -> None:
    timer = PhaseTimer()
    high = timer.advance("update", 1, 2, now=0.0)
    assert timer.advance("rollout", 0, 2, now=1.0) == high
    timer.finish(now=2.0)
    assert timer.advance("rollout", 0, 2, now=3.0) < high


def test_a_phase_of_no_parts_counts_as_not_begun() -> None:
    assert PhaseTimer().advance("rollout", 0, 0, now=0.0) == 0


def test_the_time_left_follows_from_this_launch_alone() -> None:
    # Resumed at 10 of 20; 2.5 done in 50 seconds, 7.5 to do.
    assert seconds_left(done=12.5, begun_at=10, total=20, elapsed=50) == pytest.approx(150)
    assert seconds_left(done=20, begun_at=10, total=20, elapsed=50) == 0


def test_nothing_is_estimated_from_nothing() -> None:
    assert seconds_left(done=10, begun_at=10, total=20, elapsed=50) is None
    assert seconds_left(done=10, begun_at=0, total=None, elapsed=50) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599.6, "1:00:00"), (172800, "2d 00:00")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text

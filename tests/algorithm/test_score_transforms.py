import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, multiprocessing

from rlhf_lightning.algorithm.score_transforms import (
    MissingEOSPenalty,
    MissingEOSScore,
    RunningNormalization,
    ScoreClip,
    ScoreTransform,
    load_transforms,
)
from rlhf_lightning.errors import UserError

ALL = torch.ones(4, dtype=torch.bool)


def test_score_clip_limit_changes_the_scores() -> None:
    scores = torch.tensor([-7.0, -1.0, 2.0, 9.0])
    assert ScoreClip(5.0)(scores, ALL).tolist() == [-5, -1, 2, 5]
    assert ScoreClip(1.5)(scores, ALL).tolist() == [-1.5, -1, 1.5, 1.5]


def test_missing_eos_penalty_is_subtracted_where_nothing_stopped() -> None:
    scores, finished = torch.tensor([1.0, 1.0, -2.0]), torch.tensor([True, False, False])
    assert MissingEOSPenalty(0.5)(scores, finished).tolist() == [1.0, 0.5, -2.5]
    assert MissingEOSPenalty(0.0)(scores, finished).tolist() == [1.0, 1.0, -2.0]


def test_missing_eos_score_replaces_where_nothing_stopped() -> None:
    scores, finished = torch.tensor([1.0, 9.0, math.nan]), torch.tensor([True, False, False])
    assert MissingEOSScore(-1.0)(scores, finished).tolist() == [1, -1, -1]
    assert MissingEOSScore(-3.0)(scores, finished).tolist() == [1, -3, -3]


class TestRunningNormalization:
    def test_by_hand(self) -> None:
        transform = RunningNormalization()
        # 1, 3: mean 2, standard deviation 1. A batch is taken in before it is normalised.
        assert transform(torch.tensor([1.0, 3.0]), ALL[:2]).tolist() == [-1, 1]
        # 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5.
        result = transform(torch.tensor([5.0, 7.0]), ALL[:2])
        torch.testing.assert_close(result, torch.tensor([1.0, 3.0]) / math.sqrt(5))
        assert transform.moments == (4, 4.0, 20.0)

    def test_center_changes_the_shift_alone(self) -> None:
        scores = torch.tensor([1.0, 3.0])
        assert RunningNormalization(center=False)(scores, ALL[:2]).tolist() == [1, 3]
        assert RunningNormalization(center=False)(10 * scores, ALL[:2]).tolist() == [1, 3]
        assert RunningNormalization(center=True)(10 * scores, ALL[:2]).tolist() == [-1, 1]

    def test_responses_that_are_not_trained_on_stay_out_of_the_statistics(self) -> None:
        transform = RunningNormalization()
        transform(torch.tensor([1.0, 3.0]), ALL[:2])
        assert transform(torch.tensor([100.0, 2.0]), ALL[:2], update=False).tolist() == [98, 0]
        assert transform.moments == (2, 2.0, 2.0)

    @pytest.mark.parametrize("score", [0.1, 0.0, -1e6])
    def test_equal_scores_are_not_divided(self, score: float) -> None:
        scores = torch.full((7,), score)
        assert RunningNormalization(center=False)(scores, scores == score).tolist() == scores.tolist()
        torch.testing.assert_close(RunningNormalization()(scores, scores == score), torch.zeros(7), atol=1e-6, rtol=0)
        single = RunningNormalization(center=False)
        assert single(torch.tensor([2.0]), ALL[:1]).tolist() == [2]

    @settings(deadline=None)
    @given(
        cuts=st.lists(st.integers(1, 6), min_size=1, max_size=8), shift=st.floats(-100, 100), seed=st.integers(0, 99)
    )
    def test_the_cut_into_batches_changes_nothing(self, cuts: list[int], shift: float, seed: int) -> None:
        scores = torch.randn(sum(cuts), generator=torch.Generator().manual_seed(seed)) + shift
        transform = RunningNormalization()
        for part in scores.split(cuts):
            transform(part, part == part)
        exact = scores.double()
        assert transform.moments.number == len(scores)
        assert transform.moments.mean == pytest.approx(float(exact.mean()), abs=1e-4)
        assert transform.std == pytest.approx(float(exact.std(correction=0)), abs=1e-4)

    def test_a_resumed_run_goes_on_with_the_statistics(self) -> None:
        torch.manual_seed(0)
        batches = torch.randn(4, 4)
        whole, first, second = RunningNormalization(), RunningNormalization(), RunningNormalization()
        for batch in batches[:3]:
            whole(batch, ALL)
        for batch in batches[:2]:
            first(batch, ALL)
        state = first.state_dict()
        assert {type(value) for value in state.values()} <= {int, float}
        second.load_state_dict(state)
        assert torch.equal(second(batches[2], ALL), second(batches[2], ALL, update=False))
        assert second.moments == whole.moments
        assert torch.equal(second(batches[3], ALL), whole(batches[3], ALL))
        assert not torch.equal(RunningNormalization()(batches[3], ALL), whole(batches[3], ALL))

    def test_a_score_that_is_not_finite_is_refused(self) -> None:
        transform = RunningNormalization()
        with pytest.raises(UserError, match="a score is not finite"):
            transform(torch.tensor([1.0, math.inf]), ALL[:2])
        assert transform.moments.number == 0


def test_states_are_loaded_into_the_transforms_that_kept_them() -> None:
    kept = RunningNormalization()
    kept(torch.tensor([1.0, 3.0]), torch.tensor([True, True]))
    saved = [{"class": "ScoreClip", "state": {}}, {"class": "RunningNormalization", "state": kept.state_dict()}]
    again = RunningNormalization()
    load_transforms([again, MissingEOSPenalty()], saved)  # those without a state may come and go
    assert again.moments == kept.moments
    for others in ([], [ScoreClip()], [RunningNormalization(), RunningNormalization()]):
        with pytest.raises(UserError, match="the checkpoint holds statistics of RunningNormalization, but"):
            load_transforms(others, saved)


def test_those_without_a_state_load_and_save_nothing() -> None:
    for transform in (ScoreClip(), MissingEOSPenalty(), MissingEOSScore()):
        assert transform.state_dict() == {}
        transform.load_state_dict({})
    with pytest.raises(NotImplementedError):
        ScoreTransform()(torch.zeros(1), ALL[:1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreClip(0.0), r"ScoreClip: limit is 0\.0; it must be above 0"),
        (lambda: ScoreClip(math.nan), "ScoreClip: limit is nan"),
        (lambda: MissingEOSPenalty(math.inf), "MissingEOSPenalty: penalty is inf; it must be at least 0"),
        (lambda: MissingEOSPenalty(-1.0), r"MissingEOSPenalty: penalty is -1\.0; it must be at least 0"),
        (lambda: MissingEOSScore(math.nan), "MissingEOSScore: score is nan; it must be finite"),
    ],
)
def test_settings_out_of_range_are_refused(make: type[ScoreTransform], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


SCORES = [[1.0, 2.0, 6.0], [7.0]]


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    transform, scores = RunningNormalization(), torch.tensor(SCORES[rank])
    results = [transform(scores, scores > 0).tolist(), transform(scores + rank, scores > 0).tolist()]
    torch.save([results, transform.state_dict()], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_normalise_by_the_statistics_of_both() -> None:
    alone = RunningNormalization()
    first = alone(torch.tensor([*SCORES[0], *SCORES[1]]), ALL)
    second = alone(torch.tensor([*SCORES[0], SCORES[1][0] + 1]), ALL)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_one_of_two, args=(folder,), nprocs=2)
        for rank, rows in ((0, slice(0, 3)), (1, slice(3, 4))):
            results, state = torch.load(Path(folder) / f"{rank}.pt")
            torch.testing.assert_close(torch.tensor(results[0]), first[rows])
            torch.testing.assert_close(torch.tensor(results[1]), second[rows])
            assert state == pytest.approx(alone.state_dict(), rel=1e-6)

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from rlhf_lightning.metrics import MarginStatistics, MaskedMean, RewardAccuracy, TieShare

CHOSEN = torch.tensor([1.0, 2.0, 0.5, 0.0, -1.0, 3.0, 2.0])
REJECTED = torch.tensor([0.0, 2.0, 1.5, -1.0, -1.0, 1.0, 2.5])
# chosen > rejected: 1st, 4th, 6th; equal: 2nd, 5th; less: 3rd, 7th.
ACCURACY = (3 + 2 / 2) / 7
MARGINS = [-1.0, -0.5, 0.0, 0.0, 1.0, 1.0, 2.0]


def test_accuracy_counts_a_tie_as_half() -> None:
    metric = RewardAccuracy()
    metric.update(CHOSEN, REJECTED)
    assert metric.compute().item() == pytest.approx(ACCURACY)


@pytest.mark.parametrize("metric", [RewardAccuracy(), TieShare(), MarginStatistics(), MaskedMean()])
def test_after_a_validation_a_fit_can_go_on(metric: Metric) -> None:
    """Lightning validates in inference mode, whose tensors take no change in place afterwards."""
    values = (CHOSEN,) if isinstance(metric, MaskedMean) else (CHOSEN, REJECTED)
    with torch.inference_mode():
        metric.update(*values)
        before = metric.compute()
        metric.reset()
    metric.update(*values)
    assert str(metric.compute()) == str(before)


def test_a_constant_scorer_has_accuracy_one_half_and_only_ties() -> None:
    accuracy, ties = RewardAccuracy(), TieShare()
    for metric in (accuracy, ties):
        metric.update(torch.full((5,), 0.3), torch.full((5,), 0.3))
    assert accuracy.compute().item() == 0.5
    assert ties.compute().item() == 1.0


def test_nan_counts_as_wrong_and_not_as_a_tie() -> None:
    accuracy, ties = RewardAccuracy(), TieShare()
    for metric in (accuracy, ties):
        metric.update(torch.tensor([torch.nan, 1.0]), torch.tensor([0.0, 0.0]))
    assert accuracy.compute().item() == 0.5
    assert ties.compute().item() == 0.0


def test_a_short_last_batch_weighs_by_its_pairs() -> None:
    metric = RewardAccuracy()
    metric.update(CHOSEN[:6], REJECTED[:6])  # (3 + 1) / 6
    metric.update(CHOSEN[6:], REJECTED[6:])  # 0 / 1: the mean of means would be 0.333
    assert metric.compute().item() == pytest.approx(ACCURACY)


def test_margins_by_hand() -> None:
    metric = MarginStatistics()
    metric.update(CHOSEN[:3], REJECTED[:3])
    metric.update(CHOSEN[3:], REJECTED[3:])
    result = metric.compute()
    mean = 2.5 / 7
    assert metric.gather().tolist() == MARGINS
    assert result["mean"].item() == pytest.approx(mean)
    assert result["std"].item() == pytest.approx((sum((m - mean) ** 2 for m in MARGINS) / 7) ** 0.5)
    assert result["median"].item() == 0.0
    # Position 0.25 * 6 = 1.5: halfway from -0.5 to 0. Position 0.95 * 6 = 5.7: 1 + 0.7 * (2 - 1).
    assert result["q25"].item() == pytest.approx(-0.25)
    assert result["q95"].item() == pytest.approx(1.7)


def test_gathering_the_margins_leaves_the_metric_open_for_updates() -> None:
    metric = MarginStatistics()
    metric.update(CHOSEN[:1], REJECTED[:1])
    assert metric.gather().tolist() == [1.0]
    metric.update(CHOSEN[2:3], REJECTED[2:3])
    assert metric.gather().tolist() == [-1.0, 1.0]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_without_pairs_every_value_is_nan() -> None:
    assert all(value.isnan() for value in MarginStatistics().compute().values())
    assert RewardAccuracy().compute().isnan()
    assert MaskedMean().compute().isnan()


def test_masked_mean_weighs_tokens_and_ignores_what_is_masked() -> None:
    metric = MaskedMean()
    metric.update(torch.tensor([[1.0, torch.nan], [3.0, 5.0]]), torch.tensor([[True, False], [True, True]]))
    metric.update(torch.tensor(10.0), 7)
    metric.update(torch.tensor([2.0, 4.0]))
    assert metric.compute().item() == pytest.approx((9 + 70 + 6) / (3 + 7 + 2))


def test_masked_mean_counts_exactly_where_float32_would_stop() -> None:
    metric = MaskedMean()
    metric.update(torch.tensor(1.0), 2**24)
    metric.update(torch.tensor(1.0), 1)  # in float32, 2**24 + 1 is 2**24
    assert metric.count.item() == 2**24 + 1


@pytest.mark.parametrize("metric", [RewardAccuracy(), TieShare(), MarginStatistics()])
def test_pairs_of_different_shapes_are_refused(metric: RewardAccuracy | TieShare | MarginStatistics) -> None:
    with pytest.raises(ValueError, match=r"chosen has shape \(2,\) and rejected \(2, 1\)"):
        metric.update(torch.zeros(2), torch.zeros(2, 1))


def test_masked_mean_refuses_weights_that_are_no_counts() -> None:
    with pytest.raises(ValueError, match=r"bool or integer"):
        MaskedMean().update(torch.zeros(2), torch.tensor([0.5, 0.5]))


def _measure(chosen: Tensor, rejected: Tensor, batch: int) -> dict[str, Tensor]:
    """Feed batches of ``batch`` pairs (the last may be short) and return every value."""
    accuracy, ties, margins, mean = RewardAccuracy(), TieShare(), MarginStatistics(), MaskedMean()
    for start in range(0, len(chosen), batch):
        pair = chosen[start : start + batch], rejected[start : start + batch]
        for metric in (accuracy, ties, margins):
            metric.update(*pair)
        mean.update(pair[0], pair[0] >= 0)
    return {
        "accuracy": accuracy.compute(),
        "ties": ties.compute(),
        "mean": mean.compute(),
        "all": margins.gather(),
        **{f"margin_{name}": value for name, value in margins.compute().items()},
    }


def _run_as_process(rank: int, folder: str, cut: int) -> None:
    """What each of the two processes runs: rank 0 has the first ``cut`` pairs and rank 1 the others."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mine = slice(None, cut) if rank == 0 else slice(cut, None)
    torch.save(_measure(CHOSEN[mine], REJECTED[mine], 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("cut", [2, 7])
def test_two_processes_with_uneven_pairs_agree_with_one(tmp_path: Path, cut: int) -> None:
    # 2 + 5 pairs in 1 + 3 batches; and 7 + 0, where the second process never sees a pair.
    commands = [[sys.executable, __file__, str(rank), str(tmp_path), str(cut)] for rank in (0, 1)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    alone = _measure(CHOSEN, REJECTED, 3)
    for rank in (0, 1):
        together = torch.load(tmp_path / f"{rank}.pt")
        assert together.keys() == alone.keys()
        for name, value in alone.items():
            assert torch.equal(together[name], value), name


if __name__ == "__main__":
    _run_as_process(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))

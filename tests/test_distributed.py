import tempfile
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from rlhf_lightning.distributed import (
    any_process,
    first_text,
    gather_rows,
    global_max,
    global_mean_var,
    global_sum,
    is_distributed,
    leave_group,
    world_size,
)

NUMBERS = torch.tensor([[1.0, 2.0, 4.0], [9.0, 100.0, 7.0]])
MASK = torch.tensor([[True, True, True], [True, False, False]])
FIVE = torch.tensor([[0, 0], [1, 10], [2, 20], [3, 30], [4, 40]])


def test_one_process_is_the_whole_world() -> None:
    leave_group()  # there is none to leave
    assert not is_distributed()
    assert world_size() == 1
    assert global_sum(NUMBERS) is NUMBERS
    assert global_max(NUMBERS) is NUMBERS
    assert any_process(True, False) == [True, False]
    assert first_text("mine") == "mine"
    assert gather_rows(NUMBERS)[0] is NUMBERS
    assert gather_rows(NUMBERS)[1].tolist() == [0, 1]
    mean, var = global_mean_var(NUMBERS, MASK)
    assert mean.item() == 4  # (1 + 2 + 4 + 9) / 4
    assert var.item() == 9.5  # (9 + 4 + 0 + 25) / 4


def test_what_lies_under_the_mask_changes_nothing() -> None:
    dirty = torch.where(MASK, NUMBERS, torch.nan)
    assert [result.item() for result in global_mean_var(dirty, MASK)] == [4, 9.5]
    half = [result for result in global_mean_var(dirty.bfloat16(), MASK)]
    assert [result.dtype for result in half] == [torch.float32] * 2
    assert [result.item() for result in half] == [4, 9.5]


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mine = NUMBERS[rank].clone()
    results = {
        "world": world_size(),
        "sum": global_sum(mine).tolist(),
        "max": global_max(mine).tolist(),
        "max_with_nan": global_max(torch.tensor([1.0, 5.0 if rank else torch.nan])),
        "mine": mine.tolist(),
        "any": [any_process(True, False, rank == 1), any_process(rank == 0)],
        "texts": [first_text(str(rank)), first_text("late" * rank), first_text("")],
        # Of five rows dealt out in turn the first process has three.
        "rows": [part.tolist() for part in gather_rows(FIVE[rank::2])],
        "moments": [float(result) for result in global_mean_var(NUMBERS[rank], MASK[rank])],
    }
    leave_group()
    torch.save(results | {"world_afterwards": world_size()}, f"{folder}/{rank}.pt")


@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_agree_on_the_statistics_of_both() -> None:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_one_of_two, args=(folder,), nprocs=2)
        for rank in (0, 1):
            results = torch.load(Path(folder) / f"{rank}.pt")
            assert results["world"] == 2
            assert results["world_afterwards"] == 1
            assert results["sum"] == [10, 102, 11]
            assert results["max"] == [9, 100, 7]
            assert results["max_with_nan"][0] == 1
            assert results["max_with_nan"][1].isnan()
            assert results["rows"] == [FIVE.tolist(), [[0, 2, 4], [1, 3]][rank]]
            assert results["any"] == [[True, False, True], [True]]
            assert results["texts"] == ["0", "late", ""]
            assert results["mine"] == NUMBERS[rank].tolist()  # left as it was
            # Not the mean of the means, (7 / 3 + 9) / 2, nor the mean of the variances.
            assert results["moments"] == [4, 9.5]

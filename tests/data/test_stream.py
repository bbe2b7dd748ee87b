import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_lightning.data.stream import BatchStream, EvalBatches
from rlhf_lightning.errors import UserError

Batches = list[list[int]]


def stream(size: int = 10, batch_size: int = 4, **settings: Any) -> BatchStream[int, list[int]]:
    return BatchStream(range(size), batch_size, list, **{"seed": 1, **settings})


def passes(source: BatchStream[int, list[int]], number: int) -> Batches:
    return [batch for _ in range(number) for batch in source]


@given(size=st.integers(1, 20), batch_size=st.integers(1, 9), seed=st.integers(0, 3))
def test_every_pass_over_the_examples_has_each_once(size: int, batch_size: int, seed: int) -> None:
    batches = passes(stream(size, batch_size, seed=seed), 4)
    assert len(batches) == 4 * -(-size // batch_size)
    assert {len(batch) for batch in batches} == {batch_size}
    flat = [example for batch in batches for example in batch]
    for start in range(0, len(flat) - size + 1, size):
        assert sorted(flat[start : start + size]) == list(range(size)), "nothing is dropped where a batch straddles"
    assert Counter(flat[: len(flat) // size * size]) == Counter({i: len(flat) // size for i in range(size)})


def test_order_follows_from_seed_and_epoch_alone() -> None:
    first = passes(stream(30, 30), 3)
    assert first == passes(stream(30, 30), 3)
    assert len({tuple(epoch) for epoch in [*first, *passes(stream(30, 30, seed=2), 3)]}) == 6
    assert passes(stream(30, 7), 4)[0] == first[0][:7], "the batch size cuts the stream, it does not reorder it"
    torch.manual_seed(5)
    assert passes(stream(30, 30), 3) == first
    assert passes(stream(3, 2, shuffle=False), 2) == [[0, 1], [2, 0], [1, 2], [0, 1]]


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (12, 4), (3, 4), (1, 1)])
def test_resumed_anywhere_it_is_the_stream_never_stopped(size: int, batch_size: int) -> None:
    uninterrupted = passes(stream(size, batch_size), 9)
    length = len(stream(size, batch_size))
    for position in range(3 * length + 1):
        stopped = stream(size, batch_size)
        iterator = iter(stopped)
        for taken in range(position):  # the generator is left hanging, as Lightning leaves it at the end of an epoch
            if taken and taken % length == 0:
                iterator = iter(stopped)
            next(iterator)
        resumed = stream(size, batch_size)
        resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
        assert passes(resumed, 2) == uninterrupted[position : position + 2 * length]


def test_state_is_plain_and_counts_examples_before_they_are_handed_out() -> None:
    source = stream(10, 4)
    assert source.state_dict() == {"consumed": 0, "examples": 10, "seed": 1}
    next(iter(source))
    assert source.state_dict() == {"consumed": 4, "examples": 10, "seed": 1}


def test_state_goes_over_to_another_batch_size_and_number_of_ranks() -> None:
    flat = [example for batch in passes(stream(10, 1), 3) for example in batch]
    source = stream(10, 4)
    next(iter(source))
    ranks = [stream(10, 6, rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(source.state_dict())
    shares = [next(iter(rank)) for rank in ranks]
    assert sorted(shares[0] + shares[1]) == sorted(flat[4:10])


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_together_have_the_batch_of_one(world_size: int) -> None:
    whole = passes(stream(10, 6), 4)
    shares = [passes(stream(10, 6, rank=rank, world_size=world_size), 4) for rank in range(world_size)]
    for number, batch in enumerate(whole):
        assert [batch[rank::world_size] for rank in range(world_size)] == [share[number] for share in shares]


def test_wrong_numbers_and_another_stream_are_refused() -> None:
    with pytest.raises(UserError, match="batch size 5 does not divide among 2 processes"):
        stream(10, 5, world_size=2)
    with pytest.raises(UserError, match="batch size 0"):
        stream(10, 0)
    with pytest.raises(UserError, match="no training examples"):
        stream(0)
    with pytest.raises(UserError, match="on 10 examples, the data now has 11"):
        stream(11).load_state_dict(stream(10).state_dict())
    with pytest.raises(UserError, match="under seed 1, this run has 2"):
        stream(10, seed=2).load_state_dict(stream(10).state_dict())


@given(size=st.integers(1, 40), batch_size=st.integers(1, 12), world_size=st.integers(1, 5))
def test_evaluation_has_each_example_once_in_equally_many_batches(size: int, batch_size: int, world_size: int) -> None:
    def batches(rank: int) -> EvalBatches[int, list[int]]:
        return EvalBatches(range(size), batch_size, list, rank=rank, world_size=world_size)

    if size < world_size:
        with pytest.raises(UserError, match="at least one example per process"):
            batches(0)
        return
    shares = [list(batches(rank)) for rank in range(world_size)]
    assert sorted(example for share in shares for batch in share for example in batch) == list(range(size))
    assert {len(share) for share in shares} == {len(batches(0))}
    sizes = [len(batch) for share in shares for batch in share]
    assert min(sizes) >= 1
    assert max(sizes) <= max(1, batch_size // world_size) + (size % world_size != 0)
    if world_size == 1:
        assert len(shares[0]) == -(-size // batch_size)
        assert [example for batch in shares[0] for example in batch] == list(range(size))


class Recorder(pl.LightningModule):
    """Does nothing but write down its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: Batches = []

    def training_step(self, batch: list[int], batch_idx: int) -> Tensor:
        self.seen.append([int(example) for example in batch])
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.0)


class SaveEachStep(pl.Callback):
    """Writes a checkpoint after every step, where ModelCheckpoint does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize("limit", [1.0, 2])
def test_lightning_resumes_it_in_and_between_epochs(tmp_path: Path, limit: float) -> None:
    def fit(checkpoint: Path | None) -> Batches:
        module = Recorder()
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=3,
            limit_train_batches=limit,
            logger=False,
            callbacks=[] if checkpoint else [SaveEachStep(tmp_path)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, stream(10, 4), ckpt_path=checkpoint, weights_only=True)
        return module.seen

    uninterrupted = fit(None)
    assert len(uninterrupted) == (6 if limit == 2 else 9)
    for step in range(1, len(uninterrupted)):
        assert fit(tmp_path / f"{step}.ckpt") == uninterrupted[step:]

"""Batches of training sets that can be taken up where they stopped, and batches of evaluation sets that pad nothing."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.seeding import derived_generator

Example = TypeVar("Example")
Batch = TypeVar("Batch")


class BatchStream(Generic[Example, Batch]):
    """An endless, shuffled, resumable stream of batches, handed out ``len(self)`` at a time.

    The stream is one pass over the examples after another, each in an order that follows from ``(seed, epoch)``.
    Batches are cut from it without regard for where a pass ends, so that no example is ever left out and every batch is
    full. Its whole state is the number of examples consumed by all ranks, counted *before* a batch is handed out: what
    a checkpoint holds is right whenever it is written, and independent of batch size and number of ranks.

    Every ``iter()`` gives ``len(self)`` batches from wherever the stream stands; Lightning stops earlier where it
    resumes within an epoch.

    Args:
        examples: What to draw from.
        batch_size: Examples per batch over all ranks together; a multiple of ``world_size``.
        collate: Makes a batch of a list of examples.
        seed: The run's seed.
        rank: Of this process, in [0, world_size); its batch is every ``world_size``-th example of the global one.
        world_size: Number of processes.
        shuffle: False keeps the order of the examples in every pass.
        digest: What tells these examples from others, to be compared when the stream is taken up; ``None`` compares
            their number alone.

    Raises:
        UserError: If there are no examples, or the batch size does not divide among the ranks.

    Example:
        >>> stream = BatchStream("abc", batch_size=2, collate="".join, seed=0, shuffle=False)
        >>> list(stream), list(stream)
        (['ab', 'ca'], ['bc', 'ab'])
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        collate: Callable[[list[Example]], Batch],
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        digest: str | None = None,
    ) -> None:
        if not examples:
            raise UserError("there are no training examples; check the data source and the limits on length.")
        if batch_size < 1 or batch_size % world_size:
            raise UserError(
                f"batch size {batch_size} does not divide among {world_size} processes; give a positive multiple of it."
            )
        self.examples = examples
        self.batch_size = batch_size
        self.collate = collate
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.digest = digest
        self.consumed = 0
        """Examples handed out so far, over all ranks."""
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return math.ceil(len(self.examples) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(len(self)):
            start = self.consumed
            self.consumed += self.batch_size
            places = range(start + self.rank, start + self.batch_size, self.world_size)
            yield self.collate([self._example(place) for place in places])

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on from here: plain integers and a text, the same on every rank."""
        state = {"consumed": self.consumed, "examples": len(self.examples), "seed": self.seed}
        return state if self.digest is None else {**state, "digest": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where ``state`` was taken.

        Raises:
            UserError: If the data or the seed are not those of then, as the stream would be another.
        """
        if state["examples"] != len(self.examples):
            raise UserError(
                f"the checkpoint was written in training on {state['examples']} examples, the data now has "
                f"{len(self.examples)}; resume with the same data settings, or start a new run from the model folder."
            )
        if self.digest is not None and state.get("digest", self.digest) != self.digest:  # the first release kept none
            raise UserError(
                "the training rows are as many as when the checkpoint was written, but not the same (texts, order, "
                "labels, or how they are tokenised); resume with the same data and settings, or start a new run from "
                "the model folder."
            )
        if state["seed"] != self.seed:
            raise UserError(
                f"the checkpoint was written under seed {state['seed']}, this run has {self.seed}; resume with the "
                "same seed_everything, or start a new run from the model folder."
            )
        self.consumed = state["consumed"]

    def _example(self, place: int) -> Example:
        epoch, index = divmod(place, len(self.examples))
        if not self.shuffle:
            return self.examples[index]
        if self._order[0] != epoch:
            generator = derived_generator(self.seed, "example order", epoch)
            self._order = (epoch, torch.randperm(len(self.examples), generator=generator).tolist())
        return self.examples[self._order[1][index]]


class EvalBatches(Generic[Example, Batch]):
    """Every example exactly once, in order, shared out among the ranks without padding.

    Every rank gets the same number of batches, none of them empty, as ranks that take unequal numbers of steps wait for
    each other forever; the batches themselves are as even in size as they can be.

    Args:
        examples: What to evaluate.
        batch_size: Examples per batch over all ranks together, at most; where the examples do not divide among the
            ranks, a batch may hold one more.
        collate: Makes a batch of a list of examples.
        rank: Of this process, in [0, world_size); it takes every ``world_size``-th example.
        world_size: Number of processes.

    Raises:
        UserError: If there are fewer examples than ranks.

    Example:
        >>> [list(EvalBatches("abcdefg", batch_size=3, collate="".join))]
        [['abc', 'de', 'fg']]
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        collate: Callable[[list[Example]], Batch],
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(examples) < world_size or batch_size < 1:
            raise UserError(
                f"{len(examples)} evaluation examples cannot be shared out among {world_size} processes in batches of "
                f"{batch_size}; give at least one example per process and a batch size of at least 1."
            )
        self.examples = examples
        self.collate = collate
        self.rank = rank
        self.world_size = world_size
        longest_share = math.ceil(len(examples) / world_size)
        rank_batch_size = max(1, batch_size // world_size)
        self._batches = min(math.ceil(longest_share / rank_batch_size), len(examples) // world_size)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        share = range(self.rank, len(self.examples), self.world_size)
        size, longer = divmod(len(share), self._batches)
        end = 0
        for number in range(self._batches):
            start, end = end, end + size + (number < longer)
            yield self.collate([self.examples[place] for place in share[start:end]])

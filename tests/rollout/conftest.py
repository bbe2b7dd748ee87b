"""Prompts to sample from."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rlhf_lightning.functional.sequences import pad_sequences


class Prompts(NamedTuple):
    """Left-padded prompts and what hides in their padding."""

    ids: Tensor
    mask: Tensor


@pytest.fixture(scope="session")
def make_prompts() -> Callable[..., Prompts]:
    """``make_prompts(rows, pad_id=0)`` pads rows of ids on the left."""

    def make(rows: list[list[int]], pad_id: int = 0) -> Prompts:
        ids, lengths = pad_sequences(rows, pad_id=pad_id, left=True)
        return Prompts(ids, torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None])

    return make

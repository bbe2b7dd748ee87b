"""The share of repeated n-grams, against counting by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional.repetition import repeated_fraction


@given(st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=4), st.integers(1, 5))
def test_against_counting(responses: list[list[int]], n: int) -> None:
    tokens, mask = torch.full((len(responses), 12), 7), torch.zeros(len(responses), 12, dtype=torch.bool)
    for row, ids in enumerate(responses):
        tokens[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64), True
    for share, ids in zip(repeated_fraction(tokens, mask, n=n).tolist(), responses, strict=True):
        ends = range(n, len(ids) + 1)
        repeated = sum(any(ids[end - n : end] == ids[at - n : at] for at in range(n, end)) for end in ends)
        assert share == pytest.approx(repeated / len(ends) if ends else 0.0)

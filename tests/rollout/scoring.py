"""Responses to be scored."""

from typing import Any

import torch

from rlhf_lightning.functional.sequences import SequenceBatch, pad_sequences
from rlhf_lightning.rollout.reward_sources import ScoringBatch


def scoring_batch(
    rows: list[tuple[list[int], list[int]]] | None = None,
    *,
    prompts: list[Any] | None = None,
    responses: list[str] | None = None,
    finished: list[bool] | None = None,
    columns: list[dict[str, Any]] | None = None,
) -> ScoringBatch:
    """Return two responses to be scored."""
    rows = rows or [([5, 6], [7, 2]), ([8], [9])]
    ids, _ = pad_sequences([prompt + response for prompt, response in rows], pad_id=0)
    lengths = torch.tensor([[len(prompt), len(response)] for prompt, response in rows])
    return ScoringBatch(
        sequences=SequenceBatch(ids, lengths[:, 0], lengths[:, 1]),
        finished=torch.tensor(finished or [True, False]),
        prompts=prompts or ["q one", "q"],
        responses=responses or ["one", "two!"],
        rows=columns or [{"prompt": "q one", "answer": "one"}, {"prompt": "q", "answer": "two"}],
    )

"""Passes that run out of a GPU's memory are tried again with fewer rows."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from rlhf_lightning.functional.sequences import token_groups

log = logging.getLogger("rlhf_lightning")

ResultT = TypeVar("ResultT")


class MemoryLimit:
    """Remembers of how many tokens a pass may be, once one has run out of memory; so each size fails once.

    Args:
        option: The one that bounds passes from the start, for the log.

    Attributes:
        tokens: Largest pass from now on; ``None`` where none has run out of memory.
    """

    def __init__(self, option: str) -> None:
        self.option = option
        self.tokens: int | None = None

    def cut(self, groups: Sequence[Tensor], lengths: Tensor) -> list[Tensor]:
        """Return groups of row numbers, those cut that are too large; a row that is too large goes alone.

        Args:
            groups: Row numbers of each pass.
            lengths: Tokens of each row, shape (batch,).
        """
        if self.tokens is None:
            return list(groups)
        return [rows[part] for rows in groups for part in token_groups(lengths[rows], self.tokens)]

    def each(self, groups: Sequence[Tensor], lengths: Tensor, run: Callable[[Tensor], None]) -> None:
        """Call ``run`` with each group; one that runs out of memory is halved, and both halves are tried.

        Args:
            groups: Row numbers of each pass.
            lengths: Tokens of each row, shape (batch,).
            run: What it does with some rows must not depend on it having begun with them before.
        """
        waiting = list(groups)
        while waiting:
            rows, *rest = self.cut(waiting[:1], lengths)
            try:
                run(rows)
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
            else:
                waiting[:1] = rest
                continue
            waiting[:1] = [rows, *rest]  # here the failure, and with it the tensors of its pass, is gone
            self.halve([rows], lengths)

    def whole(
        self,
        groups: Sequence[Tensor],
        lengths: Tensor,
        run: Callable[[list[Tensor]], ResultT],
        *,
        may: Callable[[], bool] = lambda: True,
    ) -> ResultT:
        """Return what ``run`` makes of all groups; where it runs out of memory, of all of them, cut smaller.

        Args:
            groups: Row numbers of each pass.
            lengths: Tokens of each row, shape (batch,).
            run: Begins anew each time.
            may: Asked where it ran out of memory, whether it can begin anew.
        """
        while True:
            groups = self.cut(groups, lengths)
            try:
                return run(groups)
            except torch.OutOfMemoryError:
                if not may() or not can_be_cut(groups):
                    raise
            self.halve(groups, lengths)

    def halve(self, groups: Sequence[Tensor], lengths: Tensor) -> None:
        """Set the limit to half of the largest group that has several rows, and say so; arguments as of ``cut``."""
        tokens = max(int(lengths[rows].sum()) for rows in groups if len(rows) > 1)
        self.tokens = max(1, tokens // 2)
        log.warning(
            "out of memory in a pass of up to %d tokens; it is tried again, and all are from now on, with at most %d "
            "(%s sets it from the start)",
            tokens,
            self.tokens,
            self.option,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what is left lies in pieces


def can_be_cut(groups: Sequence[Tensor]) -> bool:
    """Tell whether a group has several rows."""
    return any(len(rows) > 1 for rows in groups)

"""Where a resumed run would not be what it was: the counts that Lightning 2.6 gets wrong, put right."""

from typing import Any

from lightning.pytorch import Trainer


def count_begun_epoch(trainer: Trainer) -> None:
    """Count an epoch that began right after a restart at the end of the one before, which Lightning forgets.

    Its counts of epochs begun and epochs done are then equal within an epoch. A checkpoint of that run would be taken
    for one of another moment: resumed, the run ends at once or goes through an epoch too many.
    """
    progress: Any = trainer.fit_loop.epoch_progress
    missing = progress.current.processed + 1 - progress.current.started
    if missing > 0:
        for counts in (progress.current, progress.total):
            counts.ready += missing
            counts.started += missing

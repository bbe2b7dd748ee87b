"""Where a reward function goes wrong: the rows that it was given are kept, and all processes stop."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lightning.distributed import first_text
from rlhf_lightning.errors import UserError
from rlhf_lightning.rollout.user_functions import RewardFunctionError

if TYPE_CHECKING:
    from lightning import LightningModule

#: In the run's folder: a line for each prompt and response that a reward function went wrong with.
FAILURES = Path("failures", "reward_function.jsonl")


@contextlib.contextmanager
def failures_saved(module: "LightningModule") -> Iterator[None]:
    """Save what a reward function was given that goes wrong inside, and have all processes say so.

    Raises:
        UserError: If one went wrong, in any process.
    """
    told, cause = "", None
    try:
        yield
    except RewardFunctionError as failure:
        told, cause = f"{failure} {_save(module, failure)}", failure
    if not module.trainer.predicting:  # in which processes may have unequally many batches
        told = first_text(told)
    if told:
        raise UserError(told) from cause


def _save(module: "LightningModule", failure: RewardFunctionError) -> str:
    """Write the rows of a failure, and return a sentence that says where."""
    path = Path(module.trainer.default_root_dir, FAILURES)
    about = {"error": str(failure), "step": module.trainer.global_step + 1, "process": module.global_rank}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Half a character (a lone surrogate) is written as JSON escapes it.
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            for row in failure.rows:
                file.write(json.dumps({**about, **row}, ensure_ascii=False, default=str) + "\n")
    except OSError as fault:
        return f"What it was given could not be saved: {path}: {fault.strerror}."
    what = "Prompt and response" if len(failure.rows) == 1 else f"The {len(failure.rows)} prompts and responses"
    return f"{what}: {path}."

"""Random numbers that follow from where they are used, not from what ran before.

Everything random in a run derives from ``(run seed, purpose, counters)``, so that a run that was cut and taken up again
draws what it would have drawn, and no phase can disturb another by consuming random numbers.
"""

import hashlib
import os

import torch


def run_seed() -> int:
    """Return the seed of this run: what ``seed_everything`` was given, or 0 where it was never called."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """Mix a seed, a purpose and counters into one 63-bit seed.

    Args:
        seed: The run's seed.
        purpose: What the numbers are for, such as ``"rollout"``; two purposes never share a stream.
        counters: Iteration, epoch, rank, ... whatever tells this use from another.

    Example:
        >>> derive_seed(1, "rollout", 7) == derive_seed(1, "rollout", 7)
        True
        >>> derive_seed(1, "rollout", 7) == derive_seed(1, "shuffle", 7)
        False
    """
    text = ":".join([str(seed), purpose, *map(str, counters)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def derived_generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """Return a CPU generator seeded by :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *counters))

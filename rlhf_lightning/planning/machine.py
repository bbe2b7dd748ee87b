"""How fast a machine multiplies and reads."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rlhf_lightning.errors import UserError, did_you_mean

#: Dense bf16 operations a second, bytes a second of memory, and bytes of memory, from the makers' data sheets.
_GPUS = {
    "h200": (989e12, 4.8e12, 141e9),
    "h100": (989e12, 3.35e12, 80e9),
    "a100": (312e12, 2.0e12, 80e9),
    "l40s": (362e12, 0.86e12, 48e9),
    "a10": (125e12, 0.6e12, 24e9),
    "l4": (121e12, 0.3e12, 24e9),
    "rtx4090": (165e12, 1.0e12, 24e9),
}
#: What training reaches of the data sheet's rate; float32 products run at a sixteenth of bf16's without TF32.
_SHARE, _FLOAT32 = 0.4, 1 / 16
_LAUNCH = 4e-6  # seconds that a small operation takes to start on a GPU


@dataclass(frozen=True)
class Machine:
    """One device.

    Attributes:
        name: What the report calls it.
        flops: Floating-point operations a second in matrix products.
        bandwidth: Bytes a second read from memory.
        memory: Bytes of memory; ``None`` where the report need not judge.
        launch: Seconds that a small operation takes to start.
        process: Bytes that the process itself takes before any model is there.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float | None = None
    launch: float = 0.0
    process: int = 0


def gpu(name: str, *, mixed: bool) -> Machine:
    """Return a GPU by its name, as its data sheet has it.

    Raises:
        UserError: If it is not known.
    """
    if name.lower() not in _GPUS:
        known = ", ".join(_GPUS)
        raise UserError(f"--gpu {name!r} is not known.{did_you_mean(name, _GPUS)} Known are {known}.")
    flops, bandwidth, memory = _GPUS[name.lower()]
    return Machine(name.lower(), flops * _SHARE * (1 if mixed else _FLOAT32), bandwidth, memory, _LAUNCH)


def this_processor() -> Machine:
    """Return this machine's processor, measured for half a second with the threads that torch uses."""
    a, b = torch.randn(512, 576), torch.randn(576, 1536)
    matrix = _fastest(lambda: torch.mm(a, b))
    big = torch.zeros(2**25)
    reading = _fastest(lambda: big.sum())
    name = f"processor, {torch.get_num_threads()} threads"
    return Machine(name, 2 * a.numel() * b.shape[1] / matrix, big.nbytes / reading, process=_resident())


def _fastest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(12):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _resident() -> int:
    """Bytes of memory that this process takes now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0

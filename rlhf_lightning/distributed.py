"""Sums over all processes; with one process, the thing itself."""

import functools
import time
from typing import Any

import torch
from torch import Tensor


def is_distributed() -> bool:
    """Tell whether several processes train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def world_size() -> int:
    """Return the number of processes."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def leave_group() -> None:
    """End this process's part in the group; to be called once all processes are done with one another.

    Lightning leaves a gloo group open. A gloo thread still drops Python objects of the last operation after it has
    reported the operation done; if the interpreter ends meanwhile, the process aborts with status 134 ("terminate
    called without an active exception"), its work done: four of forty times with torch 2.13 and nothing in between.
    """
    if is_distributed():
        _cpu_group.cache_clear()
        torch.distributed.destroy_process_group()
        time.sleep(0.1)  # without the interpreter's lock, which that thread waits for; nothing tells when it is done


def global_sum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, the same on each; the argument stays as it is."""
    if not is_distributed():
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total


def global_max(tensor: Tensor) -> Tensor:
    """Return the largest value of a tensor over all processes, the same on each; NaN counts as largest."""
    if not is_distributed():
        return tensor
    # Some backends drop NaN in a maximum, none in a gather.
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    torch.distributed.all_gather(parts, tensor)
    return torch.stack(parts).amax(dim=0)


def any_process(*answers: bool) -> list[bool]:
    """Return, for each question, whether any process says yes; the same on each.

    It is asked over the CPU: over the device, a process would wait until all that is queued there has run.
    """
    if not is_distributed():
        return list(answers)
    yes = torch.tensor(answers, dtype=torch.uint8)
    torch.distributed.all_reduce(yes, torch.distributed.ReduceOp.MAX, _cpu_group(torch.distributed.group.WORLD))
    return [bool(answer) for answer in yes]


def first_text(text: str) -> str:
    """Return the first text that is not empty, in the order of the processes; the same on each."""
    if not is_distributed():
        return text
    texts: list[str] = [""] * world_size()
    torch.distributed.all_gather_object(texts, text, _cpu_group(torch.distributed.group.WORLD))
    return next(filter(None, texts), "")


@functools.lru_cache(maxsize=1)
def _cpu_group(world: Any) -> Any:
    """Return a group of all processes that passes tensors on the CPU; one is made where the main one does not."""
    return world if "gloo" in torch.distributed.get_backend(world) else torch.distributed.new_group(backend="gloo")


def gather_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of all processes in the order in which they were dealt out, and the places of one's own there.

    Dealt out means that the first rows of all processes come first, then their second rows, and so on: with this order
    several processes see what one would see.

    Args:
        rows: Shape (rows, ...); the number of rows may differ between the processes, the rest may not.
    """
    if not is_distributed():
        return rows, torch.arange(len(rows), device=rows.device)
    own = torch.tensor(len(rows), device=rows.device)
    counts = [torch.empty_like(own) for _ in range(world_size())]
    torch.distributed.all_gather(counts, own)
    size = int(torch.stack(counts).max())
    padded = rows.new_zeros(size, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    torch.distributed.all_gather(parts, padded)
    exists = torch.arange(size, device=rows.device)[:, None] < torch.stack(counts)  # (row, process)
    places = exists.flatten().cumsum(0).view_as(exists) - 1
    return torch.stack(parts, dim=1)[exists], places[: len(rows), torch.distributed.get_rank()]


def global_mean_var(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of what counts, over all processes, in float32.

    Args:
        x: Values, any shape.
        mask: True where a value counts, same shape as ``x``, bool.
    """
    kept = torch.where(mask, x.float(), 0.0)
    total, count = global_sum(torch.stack([kept.sum(), mask.sum().float()]))
    mean = total / count
    squares = global_sum(torch.where(mask, (x.float() - mean) ** 2, 0.0).sum())
    return mean, squares / count

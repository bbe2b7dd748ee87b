"""Memory for other uses: frozen models that leave it while nobody asks them anything, and what was freed."""

import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import UserError

#: Weights begin at a multiple of so many bytes, as how a matrix product rounds depends on it.
_ALIGNMENT = 64


class OffloadedModels:
    """Models that are in the memory of their device only as long as :meth:`at_hand` lasts.

    From an accelerator the weights go to the host's memory. On a processor they go to a file that is mapped: reading it
    brings them back page by page, from the system's cache where that still has them. The file has no name, so that
    nothing is left behind by a kill.

    Args:
        models: Their weights never change.
        folder: Where the file is made, on a processor.
        beside: Models that are used all the time; weights that these have too, as those beside adapters, stay.

    Raises:
        UserError: If the folder has no room for it.
    """

    def __init__(self, models: Iterable[nn.Module], folder: str | Path, beside: Iterable[nn.Module] = ()) -> None:
        staying = {id(each) for model in beside for each in (*model.parameters(), *model.buffers())}
        tensors = {id(each): each for model in models for each in (*model.parameters(), *model.buffers())}
        tensors = {number: each for number, each in tensors.items() if number not in staying}
        self._resident = [each for each in tensors.values() if each.device.type == "cpu" and each.numel()]
        # Buffers are small, and DistributedDataParallel sends them about before each pass.
        on_device = [each for each in tensors.values() if each.device.type != "cpu"]
        self._moved = [each for each in on_device if isinstance(each, nn.Parameter)]
        self._map = self._write(Path(folder)) if self._resident else None
        self._devices = [each.device for each in self._moved]
        self._hosted = [each.detach().to("cpu", copy=True) for each in self._moved]
        if torch.cuda.is_available():
            self._hosted = [each.pin_memory() for each in self._hosted]
        self._let_go()

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave nothing of a mapped file in a copy, whose models have weights of their own."""
        return type(None), ()

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Have the weights in memory inside."""
        for tensor, host, device in zip(self._moved, self._hosted, self._devices, strict=True):
            tensor.data = host.to(device, non_blocking=True)
        try:
            yield
        finally:
            self._let_go()

    def _let_go(self) -> None:
        for tensor, host in zip(self._moved, self._hosted, strict=True):
            tensor.data = host
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _write(self, folder: Path) -> mmap.mmap:
        """Write the weights into a file, let the models read them from there, and return its map."""
        places, size = list[int](), 0
        for tensor in self._resident:
            places.append(size)
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                if hasattr(os, "posix_fallocate"):  # else a full disk would end the process later on
                    os.posix_fallocate(file.fileno(), 0, size)
                file.truncate(size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as fault:
            raise UserError(
                f"offload_frozen: {size >> 20} MiB cannot be written to '{folder}': {fault.strerror}."
            ) from fault
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
        for tensor, place in zip(self._resident, places, strict=True):
            tensor.data = _copied(tensor.detach(), whole[place : place + tensor.nbytes])
        return mapped


def _copied(tensor: Tensor, memory: Tensor) -> Tensor:
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, which glibc keeps for later; elsewhere nothing is done.

    Gradients of millions of numbers are allocated in pieces small enough for it to keep, and other phases need theirs.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)

"""A key-value cache with room for the whole response, whose rows come and go while it is decoded."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from transformers import DynamicCache, PretrainedConfig


def preallocated_cache(config: "PretrainedConfig", capacity: int) -> "DynamicCache":
    """Return transformers' cache for this model, its plain layers exchanged for preallocated ones.

    A token then costs one write instead of a copy. Layers of another kind (sliding windows, linear attention) stay as
    transformers made them.

    Args:
        config: The model's.
        capacity: Tokens of prompt and response together.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class PreallocatedLayer(DynamicLayer):
        """Keys and values are views of the filled part of two buffers."""

        room = capacity

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
        ) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.hold(stacked([key_states], 0, capacity), stacked([value_states], 0, capacity), 0)
            start, end = self.filled, self.filled + key_states.shape[-2]
            self.key_buffer[:, :, start:end] = key_states
            self.value_buffer[:, :, start:end] = value_states
            self.hold(self.key_buffer, self.value_buffer, end)
            return self.keys, self.values

        def batch_select_indices(self, indices: Tensor) -> None:
            if self.is_initialized:
                self.hold(self.key_buffer[indices], self.value_buffer[indices], self.filled)

        def hold(self, key_buffer: Tensor, value_buffer: Tensor, filled: int) -> None:
            """Take buffers of which the first ``filled`` places count."""
            self.key_buffer, self.value_buffer, self.filled = key_buffer, value_buffer, filled
            self.keys, self.values = key_buffer[:, :, :filled], value_buffer[:, :, :filled]

    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def holds_keys_and_values_alone(config: "PretrainedConfig") -> bool:
    """Tell whether :func:`rearrange` knows all layers of this model's cache: attention, full or within a window."""
    from transformers import DynamicCache, cache_utils
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    known = {DynamicLayer, DynamicSlidingWindowLayer}
    known.add(getattr(cache_utils, "DummyLayer", DynamicLayer))  # of layers that hold nothing; not in transformers 5.17
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, KeyError, TypeError, ValueError):  # a config without layers of attention
        return False
    return all(type(layer) in known for layer in layers)


def rearrange(cache: "DynamicCache", parts: Sequence[tuple["DynamicCache", Tensor]], width: int) -> None:
    """Fill a cache with chosen rows of several caches, one part below the other.

    A row's places count from the right: the last place of each part comes to stand at ``width``. What is cut off on the
    left, and what is filled up there with zeros, must be masked.

    Args:
        cache: From :func:`preallocated_cache`; may be one of the parts.
        parts: Caches of the same model and the rows to take, int64; a row may be taken more than once.
        width: Places that count from now on.
    """
    for number, layer in enumerate(cache.layers):
        taken = [(part.layers[number], rows) for part, rows in parts if part.layers[number].keys is not None]
        if not taken:  # a layer that reads the cache of another one
            continue
        if not layer.is_initialized:
            layer.lazy_initialization(taken[0][0].keys, taken[0][0].values)
        places = min(width, layer.sliding_window - 1) if layer.is_sliding else width
        room = getattr(layer, "room", places)
        keys = stacked([source.keys[rows] for source, rows in taken], places, room)
        values = stacked([source.values[rows] for source, rows in taken], places, room)
        if layer.is_sliding:
            layer.keys, layer.values, layer.cumulative_length = keys, values, width
        else:
            layer.hold(keys, values, width)


def stacked(parts: Sequence[Tensor], width: int, room: int) -> Tensor:
    """Put the last places of several tensors below each other, ending at place ``width`` of ``room``, zeros before.

    Args:
        parts: Each of shape (rows, heads, places, size).
        width: Where the last place of each comes to stand.
        room: Places in all.

    Example:
        >>> import torch
        >>> stacked([torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[[[3.0]]]])], 2, 3).squeeze()
        tensor([[1., 2., 0.],
                [0., 3., 0.]])
    """
    _, heads, _, size = parts[0].shape
    buffer = parts[0].new_zeros(sum(len(part) for part in parts), heads, room, size)
    start = 0
    for part in parts:
        places = min(width, part.shape[2])
        end = start + len(part)
        buffer[start:end, :, width - places : width] = part[:, :, part.shape[2] - places :]
        start = end
    return buffer


def copied_row(cache: "DynamicCache", config: "PretrainedConfig", row: int) -> "DynamicCache":
    """Return a cache that holds one row of another one and nothing else alive.

    Args:
        cache: Of this model.
        config: The model's.
        row: Which.
    """
    from transformers import DynamicCache

    copy = DynamicCache(config=config)
    for number, layer in enumerate(cache.layers):
        if layer.keys is not None:
            copy.update(layer.keys[row : row + 1], layer.values[row : row + 1], number)
    return copy

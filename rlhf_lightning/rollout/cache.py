"""A key-value cache with room for the whole response, so that a token costs one write instead of a copy."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import DynamicCache, PretrainedConfig


def preallocated_cache(config: "PretrainedConfig", capacity: int) -> "DynamicCache":
    """Return transformers' cache for this model, its plain layers exchanged for preallocated ones.

    Layers of another kind (sliding windows, linear attention) stay as transformers made them.

    Args:
        config: The model's.
        capacity: Tokens of prompt and response together.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class PreallocatedLayer(DynamicLayer):
        """Keys and values are views of the filled part of two buffers."""

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
        ) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.key_buffer = _buffer(key_states, capacity)
                self.value_buffer = _buffer(value_states, capacity)
                self.filled = 0
            start, self.filled = self.filled, self.filled + key_states.shape[-2]
            self.key_buffer[:, :, start : self.filled] = key_states
            self.value_buffer[:, :, start : self.filled] = value_states
            self.keys = self.key_buffer[:, :, : self.filled]
            self.values = self.value_buffer[:, :, : self.filled]
            return self.keys, self.values

        def batch_select_indices(self, indices: Tensor) -> None:
            if self.is_initialized:
                self.key_buffer, self.value_buffer = self.key_buffer[indices], self.value_buffer[indices]
                self.keys = self.key_buffer[:, :, : self.filled]
                self.values = self.value_buffer[:, :, : self.filled]

    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _buffer(states: Tensor, capacity: int) -> Tensor:
    batch, heads, _, size = states.shape
    return torch.empty(batch, heads, capacity, size, dtype=states.dtype, device=states.device)

"""Hidden states of sequences of unequal length without any padding: one behind another in a single row.

Norms and linear layers look at one token at a time, so they do not care where a sequence begins; attention alone does.
transformers finds its attention function by a name in the model's config. While a packed pass runs that name is ours,
and it lets each sequence attend to itself; so no architecture is written again.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf_lightning.functional.sequences import SequenceBatch, length_mask

log = logging.getLogger(__name__)

#: Where a call of an attention function costs little, so that one a sequence beats padding in attention.
_LOOPS_ON = ("cpu",)
_NAME = "rlhf_lightning_packed"
_LAYOUT: ContextVar["Layout"] = ContextVar("layout of the packed row")
_PACKABLE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass
class Layout:
    """The sequences of a packed row.

    Attributes:
        lengths: Tokens of each.
        told_window: Whether some attention layer has told of a window that it looks back over.
    """

    lengths: list[int]
    told_window: bool = False


def hidden_states_at(backbone: Any, batch: SequenceBatch, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the last hidden state at some positions, shape (positions, hidden).

    Where the rows differ in length and the model allows it, no padding is computed; else the rows are padded on the
    right, which real tokens, looking only backwards, do not see.

    Args:
        backbone: A model of transformers without its head.
        batch: Prompts and responses.
        rows: Row of each position, shape (positions,), int64.
        columns: Its place among the real tokens of the row, shape (positions,), int64.
    """
    lengths = batch.lengths
    if int(lengths.sum()) == batch.input_ids.numel() or not packable(backbone):
        return _padded(backbone, batch.input_ids)[rows, columns]
    starts = lengths.cumsum(dim=0) - lengths
    return _packed(backbone, batch.input_ids, Layout(lengths.tolist()))[starts[rows] + columns]


def packable(backbone: Any) -> bool:
    """Tell whether packed passes give this model's own hidden states; found by trying, once a model.

    Not so where attention is not ``sdpa``, where something beside attention looks at other tokens (convolutions, states
    that are carried along), or where activations are computed again backwards, outside of the pass.
    """
    # One name from transformers 5.2x on, the other before.
    if any(vars(module).get("gradient_checkpointing", False) for module in backbone.modules()):
        return False
    if backbone not in _PACKABLE:
        _PACKABLE[backbone] = _probe(backbone)
        if not _PACKABLE[backbone]:
            log.info("%s: its sequences cannot be packed, padding is computed", type(backbone).__name__)
    return _PACKABLE[backbone]


def _padded(backbone: Any, ids: Tensor) -> Tensor:
    states: Tensor = backbone(input_ids=ids, use_cache=False).last_hidden_state
    return states


def _packed(backbone: Any, ids: Tensor, layout: Layout) -> Tensor:
    mask = length_mask(torch.tensor(layout.lengths, device=ids.device), ids.shape[1])
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    with attending_apart(backbone.config, layout):
        output = backbone(input_ids=ids[mask][None], position_ids=positions[mask][None], use_cache=False)
    states: Tensor = output.last_hidden_state[0]
    return states


@torch.no_grad()
def _probe(backbone: Any) -> bool:
    config = getattr(backbone, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa" or getattr(config, "attention_chunk_size", None):
        return False
    weight = backbone.get_input_embeddings().weight
    layout = Layout([5, 2, 7])
    ids = torch.arange(21, device=weight.device).view(3, 7) % len(weight)
    mask = length_mask(torch.tensor(layout.lengths, device=weight.device))
    training = backbone.training
    backbone.eval()  # dropout would make two passes differ
    try:
        with torch.autocast(weight.device.type, enabled=False):
            one, other = _padded(backbone, ids)[mask].float(), _packed(backbone, ids, layout).float()
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError):
        return False  # it takes no positions, or its attention something that ours does not know
    finally:
        backbone.train(training)
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if getattr(config, "sliding_window", None) and windows and not layout.told_window:
        return False  # most windows are longer than the probe, which then cannot see that ours ignores them
    bound = 1e-4 if weight.dtype == torch.float32 else 0.05
    return one.shape == other.shape and bool((one - other).norm() <= bound * one.norm())


@contextmanager
def attending_apart(config: Any, layout: Layout) -> Iterator[None]:
    """Let the model of a config attend within each sequence of a packed row alone, while this lasts."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # Without a mask function of that name, transformers builds no mask.
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend_apart)
    own, token = config._attn_implementation, _LAYOUT.set(layout)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = own
        _LAYOUT.reset(token)


def _attend_apart(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Let each sequence attend to itself; the arguments are those of an attention function of transformers.

    Args:
        module: The attention layer.
        query: Shape (1, heads, tokens of all sequences, head size).
        key: As the query, with the heads of keys.
        value: As the key.
        attention_mask: Not read.
        sliding_window: How many tokens each may look at, itself included; ``None`` is all.
        options: Passed on.

    Returns:
        Shape (1, tokens, heads, head size), and no weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layout = _LAYOUT.get()
    layout.told_window |= sliding_window is not None

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        band = _band(query.shape[2], sliding_window, query.device)
        output: Tensor = sdpa_attention_forward(module, query, key, value, band, **options)[0]
        return output

    if query.device.type in _LOOPS_ON:
        parts = (part.split(layout.lengths, dim=2) for part in (query, key, value))
        return torch.cat([attend(*sequence) for sequence in zip(*parts, strict=True)], dim=1), None
    counts = torch.tensor(layout.lengths, device=query.device)
    mask = length_mask(counts)
    places = (counts.cumsum(dim=0) - counts)[:, None] + torch.arange(mask.shape[1], device=query.device)
    places = places.clamp(max=query.shape[2] - 1)
    return attend(*(part[0, :, places].transpose(0, 1) for part in (query, key, value)))[mask][None], None


def _band(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """Return True where a token may look, shape (1, 1, length, length); ``None`` where that is all that came before."""
    if sliding_window is None or length <= sliding_window:
        return None
    places = torch.arange(length, device=device)
    distance = places[:, None] - places
    return ((distance >= 0) & (distance < sliding_window))[None, None]

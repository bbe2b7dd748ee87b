"""Hidden states of sequences without any padding, one behind another in a single row, a prompt of several only once.

Norms and linear layers look at one token at a time, so they do not care where a sequence begins; attention alone does.
transformers finds its attention function by a name in the model's config. While a packed pass runs that name is ours,
and it lets each sequence attend to itself; so no architecture is written again.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import SequenceBatch, length_mask
from rlhf_lightning.models.gradients import embedding_in_place

log = logging.getLogger(__name__)

#: Where a call of an attention function costs little, so that one a sequence beats padding in attention.
_LOOPS_ON = ("cpu",)
#: Share of the tokens that shared prompts must save; each response that continues one costs some calls more.
_WORTH_SHARING = 0.05
_NAME = "rlhf_lightning_packed"
_PASS: ContextVar[tuple[Any, "Layout"] | None] = ContextVar("config and layout of the packed pass", default=None)
_PACKABLE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass
class Layout:
    """The pieces of a packed row: whole sequences, or a prompt that several share and, behind it, their responses.

    Attributes:
        rows: Row of the batch that each piece is taken from.
        firsts: Where it begins there, and so the position of its first token.
        lengths: Its tokens, at least 1.
        prompts: The number of the piece that it continues, or ``None`` where it begins a sequence.
        told_window: Whether some attention layer has told of a window that it looks back over.
        bands: Where tokens may look, by the sizes of queries, keys and window.
    """

    rows: list[int] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    prompts: list[int | None] = field(default_factory=list)
    told_window: bool = False
    bands: dict[tuple[int, int, int | None, torch.dtype], Tensor] = field(default_factory=dict)

    @classmethod
    def of_sequences(cls, lengths: Sequence[int]) -> "Layout":
        """Return the layout of whole sequences that share nothing, one a row."""
        layout = cls()
        for row, length in enumerate(lengths):
            layout.add(row, 0, length)
        return layout

    def add(self, row: int, first: int, length: int, prompt: int | None = None) -> int | None:
        """Put a piece behind the others and return its number; one of no tokens is left out and has none."""
        if not length:
            return None
        self.rows.append(row)
        self.firsts.append(first)
        self.lengths.append(length)
        self.prompts.append(prompt)
        return len(self.rows) - 1

    def tokens(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return row and column of the batch that each token is taken from, shape (tokens,), int64, each."""
        rows, firsts, lengths = (torch.tensor(each, device=device) for each in (self.rows, self.firsts, self.lengths))
        within = torch.arange(sum(self.lengths), device=device)
        begins = lengths.cumsum(dim=0) - lengths
        return rows.repeat_interleave(lengths), within + (firsts - begins).repeat_interleave(lengths)


class Sharing(NamedTuple):
    """For each row of a batch the first one that has the same prompt, and the first that is the same as a whole."""

    prompts: list[int]
    wholes: list[int]


def hidden_states_at(backbone: Any, batch: SequenceBatch, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the last hidden state at some positions, shape (positions, hidden).

    Where the model allows it, no padding is computed, and on a processor no prompt twice; else the rows are padded on
    the right, which real tokens, looking only backwards, do not see.

    Args:
        backbone: A model of transformers without its head.
        batch: Prompts and responses.
        rows: Row of each position, shape (positions,), int64.
        columns: Its place among the real tokens of the row, shape (positions,), int64.
    """
    ids = batch.input_ids
    sharing = _find_sharing(batch) if ids.device.type in _LOOPS_ON else None
    full = sharing is None and int(batch.lengths.sum()) == ids.numel()
    if full or not packable(backbone):
        with embedding_in_place(backbone):
            return _padded(backbone, ids)[rows, columns]
    layout = _lay_out(batch, sharing)
    taken = layout.tokens(ids.device)
    places = torch.zeros_like(ids).index_put(taken, torch.arange(len(taken[0]), device=ids.device))
    if sharing is not None:
        owners, wholes = (torch.tensor(each)[rows] for each in sharing)
        rows = torch.where(columns < batch.prompt_lengths[rows], owners, wholes)
    with embedding_in_place(backbone):
        return _packed(backbone, ids, layout)[places[rows, columns]]


def _find_sharing(batch: SequenceBatch) -> Sharing | None:
    """Find prompts and rows that come twice; ``None`` where no row does, and to share prompts would save too little."""
    prompts: dict[tuple[int, ...], int] = {}
    wholes: dict[tuple[int, ...], int] = {}
    sizes, ends = batch.prompt_lengths.tolist(), batch.lengths.tolist()
    sharing, saved = Sharing([], []), 0
    for row, (ids, size, end) in enumerate(zip(batch.input_ids.tolist(), sizes, ends, strict=True)):
        sharing.prompts.append(prompts.setdefault(tuple(ids[:size]), row))
        sharing.wholes.append(wholes.setdefault((size, *ids[:end]), row))
        saved += size if sharing.prompts[-1] != row else 0
    twice = len(wholes) < len(sizes)  # then their scores tie, as those of equal sequences should
    return sharing if twice or saved > _WORTH_SHARING * sum(ends) else None


def _lay_out(batch: SequenceBatch, sharing: Sharing | None) -> Layout:
    """Lay out the rows of a batch in their order, each prompt and each response at the first row that has it."""
    layout, pieces = Layout(), dict[int, int | None]()
    rows = list(range(len(batch.lengths)))
    owners, wholes = sharing or (rows, rows)
    shared = {owner for row, owner in enumerate(owners) if owner != row}
    sizes = zip(batch.prompt_lengths.tolist(), batch.response_lengths.tolist(), strict=True)
    for row, owner, whole, (prompt, response) in zip(rows, owners, wholes, sizes, strict=True):
        if owner not in shared:
            layout.add(row, 0, prompt + response)
            continue
        if owner == row:
            pieces[row] = layout.add(row, 0, prompt)
        if whole == row:
            layout.add(row, prompt, response, pieces[owner])
    return layout


def packable(backbone: Any) -> bool:
    """Tell whether packed passes give this model's own hidden states; found by trying, once a model.

    Not so where attention is not ``sdpa``, where something beside attention looks at other tokens (convolutions, states
    that are carried along), or where somebody else lets activations be computed again backwards, outside of the pass.
    """
    if any(map(_is_checkpointed_by_others, backbone.modules())):
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
    rows, columns = layout.tokens(ids.device)
    with attending_apart(backbone.config, layout):
        output = backbone(input_ids=ids[rows, columns][None], position_ids=columns[None], use_cache=False)
    states: Tensor = output.last_hidden_state[0]
    return states


def checkpoint_activations(model: Any) -> None:
    """Let a model keep of each layer its input alone in training and compute the rest again backwards, packed or not.

    Args:
        model: A model of transformers.

    Raises:
        ValueError: If its family cannot.
    """
    # Dropout, which would need the random state of the first time, is off in all models that are loaded here.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": False, "context_fn": _as_in_this_pass})


def checkpoint_trained_models(module: nn.Module) -> None:
    """Do so for every model of transformers in a module that has weights to train.

    Raises:
        UserError: Naming a family that cannot.
    """
    from transformers import PreTrainedModel

    models = [each for each in module.modules() if isinstance(each, PreTrainedModel)]
    inner = {part for model in models for part in model.modules() if part is not model}
    for model in models:
        if model in inner or not any(parameter.requires_grad for parameter in model.parameters()):
            continue
        try:
            checkpoint_activations(model)
        except ValueError as error:
            kind = type(model).__name__
            raise UserError(
                f"gradient_checkpointing is true, but transformers' {kind} cannot; set it to false."
            ) from error


def _as_in_this_pass() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts in which a layer runs now and in which it is computed again."""
    running = _PASS.get()
    return nullcontext(), nullcontext() if running is None else attending_apart(*running)


def _is_checkpointed_by_others(module: nn.Module) -> bool:
    if not getattr(module, "gradient_checkpointing", False):
        return False
    options = getattr(vars(module).get("_gradient_checkpointing_func"), "keywords", {})
    return options.get("context_fn") is not _as_in_this_pass


@torch.no_grad()
def _probe(backbone: Any) -> bool:
    config = getattr(backbone, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa" or getattr(config, "attention_chunk_size", None):
        return False
    weight = backbone.get_input_embeddings().weight
    if weight.dtype != torch.float32:  # whose rounding would hide that a fresh model's convolutions look across
        backbone = copy.deepcopy(backbone).float()
    ids = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [7, 8, 0, 0, 0, 0, 0], [0, 1, 2, 9, 8, 0, 0]], device=weight.device)
    ids %= len(weight)
    prompts, responses = torch.tensor([[3, 1, 3], [4, 1, 2]], device=weight.device)
    batch = SequenceBatch(ids, prompts, responses)
    sharing = Sharing([0, 1, 0], [0, 1, 2]) if weight.device.type in _LOOPS_ON else None
    layout = _lay_out(batch, sharing)
    rows, columns = layout.tokens(ids.device)
    training = backbone.training
    backbone.eval()  # dropout would make two passes differ
    try:
        with torch.autocast(weight.device.type, enabled=False):
            one, other = _padded(backbone, ids)[rows, columns].float(), _packed(backbone, ids, layout).float()
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError):
        return False  # it takes no positions, or its attention something that ours does not know
    finally:
        backbone.train(training)
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if getattr(config, "sliding_window", None) and windows and not layout.told_window:
        return False  # most windows are longer than the probe, which then cannot see that ours ignores them
    return one.shape == other.shape and bool((one - other).norm() <= 1e-4 * one.norm())


@contextmanager
def attending_apart(config: Any, layout: Layout) -> Iterator[None]:
    """Let the model of a config attend within each sequence of a packed row alone, while this lasts."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # Without a mask function of that name, transformers builds no mask.
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend_apart)
    own, token = config._attn_implementation, _PASS.set((config, layout))
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = own
        _PASS.reset(token)


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

    running = _PASS.get()
    assert running is not None
    layout = running[1]
    layout.told_window |= sliding_window is not None

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        band = _band(layout, query, key.shape[2], sliding_window)
        if band is None or query.device.type not in _LOOPS_ON:
            output: Tensor = sdpa_attention_forward(module, query, key, value, band, **options)[0]
            return output
        # With a mask transformers would repeat the keys and values of grouped queries, in memory too.
        grouped = query.shape[1] != key.shape[1]
        scale = options.get("scaling")
        return sdpa(query, key, value, attn_mask=band, scale=scale, enable_gqa=grouped).transpose(1, 2)

    if query.device.type in _LOOPS_ON:
        queries, keys, values = (part.split(layout.lengths, dim=2) for part in (query, key, value))
        outputs = []
        for number, prompt in enumerate(layout.prompts):
            seen_keys, seen_values = keys[number], values[number]
            if prompt is not None:
                seen_keys = torch.cat([keys[prompt], seen_keys], dim=2)
                seen_values = torch.cat([values[prompt], seen_values], dim=2)
            outputs.append(attend(queries[number], seen_keys, seen_values))
        return torch.cat(outputs, dim=1), None
    counts = torch.tensor(layout.lengths, device=query.device)
    mask = length_mask(counts)
    places = (counts.cumsum(dim=0) - counts)[:, None] + torch.arange(mask.shape[1], device=query.device)
    places = places.clamp(max=query.shape[2] - 1)
    return attend(*(part[0, :, places].transpose(0, 1) for part in (query, key, value)))[mask][None], None


def _band(layout: Layout, query: Tensor, keys: int, sliding_window: int | None) -> Tensor | None:
    """Return 0 where the last of the tokens may look and -inf where not, shape (1, 1, queries, keys).

    ``None`` where all are asked about and each looks at itself and all that came before.
    """
    queries = query.shape[2]
    if sliding_window is not None and keys <= sliding_window:
        sliding_window = None
    if queries == keys and sliding_window is None:
        return None
    sizes = queries, keys, sliding_window, query.dtype
    if sizes not in layout.bands:
        places = torch.arange(keys, device=query.device)
        distance = places[keys - queries :, None] - places
        hidden = (distance < 0) | (distance >= (sliding_window or keys))
        layout.bands[sizes] = query.new_zeros(hidden.shape).masked_fill(hidden, -torch.inf)[None, None]
    return layout.bands[sizes]

"""Teacher-forced passes of a causal language model over prompts and responses."""

import inspect
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.models.lm_head import head_logprobs
from rlhf_lightning.models.packed import hidden_states_at

_PLAIN_HEADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class ResponsePass(NamedTuple):
    """What one pass says of each response token; flat tensors follow the order of ``response_mask.nonzero()``.

    Attributes:
        logprobs: Log-probability of each response token, nats, shape (batch, response), zero where masked.
        entropy: Entropy before each response token, nats, shape (batch, response); ``None`` unless asked for.
        hidden: Last hidden state before each response token, shape (response tokens, hidden).
    """

    logprobs: Tensor
    entropy: Tensor | None
    hidden: Tensor


def response_pass(
    model: nn.Module,
    batch: SequenceBatch,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
) -> ResponsePass:
    """Run the model over whole sequences and read the distributions before each response token.

    The vocabulary head runs at those positions alone, where the family does no more with it than multiply. No padding
    is computed, where the family allows it (:func:`~rlhf_lightning.models.packed.packable`).

    Args:
        model: A causal language model of transformers.
        batch: Prompts and responses.
        temperature: Divides the logits, as it did in sampling; above 0.
        with_entropy: True computes the entropy too.
        entropy_gradient: True lets gradients flow through it, for a bonus.
    """
    rows, columns = batch.predicting_positions()
    mask = batch.response_mask
    hidden, head = _hidden_and_head(model, batch, rows, columns)
    output = head_logprobs(
        head,
        hidden,
        batch.response_tokens[mask],
        temperature=temperature,
        with_entropy=with_entropy,
        entropy_gradient=entropy_gradient,
    )
    entropy = None if output.entropy is None else _into_place(output.entropy, mask)
    return ResponsePass(_into_place(output.logprobs, mask), entropy, hidden)


def response_logprobs(model: nn.Module, batch: SequenceBatch, *, temperature: float = 1.0) -> Tensor:
    """Return the log-probability of each response token, nats, shape (batch, response), zero where masked.

    Args:
        model: A causal language model of transformers.
        batch: Prompts and responses.
        temperature: Divides the logits, as it did in sampling; above 0.
    """
    return response_pass(model, batch, temperature=temperature).logprobs


def head_is_plain(model: Any) -> bool:
    """Tell whether the model's logits are its output embedding applied to its last hidden state, and nothing more.

    Found by trying, once a model: some families cap or scale their logits, and then the model's own forward is used.
    """
    if model not in _PLAIN_HEADS:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        _PLAIN_HEADS[model] = head is not None and _probe_head(model, head)
    return _PLAIN_HEADS[model]


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Tell whether the model's forward can be asked for the logits of the last positions alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


@torch.no_grad()
def _probe_head(model: Any, head: nn.Module) -> bool:
    device = next(model.parameters()).device
    ids = torch.arange(4, device=device)[None] % model.get_input_embeddings().num_embeddings
    whole = model(input_ids=ids, use_cache=False).logits
    apart = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    return whole.shape == apart.shape and torch.equal(whole, apart)


def _hidden_and_head(model: Any, batch: SequenceBatch, rows: Tensor, columns: Tensor) -> tuple[Tensor, nn.Module]:
    if head_is_plain(model):
        return hidden_states_at(model.base_model, batch, rows, columns), model.get_output_embeddings()
    # Then the model's own head runs at every position from the first wanted one on.
    ids = batch.input_ids
    first = int(columns.min()) if len(columns) and takes_logits_to_keep(model) else 0
    cut = {"logits_to_keep": ids.shape[1] - first} if first else {}
    output = model(input_ids=ids, use_cache=False, output_hidden_states=True, **cut)
    return output.hidden_states[-1][rows, columns], _Computed(output.logits[rows, columns - first])


class _Computed(nn.Module):
    """A head whose logits are there already."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, hidden: Tensor) -> Tensor:
        return self.logits


def _into_place(flat: Tensor, mask: Tensor) -> Tensor:
    return flat.new_zeros(mask.shape).index_put(mask.nonzero(as_tuple=True), flat)

"""The vocabulary head fused with what is asked of its logits, so that [tokens, vocabulary] never exists as a whole."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from rlhf_lightning.functional.logprobs import entropy_from_logits, logprobs_from_logits

#: Probabilities that a pass keeps for its backward pass, at most: 128 MiB.
KEEP = 2**25
#: Of what is beyond them, the logits that exist at a time; backwards they are computed again.
CHUNK = 2**22
#: Numbers that a processor goes over at a time, so that they stay in its cache from one operation to the next.
_TILE = 2**18


class HeadOutput(NamedTuple):
    """Log-probability of each token, nats, shape (tokens,), and the entropy before it, nats, or ``None``."""

    logprobs: Tensor
    entropy: Tensor | None


def head_logprobs(
    head: nn.Module,
    hidden: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
    keep: int = KEEP,
    chunk: int = CHUNK,
) -> HeadOutput:
    """Return the log-probabilities of tokens under a vocabulary head.

    One tensor of tokens · vocabulary numbers exists, up to ``keep`` of them, where autograd would hold four. What is
    beyond is computed a chunk at a time, and again backwards: a third more matrix work for that part.

    Args:
        head: The model's output embedding, with ``weight`` of shape (vocabulary, hidden).
        hidden: Last hidden states, shape (tokens, hidden).
        tokens: The tokens that came next, shape (tokens,), int64.
        temperature: Divides the logits, above 0.
        with_entropy: True computes the entropy too; it takes no further pass.
        entropy_gradient: True lets gradients flow through it.
        keep: Probabilities that are kept for the backward pass, at most.
        chunk: Logits of the rest that exist at a time, at most; a row is never cut.
    """
    if not isinstance(head, nn.Linear):
        return _by_autograd(head, hidden, tokens, temperature, with_entropy, entropy_gradient)
    logprobs, entropy = _FusedHead.apply(
        hidden, head.weight, head.bias, tokens, temperature, with_entropy, entropy_gradient, (keep, chunk)
    )
    return HeadOutput(logprobs, entropy if with_entropy else None)


def _by_autograd(
    head: nn.Module, hidden: Tensor, tokens: Tensor, temperature: float, with_entropy: bool, entropy_gradient: bool
) -> HeadOutput:
    logits = _scaled(head(hidden), temperature)
    logprobs = logprobs_from_logits(logits, tokens)
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_gradient):
        entropy = entropy_from_logits(logits) if with_entropy else None
    return HeadOutput(logprobs, entropy)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Return the logits over the temperature in float32; a quotient by 1 would be one more tensor of their size."""
    return logits.float() if temperature == 1 else logits.float() / temperature


class _FusedHead(torch.autograd.Function):
    """logits = hidden · weightᵀ (+ bias); log-probabilities and entropies of them.

    With p = softmax(z) the slopes by the scaled logits z are d log p_y / dz = onehot(y) - p and
    dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        with_entropy: bool,
        entropy_gradient: bool,
        limits: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        ctx.places, ctx.end_of_kept = _places(len(tokens), len(weight), *limits)
        chosen, normalizer, entropy = (hidden.new_zeros(len(tokens), dtype=torch.float32) for _ in range(3))
        kept = None
        with torch.autocast(device, enabled=False):
            matrix = weight.to(dtype)
            for place in ctx.places:
                logits = _logits(hidden[place], matrix, bias, temperature)
                chosen[place] = logits.gather(1, tokens[place, None]).squeeze(1)
                for tile in _tiles(logits):
                    within = slice(place.start + tile.start, place.start + tile.stop)
                    normalizer[within], entropy[within] = _normalize(logits[tile], with_entropy)
                kept = logits if place.stop <= ctx.end_of_kept else kept
        ctx.save_for_backward(hidden, weight, bias, tokens, normalizer, entropy, kept)
        ctx.settings = dtype, temperature, with_entropy and entropy_gradient
        if not (with_entropy and entropy_gradient):
            ctx.mark_non_differentiable(entropy)
        return chosen - normalizer, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logprob_slopes: Tensor, entropy_slopes: Tensor) -> Any:
        hidden, weight, bias, tokens, normalizer, entropy, kept = ctx.saved_tensors
        dtype, temperature, through_entropy = ctx.settings
        logprob_slopes, entropy_slopes = logprob_slopes / temperature, entropy_slopes / temperature
        to_hidden, to_weight = torch.empty_like(hidden), None
        to_bias = None if bias is None else torch.zeros_like(bias)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            for place in ctx.places:
                again = place.stop > ctx.end_of_kept
                slopes = _logits(hidden[place], matrix, bias, temperature) if again else kept
                for tile in _tiles(slopes):
                    within = slice(place.start + tile.start, place.start + tile.stop)
                    if again:
                        slopes[tile].sub_(normalizer[within, None]).exp_()
                    through = (entropy_slopes[within], entropy[within]) if through_entropy else None
                    _slopes_from_probabilities(slopes[tile], logprob_slopes[within], through)
                slopes.scatter_add_(1, tokens[place, None], logprob_slopes[place, None])
                if to_bias is not None:
                    to_bias += slopes.sum(dim=0)
                slopes = slopes.to(dtype)
                to_hidden[place] = slopes @ matrix
                if ctx.needs_input_grad[1]:  # not where adapters are trained in its place
                    to_weight = _plus_product(to_weight, slopes.T, hidden[place].to(dtype), weight)
        return to_hidden, to_weight, to_bias, None, None, None, None, None


def _places(tokens: int, vocabulary: int, keep: int, chunk: int) -> tuple[list[slice], int]:
    """Return the rows that are computed at a time, first those whose probabilities are kept, and where these end."""
    kept, rows = min(tokens, keep // vocabulary), max(1, chunk // vocabulary)
    chunks = [slice(at, min(at + rows, tokens)) for at in range(kept, tokens, rows)]
    return [slice(0, kept)] * (kept > 0) + chunks, kept


def _tiles(logits: Tensor) -> list[slice]:
    """Return the rows that are worked on at a time: on a processor as many as its cache holds, else a chunk."""
    rows = max(1, (_TILE if logits.device.type == "cpu" else CHUNK) // logits.shape[1])
    return [slice(at, min(at + rows, len(logits))) for at in range(0, len(logits), rows)]


def _normalize(logits: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor]:
    """Turn logits into probabilities in place; return their logsumexp and entropy, nats, 0 unless wanted."""
    largest = logits.amax(dim=1, keepdim=True)
    # Where a logit is -inf, a power of 0 times it would be NaN.
    powers = logits.sub_(largest).clamp_(min=torch.finfo(logits.dtype).min).exp()
    total = powers.sum(dim=1)
    entropy = total.log() - torch.linalg.vecdot(powers, logits) / total if with_entropy else torch.zeros_like(total)
    torch.div(powers, total[:, None], out=logits)
    return largest.squeeze(1) + total.log(), entropy


def _slopes_from_probabilities(
    probabilities: Tensor, logprob_slopes: Tensor, entropy: tuple[Tensor, Tensor] | None
) -> None:
    """Turn probabilities into slopes by the logits, in place, all but what the token's own log-probability adds.

    Args:
        probabilities: Shape (tokens, vocabulary).
        logprob_slopes: By the log-probabilities of the tokens, shape (tokens,).
        entropy: Slopes by the entropies, and those, where gradients flow through them, shape (tokens,) each.
    """
    if entropy is None:
        probabilities.mul_(-logprob_slopes[:, None])
        return
    slopes, entropies = (each[:, None] for each in entropy)
    through = torch.special.xlogy(probabilities, probabilities).addcmul_(probabilities, entropies).mul_(slopes)
    probabilities.mul_(-logprob_slopes[:, None]).sub_(through)


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Return total + a · b in the type of ``like``, without a tensor of its size in between where the types agree."""
    if total is None:
        return (a @ b).to(like.dtype)
    return total.addmm_(a, b) if total.dtype == a.dtype else total.add_(a @ b)


def _logits(hidden: Tensor, matrix: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    product = linear(hidden.to(matrix.dtype), matrix, None if bias is None else bias.to(matrix.dtype))
    return _scaled(product, temperature)

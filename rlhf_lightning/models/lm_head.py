"""The vocabulary head fused with what is asked of its logits, so that [tokens, vocabulary] never exists as a whole."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rlhf_lightning.functional.logprobs import entropy_from_logits, logprobs_from_logits

#: Logits that exist at a time, at most; twice as many at once are not cut.
CHUNK = 2**22


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
    chunk: int = CHUNK,
) -> HeadOutput:
    """Return the log-probabilities of tokens under a vocabulary head, a few rows of logits at a time.

    Backwards the logits are computed again: a third more matrix work in the head, for never holding a tensor of
    tokens · vocabulary numbers. What is small enough is not cut and computed once.

    Args:
        head: The model's output embedding, with ``weight`` of shape (vocabulary, hidden).
        hidden: Last hidden states, shape (tokens, hidden).
        tokens: The tokens that came next, shape (tokens,), int64.
        temperature: Divides the logits, above 0.
        with_entropy: True computes the entropy too; it takes no further pass.
        entropy_gradient: True lets gradients flow through it.
        chunk: Logits that exist at a time, at most; a row is never cut.
    """
    small = len(tokens) * _vocabulary(head) <= 2 * chunk
    if small or not isinstance(head, nn.Linear):
        return _at_once(head, hidden, tokens, temperature, with_entropy, entropy_gradient)
    logprobs, entropy = _ChunkedHead.apply(
        hidden, head.weight, head.bias, tokens, temperature, with_entropy, entropy_gradient, chunk
    )
    return HeadOutput(logprobs, entropy if with_entropy else None)


def _vocabulary(head: nn.Module) -> int:
    weight = getattr(head, "weight", None)
    return len(weight) if isinstance(weight, Tensor) else 1


def _at_once(
    head: nn.Module, hidden: Tensor, tokens: Tensor, temperature: float, with_entropy: bool, entropy_gradient: bool
) -> HeadOutput:
    logits = scaled(head(hidden), temperature)
    logprobs = logprobs_from_logits(logits, tokens)
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_gradient):
        entropy = entropy_from_logits(logits) if with_entropy else None
    return HeadOutput(logprobs, entropy)


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Return the logits over the temperature in float32; a quotient by 1 would be one more tensor of their size."""
    return logits.float() if temperature == 1 else logits.float() / temperature


class _ChunkedHead(torch.autograd.Function):
    """logits = hidden · weightᵀ (+ bias); log-probabilities and entropies of them, in chunks of rows.

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
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        rows = max(1, chunk // len(weight))
        chosen, normalizer, entropy = (hidden.new_zeros(len(tokens), dtype=torch.float32) for _ in range(3))
        with torch.autocast(device, enabled=False):
            matrix = weight.to(dtype)
            for start in range(0, len(tokens), rows):
                place = slice(start, start + rows)
                logits = _logits(hidden[place], matrix, bias, temperature)
                normalizer[place] = logits.logsumexp(dim=-1)
                chosen[place] = logits.gather(1, tokens[place, None]).squeeze(1)
                if with_entropy:
                    probabilities = (logits - normalizer[place, None]).exp_()
                    entropy[place] = normalizer[place] - probabilities.mul_(logits).sum(dim=-1)
        ctx.save_for_backward(hidden, weight, bias, tokens, normalizer, entropy)
        ctx.settings = dtype, temperature, with_entropy and entropy_gradient, rows
        if not (with_entropy and entropy_gradient):
            ctx.mark_non_differentiable(entropy)
        return chosen - normalizer, entropy

    @staticmethod
    def backward(ctx: Any, logprob_slopes: Tensor, entropy_slopes: Tensor) -> Any:
        hidden, weight, bias, tokens, normalizer, entropy = ctx.saved_tensors
        dtype, temperature, through_entropy, rows = ctx.settings
        to_hidden = torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight)
        to_bias = None if bias is None else torch.zeros_like(bias)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            for start in range(0, len(tokens), rows):
                place = slice(start, start + rows)
                logits = _logits(hidden[place], matrix, bias, temperature)
                factor = logprob_slopes[place, None]
                logprobs = logits.sub_(normalizer[place, None])
                if through_entropy:
                    factor = factor + entropy_slopes[place, None] * (logprobs + entropy[place, None])
                slopes = logprobs.exp_().mul_(-factor)
                slopes.scatter_add_(1, tokens[place, None], logprob_slopes[place, None])
                slopes = (slopes / temperature if temperature != 1 else slopes).to(dtype)
                to_hidden[place] = slopes @ matrix
                _add_product(to_weight, slopes.T, hidden[place].to(dtype))
                if to_bias is not None:
                    to_bias += slopes.sum(dim=0)
        return to_hidden, to_weight, to_bias, None, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a · b to the total, without a tensor of its size in between where the types agree."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _logits(hidden: Tensor, matrix: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    return scaled(linear(hidden.to(matrix.dtype), matrix, None if bias is None else bias.to(matrix.dtype)), temperature)

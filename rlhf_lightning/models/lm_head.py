"""The vocabulary head fused with what is asked of its logits, so that [tokens, vocabulary] never exists as a whole."""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from rlhf_lightning.functional.logprobs import entropy_from_logits, logprobs_from_logits
from rlhf_lightning.models.gradients import WeightGradient, add_product

#: Logits that a pass keeps for its backward pass, at most: 128 MiB.
KEEP = 2**25
#: Rows and words that are worked on at a time. On a processor its cache holds them from one operation to the next.
TILES = {"cpu": (512, 512), "cuda": (4096, 8192)}
#: A power of e that is 0 in float32; in its place the -inf of a word that is barred would make NaN of 0.
_NIL = -200.0


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
    tile: tuple[int, int] | None = None,
) -> HeadOutput:
    """Return the log-probabilities of tokens under a vocabulary head.

    It goes over some rows and some words at a time. Of the tokens · vocabulary logits ``keep`` are kept for the
    backward pass, where autograd would hold four times all; the rest is computed again: a third more matrix work there.

    Args:
        head: The model's output embedding, with ``weight`` of shape (vocabulary, hidden).
        hidden: Last hidden states, shape (tokens, hidden).
        tokens: The tokens that came next, shape (tokens,), int64.
        temperature: Divides the logits, above 0.
        with_entropy: True computes the entropy too; it takes no further pass.
        entropy_gradient: True lets gradients flow through it.
        keep: Logits that are kept for the backward pass, at most.
        tile: Rows and words that are worked on at a time; ``None`` is what suits the device.

    References:
        Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", for the sums over the words.
    """
    if not isinstance(head, nn.Linear):
        return _by_autograd(head, hidden, tokens, temperature, with_entropy, entropy_gradient)
    tile = tile or TILES.get(hidden.device.type, TILES["cuda"])
    kept = keep // len(head.weight) if torch.is_grad_enabled() else 0
    rows = _cut(keep // len(head.weight), tile[0], len(tokens))
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    settings = _Settings(rows, kept, tile[1], dtype, temperature, with_entropy, with_entropy and entropy_gradient)
    logprobs, entropy = _FusedHead.apply(hidden, head.weight, head.bias, tokens, settings)
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


class _Settings(NamedTuple):
    """How a fused head works.

    Attributes:
        rows: Rows that go together.
        kept: Rows, the first ones, whose logits are kept.
        words: Words that go together.
        dtype: What the products are computed in.
        temperature: Divides the logits.
        with_entropy: Whether the entropy is wanted.
        through_entropy: Whether gradients flow through it.
    """

    rows: list[slice]
    kept: int
    words: int
    dtype: torch.dtype
    temperature: float
    with_entropy: bool
    through_entropy: bool

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, words: slice) -> Tensor:
        """Return the scaled logits of some rows for some words, shape (rows, words)."""
        product = linear(hidden, weight[words].to(self.dtype), None if bias is None else bias[words].to(self.dtype))
        return _scaled(product, self.temperature)


class _FusedHead(torch.autograd.Function):
    """logits = hidden · weightᵀ (+ bias); log-probabilities and entropies of them.

    With p = softmax(z) the slopes by the scaled logits z are d log p_y / dz = onehot(y) - p and
    dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor]:
        logprobs, normalizer, entropy = (hidden.new_zeros(len(tokens), dtype=torch.float32) for _ in range(3))
        kept = []
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in settings.rows:
                some, sums = hidden[rows].to(settings.dtype), _Sums(tokens[rows], settings.with_entropy)
                for words in _cut(0, settings.words, len(weight)):
                    logits = settings.logits(some, weight, bias, words)
                    sums.add(logits, words.start)
                    if rows.stop <= settings.kept:
                        kept.append(logits)
                logprobs[rows], normalizer[rows], entropy[rows] = sums.results()
        ctx.save_for_backward(hidden, weight, bias, tokens, normalizer, entropy, *kept)
        ctx.settings = settings
        if not settings.through_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logprob_slopes: Tensor, entropy_slopes: Tensor) -> Any:
        hidden, weight, bias, tokens, normalizer, entropy, *kept = ctx.saved_tensors
        settings: _Settings = ctx.settings
        logprob_slopes, entropy_slopes = logprob_slopes / settings.temperature, entropy_slopes / settings.temperature
        to_hidden = torch.zeros_like(hidden)
        to_bias = None if bias is None else torch.zeros_like(bias)
        to_weight = WeightGradient(weight) if ctx.needs_input_grad[1] else None  # not where adapters are trained
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in settings.rows:
                some = hidden[rows].to(settings.dtype)
                through = (entropy_slopes[rows], entropy[rows]) if settings.through_entropy else None
                for words in _cut(0, settings.words, len(weight)):
                    again = rows.stop > settings.kept
                    logits = settings.logits(some, weight, bias, words) if again else kept.pop(0)
                    slopes = _probability_slopes(logits - normalizer[rows, None], logprob_slopes[rows], through)
                    columns, inside = _columns(tokens[rows], words.start, slopes)
                    slopes.scatter_add_(1, columns, torch.where(inside, logprob_slopes[rows], 0.0)[:, None])
                    slopes = slopes.to(settings.dtype)
                    add_product(to_hidden[rows], slopes, weight[words].to(settings.dtype))
                    if to_weight is not None:
                        to_weight.add_product(words, slopes.T, some)
                    if to_bias is not None:
                        to_bias[words] += slopes.sum(dim=0)
        return to_hidden, None if to_weight is None else to_weight.result(), to_bias, None, None


class _Sums:
    """Sums over the words seen so far, of powers of e with the largest logit so far taken off, for each row."""

    def __init__(self, tokens: Tensor, with_entropy: bool) -> None:
        self._tokens, self._with_entropy = tokens, with_entropy
        self._total, self._weighted, self._chosen = (torch.zeros_like(tokens, dtype=torch.float32) for _ in range(3))
        self._largest = torch.full_like(self._total, torch.finfo(torch.float32).min)

    def add(self, logits: Tensor, first: int) -> None:
        """Take in the logits of the words from ``first`` on, shape (rows, words)."""
        columns, inside = _columns(self._tokens, first, logits)
        self._chosen = torch.where(inside, logits.gather(1, columns).squeeze(1), self._chosen)
        largest = torch.maximum(self._largest, logits.amax(dim=1))
        below = logits - largest[:, None]
        fall = self._largest - largest
        if self._with_entropy:
            powers = below.clamp_(min=_NIL).exp()
            before = (self._weighted + self._total * fall) * fall.exp()
            self._weighted = before + torch.linalg.vecdot(powers, below)
        else:
            powers = below.exp_()
        self._total = self._total * fall.exp() + powers.sum(dim=1)
        self._largest = largest

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities, logsumexp and entropies, nats, the latter 0 unless wanted; shape (rows,) each."""
        normalizer = self._largest + self._total.log()
        entropy = self._total.log() - self._weighted / self._total if self._with_entropy else self._weighted
        return self._chosen - normalizer, normalizer, entropy


def _cut(first: int, size: int, end: int) -> list[slice]:
    """Return slices of at most a size up to the end, the first of which stop at ``first``."""
    kept = min(first, end)
    starts = [*range(0, kept, size), *range(kept, end, size), end]
    return [slice(start, stop) for start, stop in itertools.pairwise(starts)]


def _columns(tokens: Tensor, first: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the tokens stand among the words from ``first`` on, shape (rows, 1), and whether they do so."""
    columns, words = tokens - first, logits.shape[1]
    return columns.clamp(0, words - 1)[:, None], (columns >= 0) & (columns < words)


def _probability_slopes(logprobs: Tensor, logprob_slopes: Tensor, entropy: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return the slopes by the logits, all but what the token's own log-probability adds; ``logprobs`` is used up.

    Args:
        logprobs: Shape (tokens, words).
        logprob_slopes: By the log-probabilities of the tokens, shape (tokens,).
        entropy: Slopes by the entropies, and those, where gradients flow through them, shape (tokens,) each.
    """
    if entropy is None:
        return logprobs.exp_().mul_(-logprob_slopes[:, None])
    slopes, entropies = (each[:, None] for each in entropy)
    probabilities = logprobs.exp()
    through = logprobs.clamp_(min=_NIL).add_(entropies).mul_(slopes)
    return probabilities.mul_(through.add_(logprob_slopes[:, None]).neg_())

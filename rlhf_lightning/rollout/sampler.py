"""What to sample, how one token is drawn, and what every sampler must offer."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import UserError, did_you_mean
from rlhf_lightning.rollout.stop_strings import StopStrings
from rlhf_lightning.seeding import derived_generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
#: Tokens of the vocabulary whose probabilities are summed together before a draw.
BLOCK = 128


@dataclass
class SamplingConfig:
    """What to sample.

    ``temperature`` divides the logits in sampling and in training, so the ratio is that of the very distribution the
    tokens came from. With ``top_k`` or ``top_p`` they come from another one than the one whose log-probabilities PPO
    compares: the ratio is still 1 before the first step, but its mean under what is sampled is then no longer 1, and
    the KL estimates are biased and may turn negative. So do the first tokens with ``min_new_tokens``, by as much as the
    policy would have stopped there.

    Args:
        max_new_tokens: Longest response in tokens, the stop token included; at least 1.
        min_new_tokens: Neither a stop token nor the end of a stop string before this many tokens stand; 0 is off.
        temperature: Divides the logits, in sampling and in training alike; 0 takes the likeliest token (not for PPO).
        top_k: Draw from the k likeliest tokens; 0 is off.
        top_p: Draw from the smallest set of tokens whose probability reaches this share, in (0, 1]; 1 is off.
        stop_tokens: Tokens that end a response, as text such as ``<|im_end|>``; ``None`` takes the tokenizer's end of
            text. A model may end its texts with another token than it declares.
        stop_strings: Texts that end a response too, such as ``Question:``, however the tokenizer cuts them; ``None`` is
            off. The response keeps the token that completes one, and is finished; a reward model is read at that token,
            whatever it was trained on. Costs a look at the text a token.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_tokens: list[str] | None = field(default=None)
    stop_strings: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(
                f"min_new_tokens is {self.min_new_tokens}; it must lie in 0..max_new_tokens ({self.max_new_tokens})."
            )
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; it must be at least 0 (0 takes the likeliest token).")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be at least 0 (0 is off).")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie in (0, 1] (1 is off).")
        if self.stop_tokens is not None and not self.stop_tokens:
            raise UserError("stop_tokens is empty; name at least one token, or leave it out for the tokenizer's own.")
        if self.stop_strings is not None and not (self.stop_strings and all(self.stop_strings)):
            raise UserError(
                f"stop_strings is {self.stop_strings}; name at least one text, none of them empty, or leave it out."
            )


class Samples(NamedTuple):
    """What a sampler returns.

    Attributes:
        tokens: Responses, right-padded with 0, shape (batch, response), int64.
        lengths: Tokens of each response, its stop token included, shape (batch,), int64.
        finished: True where a stop token was drawn or a stop string completed, shape (batch,), bool.
        logprobs: Log-probability of each token under the distribution it was drawn from (filters included), shape
            (batch, response), 0 where padded. A diagnostic: training computes its own.
    """

    tokens: Tensor
    lengths: Tensor
    finished: Tensor
    logprobs: Tensor


class Sampler(Protocol):
    """Anything that continues prompts; weights reach it only through :meth:`sync`, so it may hold a copy."""

    def setup(self, model: "PreTrainedModel", *, dtype: torch.dtype | None = None) -> None:
        """Take the model whose responses are wanted; ``dtype`` asks for a copy of the weights in that type."""

    def sync(self, named_params: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over new weights; the same version twice is one transfer."""

    def sample(
        self,
        prompt_ids: Tensor,
        attention_mask: Tensor,
        *,
        config: SamplingConfig,
        stop_ids: Sequence[int],
        seed: int,
        row_ids: Sequence[int] | None = None,
        progress: Progress | None = None,
        stop_strings: StopStrings | None = None,
    ) -> Samples:
        """Continue left-padded prompts.

        Args:
            prompt_ids: Shape (batch, prompt), int64.
            attention_mask: True on real prompt tokens, shape (batch, prompt), bool.
            config: What to sample.
            stop_ids: Tokens that end a response.
            seed: Together with a row's number it fixes all its random draws, whatever batch it stands in.
            row_ids: Number of each row among the rows of all batches and processes; ``None`` counts from 0.
            progress: Called with tokens done and tokens at most.
            stop_strings: Texts that end a response: ``resolve_stop_strings(tokenizer, config.stop_strings)`` of
                :mod:`rlhf_lightning.rollout.stop_strings`. What the config itself says of them is not looked at, as a
                sampler has no tokenizer.
        """

    def release(self) -> None:
        """Free what is only needed while sampling."""

    def close(self) -> None:
        """End for good."""


def resolve_stop_ids(tokenizer: "PreTrainedTokenizerBase", stop_tokens: Sequence[str] | None) -> list[int]:
    """Return the ids of the tokens that end a response.

    Args:
        tokenizer: The policy's.
        stop_tokens: Tokens as text, or ``None`` for the tokenizer's end of text.

    Raises:
        UserError: If one of them is not a token of the vocabulary, or there is no end of text.
    """
    if stop_tokens is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-text token; name what ends a response in sampling.stop_tokens."
            )
        return [int(tokenizer.eos_token_id)]
    vocabulary = tokenizer.get_vocab()
    for token in stop_tokens:
        if token not in vocabulary:
            special = [str(name) for name in tokenizer.all_special_tokens]
            raise UserError(
                f"stop token {token!r} is not in the tokenizer's vocabulary; its special tokens are "
                f"{', '.join(special) or 'none'}.{did_you_mean(token, special)}"
            )
    return [int(vocabulary[token]) for token in stop_tokens]


def row_uniforms(seed: int, row_ids: Sequence[int], steps: int) -> Tensor:
    """Return the uniform numbers in [0, 1) that decide the tokens of each row, shape (rows, steps), float32.

    A row's numbers depend on the seed and on its number alone, so that neither the order of rows, nor the cut into
    batches or processes, nor which rows end early changes what is drawn.
    """
    return torch.stack([torch.rand(steps, generator=derived_generator(seed, "row", row)) for row in row_ids])


def draw_tokens(
    logits: Tensor, uniforms: Tensor, config: SamplingConfig, *, step: int | Tensor, stop_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw the next token of each row by inverting the cumulative distribution.

    Args:
        logits: Scores of the next token, shape (batch, vocabulary).
        uniforms: Numbers in [0, 1), shape (batch,), float32.
        config: What to sample.
        step: Tokens already drawn, of all rows or of each, shape (batch,).
        stop_ids: Tokens that end a response, shape (stops,), int64.

    Returns:
        Tokens, shape (batch,), int64, and their log-probabilities under the filtered distribution, shape (batch,).
    """
    logits = logits.float()
    if config.min_new_tokens:
        early = torch.as_tensor(step, device=logits.device).view(-1, 1) < config.min_new_tokens
        stops = logits[:, stop_ids].masked_fill(early, -torch.inf)
        logits = logits.index_copy(1, stop_ids, stops)
    if config.temperature == 0:
        largest, tokens = logits.max(dim=-1)
        return tokens, largest - largest  # 0, the log of 1; NaN where the logits are not finite
    logits = logits if config.temperature == 1 else logits / config.temperature
    probabilities = _filter(logits, config).softmax(dim=-1)
    tokens = invert_cumulative(probabilities, uniforms)
    return tokens, probabilities.gather(1, tokens[:, None]).squeeze(1).log()


def invert_cumulative(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Return where the cumulative sum of each row first exceeds that share of the row's sum, shape (batch,), int64.

    The sum runs over blocks of the vocabulary first and then within one block, which spares most of the work.

    Args:
        probabilities: Shape (batch, vocabulary), float32; places of probability 0 are never returned.
        uniforms: Shares in [0, 1], shape (batch,), float32.

    Example:
        >>> invert_cumulative(torch.tensor([[0.25, 0.0, 0.75]]).expand(3, -1), torch.tensor([0.2, 0.3, 1.0]))
        tensor([0, 2, 2])
    """
    beyond = -probabilities.shape[1] % BLOCK
    padded = nn.functional.pad(probabilities, (0, beyond)) if beyond else probabilities
    blocks = padded.view(len(padded), -1, BLOCK)
    sums = blocks.sum(dim=-1)
    cumulative = sums.cumsum(dim=-1)
    target = _below(uniforms[:, None] * cumulative[:, -1:], cumulative[:, -1:])
    # Beyond the end only for NaN, which refuse_nan names.
    block = torch.searchsorted(cumulative, target, right=True).clamp(max=sums.shape[1] - 1)
    target = target - (cumulative.gather(1, block) - sums.gather(1, block))
    within = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).cumsum(dim=-1)
    place = torch.searchsorted(within, _below(target.clamp(min=0), within[:, -1:]), right=True)
    return (block * BLOCK + place).squeeze(1).clamp(max=probabilities.shape[1] - 1)


def _below(target: Tensor, total: Tensor) -> Tensor:
    """Keep a target below a total, so that a search to its right ends at a place of some probability."""
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))


def refuse_nan(logprobs: Tensor) -> None:
    """Refuse samples that were drawn from no distribution.

    Args:
        logprobs: Of the tokens drawn, any shape.

    Raises:
        UserError: If one is not finite.
    """
    if not bool(torch.isfinite(logprobs).all()):
        raise UserError(
            "the model's logits are not finite, so nothing can be drawn from them; its weights are damaged, or an "
            "update has blown up (lower the learning rate, or go back to an earlier checkpoint)."
        )


def _filter(logits: Tensor, config: SamplingConfig) -> Tensor:
    if 0 < config.top_k < logits.shape[-1]:
        kth = logits.topk(config.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if config.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # the likeliest token always stays
        logits = logits.scatter(1, order, ordered.masked_fill(before >= config.top_p, -torch.inf))
    return logits

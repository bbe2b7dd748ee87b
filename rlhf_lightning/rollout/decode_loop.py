"""Decoding token by token: prompts wait, are read, are continued together, and make room when they are done."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_lightning.functional.sequences import position_ids_from_mask
from rlhf_lightning.models.causal_lm import head_is_plain, takes_logits_to_keep
from rlhf_lightning.rollout.cache import copied_row, holds_keys_and_values_alone, preallocated_cache, rearrange
from rlhf_lightning.rollout.sampler import Progress, SamplingConfig, draw_tokens
from rlhf_lightning.rollout.stop_strings import StopStrings

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class Newcomers:
    """Prompts that have just been read.

    Attributes:
        rows: Their numbers, shape (batch,), int64.
        logits: Of the first token of each response, shape (batch, vocabulary).
        parts: Caches and the rows of them that hold these prompts, in order.
        width: Tokens of the longest.
    """

    rows: Tensor
    logits: Tensor
    parts: list[tuple["DynamicCache", Tensor]]
    width: int


class WaitingPrompts:
    """Left-padded prompts in order; one that equals the one before it is not read again.

    Args:
        model: Reads them.
        prompt_ids: Shape (batch, prompt), int64.
        mask: True on real prompt tokens, shape (batch, prompt), bool.
    """

    def __init__(self, model: "PreTrainedModel", prompt_ids: Tensor, mask: Tensor) -> None:
        self.model, self.ids, self.mask = model, prompt_ids.masked_fill(~mask, 0), mask
        self.lengths = mask.sum(dim=1)
        self._sizes = self.lengths.tolist()
        same = (self.ids[1:] == self.ids[:-1]) & (mask[1:] == mask[:-1])
        self._repeats = [False, *same.all(dim=1).tolist()]
        self._next = 0
        self._last: tuple[DynamicCache, Tensor] | None = None

    def __len__(self) -> int:
        """Return how many still wait."""
        return len(self._sizes) - self._next

    def read(self, count: int) -> Newcomers:
        """Run the model over the next ``count`` prompts, or over all that wait if they are fewer; one at least must."""
        numbers = range(self._next, self._next + min(count, len(self)))
        fresh = [row for row in numbers if not self._repeats[row]]
        inherited = next((place for place, row in enumerate(numbers) if not self._repeats[row]), len(numbers))
        parts, logits = [], []
        if inherited:
            assert self._last is not None
            parts.append((self._last[0], self.ids.new_zeros(inherited)))
            logits.append(self._last[1].expand(inherited, -1))
        if fresh:
            cache, fresh_logits = self._run(fresh)
            read = torch.tensor([not self._repeats[row] for row in numbers[inherited:]], device=self.ids.device)
            index = read.cumsum(dim=0) - 1
            parts.append((cache, index))
            logits.append(fresh_logits[index])
            self._last = (copied_row(cache, self.model.config, len(fresh) - 1), fresh_logits[-1:])
        self._next = numbers.stop
        if not len(self) or not self._repeats[self._next]:
            self._last = None
        rows = torch.arange(numbers.start, numbers.stop, device=self.ids.device)
        return Newcomers(rows, torch.cat(logits), parts, max(self._sizes[row] for row in numbers))

    def _run(self, rows: list[int]) -> tuple["DynamicCache", Tensor]:
        """Return the cache and the last logits of these prompts."""
        from transformers import DynamicCache

        width = max(self._sizes[row] for row in rows)
        padded = any(self._sizes[row] < width for row in rows)
        ids, mask = self.ids[rows, -width:], self.mask[rows, -width:]
        cache = DynamicCache(config=self.model.config)
        return cache, last_logits(self.model, ids, mask if padded else None, position_ids_from_mask(mask), cache)


class DecodeLoop:
    """Decodes prompts, ``size`` at a time; a finished row makes room for a waiting prompt.

    Rows stand in the cache so that their last tokens are in one column. ``rows`` numbers those that are being decoded;
    one that has stopped stays until a quarter of them have, and what it draws meanwhile is thrown away.

    Args:
        model: What decodes.
        prompt_ids: Left-padded, shape (batch, prompt), int64.
        mask: True on real prompt tokens, shape (batch, prompt), bool.
        config: What to sample.
        stop_ids: Tokens that end a response.
        stop_strings: Texts that end a response.
        uniforms: Numbers in [0, 1) that decide the tokens, shape (batch, ``config.max_new_tokens``), float32.
        size: Rows decoded together.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        prompt_ids: Tensor,
        mask: Tensor,
        *,
        config: SamplingConfig,
        stop_ids: Sequence[int],
        stop_strings: StopStrings | None,
        uniforms: Tensor,
        size: int,
    ) -> None:
        self.model, self.config, self.stop_strings, self.size = model, config, stop_strings, size
        self.waiting = WaitingPrompts(model, prompt_ids, mask)
        (self.batch, width), steps, device = prompt_ids.shape, config.max_new_tokens, prompt_ids.device
        self.stop_ids = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
        # What rows draw after their end goes to a last column that is cut off.
        self.uniforms = torch.nn.functional.pad(uniforms, (0, 1))
        self.tokens = prompt_ids.new_zeros(self.batch, steps + 1)
        self.logprobs = torch.zeros(self.batch, steps + 1, device=device)
        self.lengths = torch.zeros(self.batch, dtype=torch.int64, device=device)
        self.finished = torch.zeros(self.batch, dtype=torch.bool, device=device)
        self.capacity, self.filled = width + steps, 0
        self.cache = preallocated_cache(model.config, self.capacity)
        none = torch.zeros(0, dtype=torch.int64, device=device)
        self.rows, self.last, self.drawn, self.seen, self.done = none, none, none, none, none.bool()
        self.ended, self.steps, self.since = 0, 0, list[int]()
        self.mask: Tensor | None = None
        self.logits: Tensor | None = None

    def run(self, progress: Progress | None) -> None:
        """Decode until every row has stopped or is full; ``tokens`` and ``logprobs`` have a column too many then."""
        while True:
            while self._exchange_is_due():
                self._exchange()
            if progress is not None:
                self._report(progress)
            if not self.since:
                return
            self._step()

    def _exchange_is_due(self) -> bool:
        if not self.since:
            return len(self.waiting) > 0
        return self.ended * 4 >= len(self.since) or self.filled == self.capacity

    def _exchange(self) -> None:
        """Let finished rows go, read waiting prompts into their place, and move all to the left as far as they can."""
        keep = (~self.done).nonzero().squeeze(1)
        self.rows, self.last, self.drawn = self.rows[keep], self.last[keep], self.drawn[keep]
        self.seen, self.done = self.seen[keep], self.done[keep]
        self.since = [self.since[place] for place in keep.tolist()]
        parts, width, room = [(self.cache, keep)], 0, self.size - len(keep)
        if len(keep):
            width = int(self.seen.max())
        if room and len(self.waiting):
            newcomers = self.waiting.read(room)
            parts += newcomers.parts
            width = max(width, newcomers.width)
            self._admit(newcomers)
        self.ended = int(self.done.sum())
        if self.ended < len(self.since):
            rearrange(self.cache, parts, width)
            self._place(width)

    def _admit(self, newcomers: Newcomers) -> None:
        """Draw the first token of prompts that have been read, and number them among those decoded."""
        rows, count = newcomers.rows, len(newcomers.rows)
        first = torch.zeros_like(rows)
        last, done = self._draw(newcomers.logits, rows, first, first.bool())
        self.rows, self.last = torch.cat([self.rows, rows]), torch.cat([self.last, last])
        self.drawn = torch.cat([self.drawn, first + 1])
        self.seen = torch.cat([self.seen, self.waiting.lengths[rows]])
        self.done = torch.cat([self.done, done])
        self.since += [self.steps - 1] * count

    def _place(self, width: int) -> None:
        """Take note of where rows stand in the cache: they end at ``width``."""
        self.filled = width
        if bool((self.seen == width).all()):
            self.mask = None
        else:
            columns = torch.arange(self.capacity, device=self.seen.device)
            self.mask = columns >= width - self.seen[:, None]

    def _step(self) -> None:
        """Draw one more token of each row."""
        mask = None if self.mask is None else self.mask[:, : self.filled + 1]
        # Kept until the next are there: memory in use between two steps is not given back and faulted in again.
        self.logits = last_logits(self.model, self.last[:, None], mask, self.seen[:, None], self.cache)
        self.last, self.done = self._draw(self.logits, self.rows, self.drawn, self.done)
        self.drawn, self.seen = self.drawn + 1, self.seen + 1
        self.filled, self.steps = self.filled + 1, self.steps + 1
        self.ended = int(self.done.sum())  # the one wait for the device in a step

    def _draw(self, logits: Tensor, rows: Tensor, drawn: Tensor, done: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a token of each row and write down those of rows that are not done; return them and who is done now."""
        places = torch.where(done, self.config.max_new_tokens, drawn)
        uniforms = self.uniforms[rows, places]
        tokens, logprobs = draw_tokens(logits, uniforms, self.config, step=drawn, stop_ids=self.stop_ids)
        self.tokens[rows, places], self.logprobs[rows, places] = tokens, logprobs
        stopped = (tokens[:, None] == self.stop_ids).any(dim=1)
        if self.stop_strings is not None:
            stopped |= strings_completed(self.stop_strings, self.tokens[rows], places + 1, self.config)
        self.lengths[rows] += ~done
        self.finished[rows] |= stopped & ~done
        return tokens, done | stopped | (drawn + 1 >= self.config.max_new_tokens)

    def _report(self, progress: Progress) -> None:
        """Report the share of done tokens, a stopped row counted as full, in steps that whole batches would take."""
        longest = self.config.max_new_tokens
        gone = self.batch - len(self.waiting) - len(self.since)
        tokens = gone * longest + sum(min(self.steps - since, longest) for since in self.since)
        total = longest * -(-self.batch // self.size)
        progress(tokens * total // (self.batch * longest), total)


def can_decode(model: "PreTrainedModel") -> bool:
    """Tell whether the loop can decode this model: it must keep keys and values alone, and be told positions."""
    needed = {"attention_mask", "position_ids", "past_key_values"}
    passes = (model.forward, model.base_model.forward)
    takes_all = all(needed <= inspect.signature(one).parameters.keys() for one in passes)
    return takes_all and model.base_model is not model and holds_keys_and_values_alone(model.config)


def last_logits(
    model: "PreTrainedModel", ids: Tensor, mask: Tensor | None, positions: Tensor, cache: "DynamicCache"
) -> Tensor:
    """Return the logits behind the last token of each row, shape (batch, vocabulary).

    Args:
        model: What decodes.
        ids: Tokens that are not in the cache, shape (batch, tokens).
        mask: True on tokens that count, those in the cache first; ``None`` where all do.
        positions: Of the tokens, shape (batch, tokens).
        cache: Takes the tokens up.
    """
    arguments: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "past_key_values": cache,
        "use_cache": True,
    }
    if head_is_plain(model):
        hidden = model.base_model(**arguments).last_hidden_state[:, -1]
        return model.get_output_embeddings()(hidden)
    cut = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
    return model(**arguments, **cut).logits[:, -1]


def strings_completed(stop_strings: StopStrings, tokens: Tensor, drawn: Tensor, config: SamplingConfig) -> Tensor:
    """Tell which rows their last token ends by a string, never one of the first ``min_new_tokens``, shape (batch,).

    Args:
        stop_strings: The strings.
        tokens: Shape (batch, at least as many as were drawn).
        drawn: Tokens drawn of each row, that last one included, shape (batch,), at least 1.
        config: What is sampled.
    """
    rows = [row[:count][-stop_strings.window :] for row, count in zip(tokens.tolist(), drawn.tolist(), strict=True)]
    return torch.tensor(stop_strings.completed(rows), device=tokens.device) & (drawn > config.min_new_tokens)

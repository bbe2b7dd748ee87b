"""The samplers that run in this process: our decode loop, and transformers' ``generate`` as its reference."""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import position_ids_from_mask, response_lengths
from rlhf_lightning.models.causal_lm import head_is_plain, takes_logits_to_keep
from rlhf_lightning.rollout.cache import preallocated_cache
from rlhf_lightning.rollout.sampler import Progress, Samples, SamplingConfig, draw_tokens, refuse_nan, row_uniforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _LocalSampler:
    """Holds the model, or a copy of it in another type that is refreshed by ``sync``."""

    def __init__(self) -> None:
        self._model: PreTrainedModel | None = None
        self._version: int | None = None
        self._is_copy = False

    @property
    def model(self) -> "PreTrainedModel":
        """The model that samples."""
        if self._model is None:
            raise RuntimeError("call setup(model) before sampling")
        return self._model

    def setup(self, model: "PreTrainedModel", *, dtype: torch.dtype | None = None) -> None:
        """Sample from the model itself, or from a copy where another ``dtype`` is asked for."""
        self._is_copy = dtype is not None and dtype != model.dtype
        if self._is_copy:
            self._model = copy.deepcopy(model).to(dtype).requires_grad_(False)
            _restore_rotary_frequencies(self._model, model)
            self._version = None
        else:
            self._model = model

    def sync(self, named_params: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy new weights where a copy is held; nothing to do where the model itself samples."""
        if not self._is_copy or version == self._version:
            return
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, parameter in named_params:
                own[name].copy_(parameter)
        self._version = version

    def release(self) -> None:
        """Nothing outlives a call of ``sample``."""

    def close(self) -> None:
        """Let go of the model."""
        self._model = None


class CachedSampler(_LocalSampler):
    """Our decode loop: a preallocated key-value cache that finished rows leave, and an early end when all are done.

    Args:
        decode_batch_size: Rows decoded together; ``None`` takes all. Smaller needs less memory for the cache and
            changes no token.
    """

    def __init__(self, decode_batch_size: int | None = None) -> None:
        super().__init__()
        if decode_batch_size is not None and decode_batch_size < 1:
            raise UserError(f"decode_batch_size is {decode_batch_size}; it must be at least 1.")
        self.decode_batch_size = decode_batch_size

    @torch.no_grad()
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
    ) -> Samples:
        """Continue left-padded prompts; see :class:`~rlhf_lightning.rollout.sampler.Sampler`."""
        batch, size = len(prompt_ids), self.decode_batch_size or len(prompt_ids)
        uniforms = row_uniforms(seed, row_ids or range(batch), config.max_new_tokens).to(prompt_ids.device)
        tokens = prompt_ids.new_zeros(batch, config.max_new_tokens)
        logprobs = torch.zeros(tokens.shape, device=tokens.device)
        chunks = torch.arange(batch, device=tokens.device).split(size)
        for number, rows in enumerate(chunks):
            report = None if progress is None else _scaled(progress, number, len(chunks))
            state = _Decoding(self.model, prompt_ids[rows], attention_mask[rows], config, stop_ids)
            state.run(uniforms[rows], report)
            tokens[rows], logprobs[rows] = state.tokens, state.logprobs
        refuse_nan(logprobs)
        lengths, finished = response_lengths(tokens, stop_ids)
        width = int(lengths.max())
        return Samples(tokens[:, :width], lengths, finished, logprobs[:, :width])


class _Decoding:
    """One batch being decoded; ``active`` names the rows of ``tokens`` that are still in the cache."""

    def __init__(
        self,
        model: "PreTrainedModel",
        prompt_ids: Tensor,
        mask: Tensor,
        config: SamplingConfig,
        stop_ids: Sequence[int],
    ) -> None:
        self.model, self.config = model, config
        self.stop_ids = torch.tensor(list(stop_ids), device=prompt_ids.device)
        batch, steps = len(prompt_ids), config.max_new_tokens
        self.tokens = prompt_ids.new_zeros(batch, steps)
        self.logprobs = torch.zeros(batch, steps, device=prompt_ids.device)
        self.active = torch.arange(batch, device=prompt_ids.device)
        self.prompt_ids, self.prompt_size = prompt_ids, prompt_ids.shape[1]
        self.mask = torch.cat([mask, mask.new_ones(batch, steps)], dim=1)
        self.cache = preallocated_cache(model.config, self.prompt_size + steps)
        self.last_logits = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}

    def run(self, uniforms: Tensor, progress: Progress | None) -> None:
        """Decode until every row has stopped or is full."""
        inputs = self.prompt_ids
        positions = position_ids_from_mask(self.mask[:, : self.prompt_size])
        done = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
        for step in range(self.config.max_new_tokens):
            logits = self._next_logits(inputs, positions, self.prompt_size + step)
            drawn, logprobs = draw_tokens(
                logits, uniforms[self.active, step], self.config, step=step, stop_ids=self.stop_ids
            )
            # A row that has stopped stays in the batch until it is worth compacting; what it draws is dropped.
            self.tokens[self.active, step] = torch.where(done, 0, drawn)
            self.logprobs[self.active, step] = torch.where(done, 0.0, logprobs)
            done = done | torch.isin(drawn, self.stop_ids)
            if progress is not None:
                progress(step + 1, self.config.max_new_tokens)
            finished = int(done.sum())  # the one wait for the device in a step
            if finished == len(done):
                return
            inputs, positions = drawn[:, None], positions[:, -1:] + 1
            if finished * 4 >= len(done):
                inputs, positions, done = self._compact(~done, inputs, positions, done)

    def _next_logits(self, inputs: Tensor, positions: Tensor, seen: int) -> Tensor:
        arguments = {
            "input_ids": inputs,
            "attention_mask": self.mask[self.active, :seen],
            "position_ids": positions,
            "past_key_values": self.cache,
            "use_cache": True,
        }
        if head_is_plain(self.model):
            hidden = self.model.base_model(**arguments).last_hidden_state[:, -1]
            return self.model.get_output_embeddings()(hidden)
        return self.model(**arguments, **self.last_logits).logits[:, -1]

    def _compact(self, keep: Tensor, *rows: Tensor) -> list[Tensor]:
        """Drop rows from the cache; what was drawn for them stays in ``tokens``."""
        kept = keep.nonzero().squeeze(1)
        self.cache.batch_select_indices(kept)
        self.active = self.active[kept]
        return [tensor[kept] for tensor in rows]


class TransformersSampler(_LocalSampler):
    """``generate`` of transformers, drawing by the same random numbers; slower, and the reference for our loop."""

    @torch.no_grad()
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
    ) -> Samples:
        """Continue left-padded prompts; see :class:`~rlhf_lightning.rollout.sampler.Sampler`."""
        from transformers import GenerationConfig, LogitsProcessorList

        batch, width = prompt_ids.shape
        uniforms = row_uniforms(seed, row_ids or range(batch), config.max_new_tokens).to(prompt_ids.device)
        logprobs = torch.zeros(batch, config.max_new_tokens, device=prompt_ids.device)
        stops = torch.tensor(list(stop_ids), device=prompt_ids.device)

        def choose(ids: Tensor, logits: Tensor) -> Tensor:
            step = ids.shape[1] - width
            drawn, logprobs[:, step] = draw_tokens(logits, uniforms[:, step], config, step=step, stop_ids=stops)
            if progress is not None:
                progress(step + 1, config.max_new_tokens)
            return torch.full_like(logits, -torch.inf).scatter(1, drawn[:, None], 0.0)

        with _without_published_settings(self.model):
            output = self.model.generate(
                prompt_ids,
                attention_mask=attention_mask.long(),
                logits_processor=LogitsProcessorList([choose]),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=config.max_new_tokens,
                    eos_token_id=list(stop_ids) or None,
                    pad_token_id=0,
                ),
            )
        tokens = output[:, width:]
        refuse_nan(logprobs)
        lengths, finished = response_lengths(tokens, stop_ids)
        counts = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        size = int(lengths.max())
        tokens, logprobs = torch.where(counts, tokens, 0), torch.where(counts, logprobs[:, : tokens.shape[1]], 0.0)
        return Samples(tokens[:, :size], lengths, finished, logprobs[:, :size])


@contextlib.contextmanager
def _without_published_settings(model: "PreTrainedModel") -> Iterator[None]:
    """Hide a model's generation config, whose penalties and filters ``generate`` puts where ours says nothing."""
    from transformers import GenerationConfig

    published = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = published


def _restore_rotary_frequencies(rounded: "PreTrainedModel", exact: "PreTrainedModel") -> None:
    """Undo the rounding of rotary frequencies, as transformers does on loading: at place 200 it turns by a radian."""
    for (name, buffer), (_, original) in zip(rounded.named_buffers(), exact.named_buffers(), strict=True):
        if name.endswith("inv_freq"):
            buffer.data = original.detach().clone()


def _scaled(progress: Progress, number: int, of: int) -> Progress:
    """Report the progress of one chunk of several as a share of the whole."""
    return lambda done, total: progress(number * total + done, total * of)

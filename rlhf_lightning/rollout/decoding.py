"""The samplers that run in this process: our decode loop, and transformers' ``generate`` as its reference."""

import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import response_lengths
from rlhf_lightning.models.lora import merged
from rlhf_lightning.rollout.decode_loop import DecodeLoop, can_decode, strings_completed
from rlhf_lightning.rollout.linear import PackedLinears
from rlhf_lightning.rollout.sampler import (
    Progress,
    Sampler,
    Samples,
    SamplingConfig,
    draw_tokens,
    refuse_nan,
    row_uniforms,
)
from rlhf_lightning.rollout.stop_strings import StopStrings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("rlhf_lightning")


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
            # In train mode one whose activations are checkpointed takes no cache.
            self._model = copy.deepcopy(merged(model)).to(dtype).requires_grad_(False).eval()
            _restore_rotary_frequencies(self._model, model)
        else:
            self._model = model
        self._version = None

    def sync(self, named_params: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy new weights where a copy is held; nothing to do where the model itself samples."""
        if self._is_copy and version != self._version:
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


class CachedSampler(_LocalSampler, Sampler):
    """Our decode loop: a preallocated key-value cache whose rows are taken over by the next prompts once they stop.

    Equal prompts that follow each other are read once. On a processor in float32 the linear layers run on packed
    weights. A model whose layers keep another state than keys and values is left to :class:`TransformersSampler`.

    Args:
        decode_batch_size: Rows decoded together; ``None`` takes all. Smaller needs less memory for the cache and
            changes no token.
        pack_weights: False saves the second copy of the linear layers' weights that is held while sampling on a
            processor, and is about half as fast there.
    """

    def __init__(self, decode_batch_size: int | None = None, *, pack_weights: bool = True) -> None:
        super().__init__()
        if decode_batch_size is not None and decode_batch_size < 1:
            raise UserError(f"decode_batch_size is {decode_batch_size}; it must be at least 1.")
        self.decode_batch_size, self.pack_weights = decode_batch_size, pack_weights
        self._linears, self._decodes = PackedLinears(), True

    def setup(self, model: "PreTrainedModel", *, dtype: torch.dtype | None = None) -> None:
        """Sample from the model itself, or from a copy where another ``dtype`` is asked for."""
        super().setup(model, dtype=dtype)
        self._linears.release()
        self._decodes = can_decode(self.model)
        if not self._decodes:
            logger.info(
                "%s keeps another state than keys and values, or takes no positions; transformers' generate samples "
                "from it, which is slower.",
                type(self.model).__name__,
            )

    def release(self) -> None:
        """Free the packed weights."""
        self._linears.release()

    def close(self) -> None:
        """Let go of the model."""
        super().close()
        self._linears.release()

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
        stop_strings: StopStrings | None = None,
    ) -> Samples:
        """Continue left-padded prompts; see :class:`~rlhf_lightning.rollout.sampler.Sampler`."""
        if not self._decodes:
            return self._fall_back(
                prompt_ids,
                attention_mask,
                config=config,
                stop_ids=stop_ids,
                seed=seed,
                row_ids=row_ids,
                progress=progress,
                stop_strings=stop_strings,
            )
        linears = self._linears.applied(self.model, self._version) if self.pack_weights else contextlib.nullcontext()
        with linears:
            loop = DecodeLoop(
                self.model,
                prompt_ids,
                attention_mask.bool(),
                config=config,
                stop_ids=stop_ids,
                stop_strings=stop_strings,
                uniforms=_uniforms(seed, row_ids, prompt_ids, config),
                size=self.decode_batch_size or len(prompt_ids),
            )
            loop.run(progress)
        width = int(loop.lengths.max())
        logprobs = loop.logprobs[:, :width]
        refuse_nan(logprobs)
        return Samples(loop.tokens[:, :width], loop.lengths, loop.finished, logprobs)

    def _fall_back(self, *prompts: Tensor, **arguments: Any) -> Samples:
        generating = TransformersSampler()
        generating.setup(self.model)
        return generating.sample(*prompts, **arguments)


class TransformersSampler(_LocalSampler, Sampler):
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
        stop_strings: StopStrings | None = None,
    ) -> Samples:
        """Continue left-padded prompts; see :class:`~rlhf_lightning.rollout.sampler.Sampler`."""
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        batch, width = prompt_ids.shape
        uniforms = _uniforms(seed, row_ids, prompt_ids, config)
        logprobs = torch.zeros(batch, config.max_new_tokens, device=prompt_ids.device)
        stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=prompt_ids.device)

        criterion = None if stop_strings is None else _EndedByString(stop_strings, config, prompt_ids)

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
                stopping_criteria=StoppingCriteriaList([criterion] if criterion else []),
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
        if criterion is not None:
            lengths, finished = torch.minimum(lengths, criterion.ends), finished | criterion.finished
        counts = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        size = int(lengths.max())
        tokens, logprobs = torch.where(counts, tokens, 0), torch.where(counts, logprobs[:, : tokens.shape[1]], 0.0)
        return Samples(tokens[:, :size], lengths, finished, logprobs[:, :size])


class _EndedByString:
    """A stopping criterion of transformers that remembers how long each response was when a string ended it."""

    def __init__(self, stop_strings: StopStrings, config: SamplingConfig, prompt_ids: Tensor) -> None:
        self.stop_strings, self.config, self.width = stop_strings, config, prompt_ids.shape[1]
        self.ends = torch.full((len(prompt_ids),), config.max_new_tokens, device=prompt_ids.device)
        self.finished = torch.zeros(len(prompt_ids), dtype=torch.bool, device=prompt_ids.device)

    def __call__(self, ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        tokens = ids[:, self.width :]
        drawn = torch.full_like(self.ends, tokens.shape[1])
        completed = strings_completed(self.stop_strings, tokens, drawn, self.config)
        self.ends[completed] = self.ends[completed].clamp(max=tokens.shape[1])
        self.finished |= completed
        return self.finished


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


def _uniforms(seed: int, row_ids: Sequence[int] | None, prompt_ids: Tensor, config: SamplingConfig) -> Tensor:
    rows = range(len(prompt_ids)) if row_ids is None else row_ids
    return row_uniforms(seed, rows, config.max_new_tokens).to(prompt_ids.device)

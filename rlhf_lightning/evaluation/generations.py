"""What models answer to the same prompts, and what is measured of each answer."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_lightning.data.token_cache import tokenizer_digest
from rlhf_lightning.evaluation.cache import NOTHING_KEPT, ResultCache, as_input
from rlhf_lightning.evaluation.judges import Judgement, Judges
from rlhf_lightning.evaluation.prompts import PromptSet
from rlhf_lightning.functional.repetition import repeated_fraction
from rlhf_lightning.functional.sequences import SequenceBatch, length_sorted, pad_sequences
from rlhf_lightning.models.causal_lm import response_logprobs
from rlhf_lightning.models.digests import tensors_digest
from rlhf_lightning.rollout.collect import decode_responses
from rlhf_lightning.rollout.decoding import CachedSampler
from rlhf_lightning.rollout.reward_sources import ScoringBatch
from rlhf_lightning.rollout.sampler import SamplingConfig
from rlhf_lightning.rollout.stop_strings import StopStrings, resolve_stop_strings
from rlhf_lightning.seeding import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generations:
    """One model's answers, in the order of the prompts.

    Attributes:
        name: What the model is called.
        path: Where it was loaded from.
        responses: As text, without special tokens.
        lengths: Tokens of each response, its stop token included, shape (rows,), int64.
        finished: True where the response stopped by itself, shape (rows,), bool.
        kl: Log-probability of the response by this model minus that by the base, nats, shape (rows,), float64. Its
            mean estimates the KL divergence to the base; a single one may be negative.
        judgement: Score and metrics of each response.
        repetition: Share of each response's runs of four tokens that occurred in it before, shape (rows,), float32.
    """

    name: str
    path: str
    responses: list[str]
    lengths: Tensor
    finished: Tensor
    kl: Tensor
    judgement: Judgement
    repetition: Tensor

    @property
    def scores(self) -> Tensor | None:
        """Scores by the reward source, shape (rows,), float32; ``None`` where there is none."""
        return self.judgement.scores

    def row(self, number: int) -> dict[str, Any]:
        """Return what is known of one response, as plain data."""
        further = self.judgement.score_parts | self.judgement.metrics
        others = {name: float(values[number]) for name, values in self.judgement.others.items()}
        return {
            "response": self.responses[number],
            "score": None if self.scores is None else float(self.scores[number]),
            "kl": float(self.kl[number]),
            "length": int(self.lengths[number]),
            "finished": bool(self.finished[number]),
            **{name: float(values[number]) for name, values in further.items()},
            **({"judges": others} if others else {}),
        }


@torch.no_grad()
def sample_responses(
    model: "PreTrainedModel",
    prompt_ids: Sequence[Sequence[int]],
    *,
    config: SamplingConfig,
    stop_ids: Sequence[int],
    seed: int,
    batch_size: int = 64,
    stop_strings: StopStrings | None = None,
) -> tuple[SequenceBatch, Tensor]:
    """Let a model answer prompts, those of like length together.

    A row's random numbers follow from the seed and its place alone, so that every model draws by the same ones, and
    ``batch_size`` changes no token.

    Args:
        model: The model, on the device where it is to run.
        prompt_ids: Token ids of each prompt.
        config: What to sample.
        stop_ids: Tokens that end a response.
        seed: Fixes all draws.
        batch_size: Prompts answered together.
        stop_strings: Texts that end a response.

    Returns:
        Prompts and responses, and the finished flags, shape (rows,), in the order of the prompts, on the CPU.
    """
    sampler = CachedSampler()
    sampler.setup(model)
    responses: list[list[int]] = [[] for _ in prompt_ids]
    finished = torch.zeros(len(prompt_ids), dtype=torch.bool)
    done = 0
    for group in length_sorted(torch.tensor([len(ids) for ids in prompt_ids]), batch_size):
        ids, lengths = pad_sequences([prompt_ids[row] for row in group.tolist()], pad_id=0, left=True)
        mask = torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]
        samples = sampler.sample(
            ids.to(model.device),
            mask.to(model.device),
            config=config,
            stop_ids=stop_ids,
            seed=derive_seed(seed, "compare"),
            row_ids=group.tolist(),
            stop_strings=stop_strings,
        )
        for row, tokens, length in zip(group.tolist(), samples.tokens.tolist(), samples.lengths.tolist(), strict=True):
            responses[row] = tokens[:length]
        finished[group] = samples.finished.cpu()
        done += len(group)
        logger.info("sampled %d of %d responses", done, len(prompt_ids))
    return joined(prompt_ids, responses), finished


def joined(prompt_ids: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> SequenceBatch:
    """Put prompts and responses into one batch.

    Example:
        >>> joined([[5, 6], [7]], [[1], [2, 3]]).input_ids
        tensor([[5, 6, 1],
                [7, 2, 3]])
    """
    ids, _ = pad_sequences(
        [[*prompt, *response] for prompt, response in zip(prompt_ids, responses, strict=True)], pad_id=0
    )
    lengths = [torch.tensor([len(row) for row in rows]) for rows in (prompt_ids, responses)]
    return SequenceBatch(ids, lengths[0], lengths[1])


@torch.no_grad()
def sequence_logprobs(
    model: "PreTrainedModel | nn.Module", sequences: SequenceBatch, *, temperature: float = 1.0, batch_size: int = 32
) -> Tensor:
    """Return the log-probability of each whole response, teacher-forced, nats, shape (rows,), float64, on the CPU.

    Args:
        model: A causal language model.
        sequences: Prompts and responses.
        temperature: Divides the logits, as it did in sampling; above 0.
        batch_size: Rows in one forward pass; those of like length go together.
    """
    device = next(model.parameters()).device
    totals = torch.zeros(len(sequences.lengths), dtype=torch.float64)
    for rows in length_sorted(sequences.lengths, batch_size):
        part = SequenceBatch(*(tensor.to(device) for tensor in sequences.select(rows)))
        totals[rows] = response_logprobs(model, part, temperature=temperature).double().sum(dim=1).cpu()
    return totals


def kept_logprobs(
    cache: ResultCache,
    model: "PreTrainedModel",
    sequences: SequenceBatch,
    *,
    temperature: float = 1.0,
    batch_size: int = 32,
) -> Tensor:
    """Return :func:`sequence_logprobs`, or find what they were before.

    Args:
        cache: Where they are kept.
        model: A causal language model.
        sequences: Prompts and responses.
        temperature: Divides the logits.
        batch_size: Rows in one forward pass.
    """

    def make() -> dict[str, Tensor]:
        return {"logprobs": sequence_logprobs(model, sequences, temperature=temperature, batch_size=batch_size)}

    def inputs() -> list[str]:
        tokens = tensors_digest(sequences._asdict())
        return [cache.model(model), tokens, as_input(temperature, model.device.type)]

    return cache.get("logprobs", inputs, make)["logprobs"]


@dataclass(frozen=True)
class Bench:
    """Everything that is the same for every model.

    Attributes:
        prompts: What is asked.
        prompt_ids: The same in tokens.
        tokenizer: The base's, whose tokens all models share.
        stop_ids: Tokens that end a response.
        sampling: What to sample.
        judges: What looks at the answers.
        device: Where the models run.
        seed: Fixes all draws.
        batch_size: Prompts in one forward pass.
        cache: Where answers and log-probabilities are kept.
    """

    prompts: PromptSet
    prompt_ids: list[list[int]]
    tokenizer: "PreTrainedTokenizerBase"
    stop_ids: list[int]
    sampling: SamplingConfig
    judges: Judges
    device: torch.device
    seed: int
    batch_size: int
    cache: ResultCache = NOTHING_KEPT

    def answer(self, name: str, path: str, model: "PreTrainedModel", base: "PreTrainedModel") -> Generations:
        """Let a model answer, and measure its answers.

        Args:
            name: What the model is called.
            path: Where it was loaded from.
            model: The model, on the bench's device.
            base: What the KL divergence is measured to; may be the model itself.
        """
        sequences, finished = self.sample(model, self.prompt_ids, self.sampling, self.seed)
        responses = decode_responses(self.tokenizer, sequences)
        return Generations(
            name=name,
            path=path,
            responses=responses,
            lengths=sequences.response_lengths,
            finished=finished,
            kl=self._log_ratio(model, base, sequences),
            judgement=self.judge(sequences, finished, responses),
            repetition=repeated_fraction(sequences.response_tokens, sequences.response_mask),
        )

    def sample(
        self, model: "PreTrainedModel", prompt_ids: Sequence[Sequence[int]], sampling: SamplingConfig, seed: int
    ) -> tuple[SequenceBatch, Tensor]:
        """Let a model answer prompts, or find what it answered before.

        Args:
            model: The model, on the bench's device.
            prompt_ids: Token ids of each prompt.
            sampling: What to sample.
            seed: Fixes all draws.

        Returns:
            As :func:`sample_responses`.
        """

        def make() -> dict[str, Tensor]:
            stop_strings = resolve_stop_strings(self.tokenizer, sampling.stop_strings)
            sequences, finished = sample_responses(
                model,
                prompt_ids,
                config=sampling,
                stop_ids=self.stop_ids,
                seed=seed,
                batch_size=self.batch_size,
                stop_strings=stop_strings,
            )
            return {**sequences._asdict(), "finished": finished}

        def inputs() -> list[str]:
            plain = as_input(prompt_ids, asdict(sampling), self.stop_ids, seed, self.device.type)
            return [self.cache.model(model), self._tokenizer_digest, plain]

        kept = self.cache.get("answers", inputs, make)
        return SequenceBatch(*(kept[name] for name in SequenceBatch._fields)), kept["finished"]

    def judge(self, sequences: SequenceBatch, finished: Tensor, responses: list[str], *, each: int = 1) -> Judgement:
        """Measure answers to the bench's prompts.

        Args:
            sequences: Prompts and answers, ``each`` to a prompt, those of a prompt in sequence.
            finished: True where the answer stopped by itself, shape (rows,), bool.
            responses: The answers as text.
            each: How many answers there are to each prompt.
        """
        there = SequenceBatch(*(tensor.to(self.device) for tensor in sequences))
        prompts = [prompt for prompt in self.prompts.as_trained for _ in range(each)]
        rows = [row for row in self.prompts.rows for _ in range(each)]
        return self.judges.judge(ScoringBatch(there, finished.to(self.device), prompts, responses, rows))

    @cached_property
    def _tokenizer_digest(self) -> str:
        return tokenizer_digest(self.tokenizer)

    def _log_ratio(self, model: "PreTrainedModel", base: "PreTrainedModel", sequences: SequenceBatch) -> Tensor:
        if model is base:
            return torch.zeros(len(self.prompt_ids), dtype=torch.float64)
        temperature = self.sampling.temperature or 1.0
        own, others = (
            kept_logprobs(self.cache, of, sequences, temperature=temperature, batch_size=self.batch_size)
            for of in (model, base)
        )
        return own - others

"""Where scores come from: a Python function, or a weighted sum of several sources."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_lightning.data.shapes import Prompt
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.rollout.user_functions import (
    RewardFunctionError,
    as_numbers,
    call_with_columns,
    checked_timeout,
    columns_of,
    named_function,
    rows_told,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ScoringBatch(NamedTuple):
    """Responses to be scored.

    Attributes:
        sequences: Prompts and responses in the policy's tokens.
        finished: True where the response stopped by itself, shape (batch,), bool.
        prompts: The prompts as text or chat messages.
        responses: The responses as text, without special tokens.
        rows: The other columns of each prompt's row.
    """

    sequences: SequenceBatch
    finished: Tensor
    prompts: list[Prompt]
    responses: list[str]
    rows: list[dict[str, Any]]


class Scores(NamedTuple):
    """Scores of a batch.

    Attributes:
        total: What PPO maximises, shape (batch,), float32.
        parts: Each single reward by name, before its weight, shape (batch,); for the log.
        per_token: Reward that is paid at single tokens, shape (batch, longest response), float32, zero where a response
            has no token; already contained in ``total``, of which the rest is paid at the last token. ``None`` where
            all is paid there.
    """

    total: Tensor
    parts: dict[str, Tensor]
    per_token: Tensor | None = None


class RewardSource(nn.Module, ABC):
    """Anything that scores responses; frozen, and never trained by what it scores."""

    name: str = "reward"

    def setup(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Load what scoring needs; called once, before the first batch.

        Args:
            tokenizer: The policy's.
        """

    def digest(self) -> str | None:
        """Return what tells this source's scores from others', after :meth:`setup`; scores are then kept by it.

        ``None``: that is not known, as of a function, and each response is scored anew.
        """
        return None

    @abstractmethod
    def score(self, batch: ScoringBatch) -> Scores:
        """Score each response; float32, finite."""


class FunctionReward(RewardSource):
    """A Python function ``f(prompts, responses, **columns) -> list of numbers``.

    Args:
        function: The function, or where it is: ``package.module:name`` or ``path/to/file.py:name``. ``columns`` are the
            other columns of the prompts' rows, a list each; a function without ``**`` gets those that it names.
        name: Under which its scores are logged; ``None`` takes the function's.
        timeout_s: Seconds that a call, for all responses of a process, may take before the run is stopped; ``None`` is
            any time.
    """

    def __init__(
        self, function: str | Callable[..., Sequence[Any]], name: str | None = None, timeout_s: float | None = 3600.0
    ) -> None:
        super().__init__()
        self.function, self.name = named_function(function, name)
        self.timeout_s = checked_timeout(timeout_s)

    def score(self, batch: ScoringBatch) -> Scores:
        """Call the function once with the whole batch, and check what comes back."""
        with rows_told(batch.prompts, batch.responses, batch.rows):
            scores = self._numbers(batch).to(batch.sequences.input_ids.device)
        return Scores(scores, {self.name: scores})

    def _numbers(self, batch: ScoringBatch) -> Tensor:
        columns = columns_of(batch.rows)
        numbers = call_with_columns(
            self.function, batch.prompts, batch.responses, columns, name=self.name, timeout_s=self.timeout_s
        )
        if len(numbers) != len(batch.responses):
            raise RewardFunctionError(
                f"reward function {self.name!r} returned {len(numbers)} scores for {len(batch.responses)} responses; "
                "it must return one number for each."
            )
        scores = as_numbers(numbers, self.name)
        bad = [row for row, number in enumerate(scores.tolist()) if not math.isfinite(number)]
        if bad:
            raise RewardFunctionError(
                f"reward function {self.name!r} returned {float(scores[bad[0]])} for the response "
                f"{batch.responses[bad[0]][:200]!r}; scores must be finite.",
                bad[0],
            )
        return scores


class TokenFunctionReward(RewardSource):
    """A Python function that rewards each token by itself.

    It is ``f(prompts, responses, tokens, **columns)`` and returns a list for each response, with one number for each of
    its tokens. ``tokens`` are the tokens of each response as the policy's vocabulary writes them (byte-level ones begin
    with ``Ġ`` after a blank), the stop token included. A response's score is the sum of its rewards. Score transforms
    do not touch rewards of single tokens.

    Args:
        function: The function, or where it is: ``package.module:name`` or ``path/to/file.py:name``. ``columns`` are the
            other columns of the prompts' rows, a list each; a function without ``**`` gets those that it names.
        name: Under which its scores are logged; ``None`` takes the function's.
        timeout_s: Seconds that a call, for all responses of a process, may take before the run is stopped; ``None`` is
            any time.
    """

    def __init__(
        self, function: str | Callable[..., Sequence[Any]], name: str | None = None, timeout_s: float | None = 3600.0
    ) -> None:
        super().__init__()
        self.function, self.name = named_function(function, name)
        self.timeout_s = checked_timeout(timeout_s)

    def setup(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Keep the tokenizer, which knows how tokens are written."""
        self.tokenizer = tokenizer

    def score(self, batch: ScoringBatch) -> Scores:
        """Call the function once with the whole batch, and check what comes back."""
        with rows_told(batch.prompts, batch.responses, batch.rows):
            per_token = self._numbers(batch).to(batch.sequences.input_ids.device)
        scores = per_token.sum(dim=1)
        return Scores(scores, {self.name: scores}, per_token)

    def _numbers(self, batch: ScoringBatch) -> Tensor:
        sequences = batch.sequences
        pairs = zip(sequences.response_tokens.tolist(), sequences.response_lengths.tolist(), strict=True)
        tokens = [self.tokenizer.convert_ids_to_tokens(ids[:length]) for ids, length in pairs]
        columns = columns_of(batch.rows) | {"tokens": tokens}
        wanted = "a list of one number for each token, for each response"
        options: dict[str, Any] = {"name": self.name, "expected": wanted, "timeout_s": self.timeout_s}
        rows = call_with_columns(self.function, batch.prompts, batch.responses, columns, **options)
        if len(rows) != len(tokens):
            raise RewardFunctionError(
                f"reward function {self.name!r} returned {len(rows)} lists for {len(tokens)} responses; it must return "
                f"{wanted}."
            )
        per_token = torch.zeros(sequences.response_mask.shape)
        for number, (rewards, own) in enumerate(zip(rows, tokens, strict=True)):
            per_token[number, : len(own)] = self._checked(rewards, own, number)
        return per_token

    def _checked(self, rewards: Any, tokens: list[str], row: int) -> Tensor:
        """Return the rewards of one response, one for each of its tokens."""
        if not isinstance(rewards, Iterable) or isinstance(rewards, str | bytes):
            raise RewardFunctionError(
                f"reward function {self.name!r} returned {shorten(repr(rewards), 80)} for a response; it must return a "
                "list of one number for each token.",
                row,
            )
        numbers = as_numbers(rewards, self.name, row)
        if len(numbers) != len(tokens):
            raise RewardFunctionError(
                f"reward function {self.name!r} returned {len(numbers)} numbers for a response of {len(tokens)} tokens "
                f"({shorten(' '.join(tokens), 80, placeholder=' ...')}); it must return one for each token.",
                row,
            )
        bad = (~numbers.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise RewardFunctionError(
                f"reward function {self.name!r} returned {float(numbers[bad[0]])} for the token {tokens[bad[0]]!r}; "
                "rewards must be finite.",
                row,
            )
        return numbers


class WeightedSum(RewardSource):
    """A weighted sum of reward sources, each logged by itself; rewards of single tokens keep their places.

    Args:
        rewards: The sources.
        weights: One number each; negative for a penalty.
    """

    def __init__(self, rewards: list[RewardSource], weights: list[float]) -> None:
        super().__init__()
        if len(rewards) != len(weights) or not rewards:
            raise UserError(
                f"WeightedSum: {len(rewards)} rewards but {len(weights)} weights; give one weight for each."
            )
        if not all(map(math.isfinite, weights)):
            raise UserError(f"WeightedSum: the weights are {weights}; they must be finite.")
        names = [reward.name for reward in rewards]
        if len(set(names)) != len(names):
            raise UserError(f"WeightedSum: the names {names} are not distinct; set `name` on the rewards.")
        self.rewards, self.weights = nn.ModuleList(rewards), weights
        self.sources = tuple(rewards)

    def setup(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Set up every source."""
        for reward in self.sources:
            reward.setup(tokenizer)

    def digest(self) -> str | None:
        """Return a digest of the sources and their weights, where each has one."""
        digests = [reward.digest() for reward in self.sources]
        return None if None in digests or type(self) is not WeightedSum else f"{digests} {self.weights}"

    def score(self, batch: ScoringBatch) -> Scores:
        """Add up the weighted scores."""
        scores = [reward.score(batch) for reward in self.sources]
        parts = {name: value for part in scores for name, value in part.parts.items()}
        weighted = list(zip(self.weights, scores, strict=True))
        dense = [weight * part.per_token for weight, part in weighted if part.per_token is not None]
        if not dense:
            return Scores(torch.stack([weight * part.total for weight, part in weighted]).sum(dim=0), parts)
        per_token = torch.stack(dense).sum(dim=0)
        # What is paid at the end apart from what is paid before it: where there is no such part, the rest of the total
        # is then 0 to the bit, and no rounding that a transform could blow up.
        ends = [w * (p.total if p.per_token is None else p.total - p.per_token.sum(dim=1)) for w, p in weighted]
        return Scores(torch.stack(ends).sum(dim=0) + per_token.sum(dim=1), parts, per_token)

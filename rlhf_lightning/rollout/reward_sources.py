"""Where scores come from: a reward model, a Python function, a weighted sum of several."""

import importlib.util
import inspect
import json
import math
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import UserError, did_you_mean
from rlhf_lightning.functional.sequences import SequenceBatch, pad_sequences
from rlhf_lightning.models.loading import foreign_token, load_sequence_classifier, load_tokenizer
from rlhf_lightning.models.scalar_head import ScalarModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | list[dict[str, str]]


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
    """

    total: Tensor
    parts: dict[str, Tensor]


class RewardSource(nn.Module, ABC):
    """Anything that scores responses; frozen, and never trained by what it scores."""

    name: str = "reward"

    def setup(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Load what scoring needs; called once, before the first batch.

        Args:
            tokenizer: The policy's.
        """

    @abstractmethod
    def score(self, batch: ScoringBatch) -> Scores:
        """Score each response; float32, finite."""


class RewardModel(RewardSource):
    """A Hugging Face reward model: ``AutoModelForSequenceClassification`` with one label.

    Where its tokenizer is the policy's, it reads the very tokens the policy produced; where not, the conversation is
    put through its own chat template and tokenizer.

    Args:
        path: Folder or hub name.
        batch_size: Sequences in one forward pass; larger is faster and needs more memory.
        name: Under which its scores are logged.
    """

    def __init__(self, path: str, batch_size: int = 32, name: str = "reward_model") -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"RewardModel: batch_size is {batch_size}; it must be at least 1.")
        self.path, self.batch_size, self.name = path, batch_size, name
        self.scored_token_id: int | None = None
        self.same_tokens = True

    def setup(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Load model and tokenizer, and find out whether its tokens are the policy's."""
        if hasattr(self, "scalar"):
            return
        self.tokenizer = load_tokenizer(self.path)
        model = load_sequence_classifier(self.path).eval().requires_grad_(False)
        self.scalar = ScalarModel(model)
        self.scored_token_id = getattr(model.config, "scored_token_id", None)
        self.same_tokens = same_tokenization(tokenizer, self.tokenizer)

    @torch.no_grad()
    def score(self, batch: ScoringBatch) -> Scores:
        """Score each response at its last token."""
        sequences = batch.sequences if self.same_tokens else self._retokenized(batch)
        order = sequences.lengths.argsort(descending=True)
        scores = torch.empty(len(order), device=order.device)
        for rows in order.split(self.batch_size):
            scores[rows] = self.scalar.scores(sequences.select(rows))
        return Scores(scores, {self.name: scores})

    def _retokenized(self, batch: ScoringBatch) -> SequenceBatch:
        from rlhf_lightning.data.chat import ConversationEncoder

        chat = isinstance(batch.prompts[0], list)
        encoder = ConversationEncoder(self.tokenizer, chat=chat)
        rows, prompt_lengths, response_lengths = [], [], []
        for prompt, response, finished in zip(batch.prompts, batch.responses, batch.finished.tolist(), strict=True):
            prompt_ids, response_ids = encoder.encode(prompt, response)
            response_ids = response_ids if finished else response_ids[:-1]
            rows.append(prompt_ids + response_ids)
            prompt_lengths.append(len(prompt_ids))
            response_lengths.append(len(response_ids))
        device = batch.sequences.input_ids.device
        ids, _ = pad_sequences(rows, pad_id=0)
        lengths = torch.tensor([prompt_lengths, response_lengths], device=device)
        return SequenceBatch(ids.to(device), lengths[0], lengths[1])


class FunctionReward(RewardSource):
    """A Python function ``f(prompts, responses, **columns) -> list of numbers``.

    Args:
        function: ``package.module:name`` or ``path/to/file.py:name``. ``columns`` are the other columns of the prompts'
            rows, a list each; a function without ``**`` gets those that it names.
        name: Under which its scores are logged; ``None`` takes the function's.
    """

    def __init__(self, function: str, name: str | None = None) -> None:
        super().__init__()
        self.function = load_function(function)
        self.name = name or function.rsplit(":", 1)[-1]

    def score(self, batch: ScoringBatch) -> Scores:
        """Call the function once with the whole batch, and check what comes back."""
        columns = columns_of(batch.rows)
        numbers = call_with_columns(self.function, batch.prompts, batch.responses, columns, name=self.name)
        if len(numbers) != len(batch.responses):
            raise UserError(
                f"reward function {self.name!r} returned {len(numbers)} scores for {len(batch.responses)} responses; "
                "it must return one number for each."
            )
        try:
            scores = torch.tensor([float(number) for number in numbers])
        except (TypeError, ValueError) as error:
            raise UserError(f"reward function {self.name!r} must return numbers: {error}.") from error
        bad = [row for row, number in enumerate(scores.tolist()) if not math.isfinite(number)]
        if bad:
            raise UserError(
                f"reward function {self.name!r} returned {float(scores[bad[0]])} for the response "
                f"{batch.responses[bad[0]][:200]!r}; scores must be finite."
            )
        scores = scores.to(batch.sequences.input_ids.device)
        return Scores(scores, {self.name: scores})


class WeightedSum(RewardSource):
    """A weighted sum of reward sources, each logged by itself.

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
        names = [reward.name for reward in rewards]
        if len(set(names)) != len(names):
            raise UserError(f"WeightedSum: the names {names} are not distinct; set `name` on the rewards.")
        self.rewards, self.weights = nn.ModuleList(rewards), weights
        self.sources = tuple(rewards)

    def setup(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Set up every source."""
        for reward in self.sources:
            reward.setup(tokenizer)

    def score(self, batch: ScoringBatch) -> Scores:
        """Add up the weighted scores."""
        scores = [reward.score(batch) for reward in self.sources]
        total = torch.stack([weight * part.total for weight, part in zip(self.weights, scores, strict=True)]).sum(dim=0)
        return Scores(total, {name: value for part in scores for name, value in part.parts.items()})


def load_function(path: str) -> Callable[..., Sequence[float]]:
    """Load a function by ``package.module:name`` or ``path/to/file.py:name``.

    Raises:
        UserError: If the form, the module, the file or the name is wrong.
    """
    module_name, separator, name = path.rpartition(":")
    if not separator or not name:
        raise UserError(f"function {path!r} must have the form package.module:name or path/to/file.py:name.")
    try:
        module = _module_of_file(Path(module_name)) if module_name.endswith(".py") else import_module(module_name)
    except UserError:
        raise
    except Exception as error:  # whatever the user's own code raises
        file = f"{module_name.replace('.', '/')}.py"
        advice = f" For the file give '{file}:{name}'." if Path(file).is_file() else ""
        raise UserError(f"function {path!r} cannot be imported: {described_failure(error)}.{advice}") from error
    function = getattr(module, name, None)
    if function is None:
        raise UserError(f"function {path!r}: {module_name} has no function {name!r}.{did_you_mean(name, dir(module))}")
    if not callable(function):
        raise UserError(f"function {path!r}: {name!r} is a {type(function).__name__}, not a function.")
    return function


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.glob("*.py")]
        raise UserError(f"the file '{path}' of a reward function does not exist.{did_you_mean(path.name, siblings)}")
    spec = importlib.util.spec_from_file_location(f"reward_file.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses, among others, look their module up there
    spec.loader.exec_module(module)
    return module


def described_failure(error: Exception) -> str:
    """Return what the user's own code raised, and in which line of which file.

    Example:
        >>> described_failure(ValueError("no"))
        'ValueError: no'
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError | ModuleNotFoundError):
        place = ""  # The first tells its place itself; the other's is in the import system.
    return shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...") + place


def columns_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Turn rows into columns; a value that a row lacks is ``None``."""
    names = {name: None for row in rows for name in row}
    return {name: [row.get(name) for row in rows] for name in names if name not in {"prompts", "responses"}}


def call_with_columns(
    function: Callable[..., Sequence[float]],
    prompts: list[Prompt],
    responses: list[str],
    columns: dict[str, list[Any]],
    *,
    name: str,
) -> list[float]:
    """Call a reward function with those columns that its signature takes.

    Raises:
        UserError: If it asks for a column that the rows lack, or returns no list.
    """
    parameters = list(inspect.signature(function).parameters.values())
    # Prompts and responses go in by place, whatever the function calls them; a column of that name stays out.
    named = [p for p in parameters[2:] if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}]
    lacking = [p.name for p in named if p.default is p.empty and p.name not in columns]
    if lacking:
        raise UserError(
            f"reward function {name!r} asks for the column {lacking[0]!r}, but the prompts' rows have "
            f"{', '.join(columns) or 'no columns'}.{did_you_mean(lacking[0], columns)}"
        )
    wanted = {p.name for p in named}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        wanted = set(columns) - {p.name for p in parameters[:2]} | wanted
    try:
        numbers = function(prompts, responses, **{key: column for key, column in columns.items() if key in wanted})
    except Exception as error:  # whatever the user's own code raises
        raise UserError(f"reward function {name!r} failed: {described_failure(error)}.") from error
    if not isinstance(numbers, Iterable):
        raise UserError(f"reward function {name!r} returned {numbers}; it must return one number for each response.")
    return list(numbers)


def same_tokenization(a: "PreTrainedTokenizerBase", b: "PreTrainedTokenizerBase") -> bool:
    """Tell whether tokens of ``a`` mean the same to ``b``, which may have more, and both template chats alike."""
    if foreign_token(a, b) is not None or (a.chat_template or "") != (b.chat_template or ""):
        return False
    if a.is_fast and b.is_fast:
        parts = [json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (a, b)]
        return all(parts[0][key] == parts[1][key] for key in ("model", "normalizer", "pre_tokenizer"))
    return type(a) is type(b)

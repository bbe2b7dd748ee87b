"""What the data modules have in common: rows in, parsed, split, counted, and handed out as batches."""

import contextlib
import logging
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from lightning.pytorch import LightningDataModule

from rlhf_lightning.data.chat import Conversation, ConversationEncoder, EncodedConversation
from rlhf_lightning.data.digest import HasSequences, content_digest
from rlhf_lightning.data.readers import is_hub_name, line_of_row, named_sources, read_rows
from rlhf_lightning.data.shapes import Prompt
from rlhf_lightning.data.splits import HasPrompt, prompt_key, split_by_prompt
from rlhf_lightning.data.stream import BatchStream, EvalBatches
from rlhf_lightning.data.token_cache import TokenCache
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_tokenizer
from rlhf_lightning.seeding import run_seed

log = logging.getLogger("rlhf_lightning")


Item = TypeVar("Item", bound=HasPrompt)
Example = TypeVar("Example", bound=HasSequences)
Batch = TypeVar("Batch")


_AGAINST_DROPPING = {
    "dropped_overlong": "Raise max_length, or set overlong: truncate.",
    "dropped_empty_prompt": "A chat needs prompts that say something.",
}


_NAMED_ROWS = 5  # of those that are dropped as bad
_ITEMS_AT_A_TIME = 1000  # enough for any number of cores, and little beside the rows themselves


class Numbered(NamedTuple, Generic[Item]):
    """An item with where it came from, source and row counted from 1, to name it where something is wrong with it."""

    source: str
    row: int
    item: Item

    @property
    def prompt(self) -> Prompt:
        """The item's prompt."""
        return self.item.prompt


class RowsDataModule(LightningDataModule, ABC, Generic[Item, Example, Batch]):
    """A data module over rows that are read once, parsed, tokenised and kept in memory.

    A subclass says what is in a row (:meth:`parse`), what of it is tokenised (:meth:`conversation`), what becomes of
    the ids (:meth:`example`) and how they make a batch (:meth:`collate`).

    ``batch_type`` is the class of its batches. ``counts`` holds after :meth:`setup` how many rows were read, kept,
    truncated and dropped, and why.

    Args:
        source: A ``.jsonl``, ``.json``, ``.csv`` (also with ``.gz``) or ``.parquet`` file, ``builtin:demo/<name>``, or
            a hub name (``owner/name`` or ``owner/name:config``); a list of them is read as one, one behind another.
        val_source: Validation rows, named likewise.
        val_size: Rows to take off the source for validation instead, by prompt, so that training shares none with them.
        batch_size: Examples per optimizer step over all processes together; more makes steps steadier and dearer.
        val_batch_size: Examples per validation step over all processes together; ``None`` takes ``batch_size``.
        chat: Apply the tokenizer's chat template; false takes prompts and responses as plain text.
        stop_token: Token that ends a response; ``None`` takes the tokenizer's EOS token.
        tokenizer: Model folder or hub name to take the tokenizer from; ``None`` takes that of the module in training.
        split: Split of a hub data set.
        val_split: Split of a hub data set for validation.
        limit: Rows of each source to use, the first ones; ``None`` uses all.
        skip: Rows of each source to leave out before those, so that two models learn from different rows; 0 is none.
        shuffle: Draw training rows in a random order that follows from the run's seed.
        bad_rows: What to do with a row that cannot be read: stop with an ``error`` that names it, or ``drop`` it, count
            it and name the first ones by file and line.
        max_bad_share: Share of a source's rows in [0, 1] that may be dropped as bad; more is an error, as the file is
            then another than was meant. 1 is off.
        token_cache: Folder in which token ids are kept for the next run, by the content of texts and tokenizer;
            ``None`` keeps none. Worth it where tokenising takes longer than a start may.

    Raises:
        UserError: If numbers do not go together; from ``setup`` if the data cannot be used.
    """

    batch_type: type

    def __init__(
        self,
        source: str | list[str],
        val_source: str | list[str] | None = None,
        val_size: int = 0,
        *,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        chat: bool = True,
        stop_token: str | None = None,
        tokenizer: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        limit: int | None = None,
        skip: int = 0,
        shuffle: bool = True,
        bad_rows: Literal["error", "drop"] = "error",
        max_bad_share: float = 0.1,
        token_cache: str | None = None,
    ) -> None:
        super().__init__()
        for name, number in {"batch_size": batch_size, "val_batch_size": val_batch_size, "limit": limit}.items():
            if number is not None and number < 1:
                raise UserError(f"{name} is {number}; expected at least 1.")
        if skip < 0:
            raise UserError(f"skip is {skip}; expected at least 0.")
        if val_size < 0 or (val_size and (val_source or val_split)):
            raise UserError(
                f"val_size is {val_size}; expected 0 or more, and 0 where val_source or val_split name the validation "
                "rows."
            )
        if val_split and not all(map(is_hub_name, named_sources(val_source or source))):
            raise UserError(f"val_split {val_split!r} needs a hub data set; for files give val_source or val_size.")
        if not 0 <= max_bad_share <= 1:
            raise UserError(f"max_bad_share is {max_bad_share}; it must lie in [0, 1] (1 is off).")
        self.source, self.val_source, self.val_size = source, val_source, val_size
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.chat, self.stop_token, self.tokenizer_name = chat, stop_token, tokenizer
        self.split, self.val_split, self.skip, self.limit = split, val_split, skip, limit
        self.shuffle, self.bad_rows, self.token_cache = shuffle, bad_rows, token_cache
        self.counts: Counter[str] = Counter()
        self.max_bad_share = max_bad_share
        self._rows: Counter[str] = Counter()  # by source
        self._bad: dict[str, dict[int, str]] = {}  # what is wrong with which row, by source
        self.train_examples: list[Example] = []
        self.val_examples: list[Example] = []
        self._encoder: ConversationEncoder | None = None
        self._stream: BatchStream[Example, Batch] | None = None
        self._taken_up: dict[str, Any] | None = None  # a checkpoint's stream, until there is one to go on with it

    @property
    def encoder(self) -> ConversationEncoder:
        """What turns conversations into token ids; there after :meth:`setup`."""
        if self._encoder is None:
            raise RuntimeError("the data module is not set up; call setup() first.")
        return self._encoder

    def extremes(self) -> tuple[int, int]:
        """Return the length of the longest sequence in tokens and the largest token id; there after :meth:`setup`."""
        sequences = [parts for part in (self.train_examples, self.val_examples) for e in part for parts in e.sequences]
        longest = max((sum(map(len, parts)) for parts in sequences), default=0)
        return longest, max((max(ids) for parts in sequences for ids in parts if len(ids)), default=0)

    @abstractmethod
    def parse(self, row: dict[str, Any]) -> list[Item]:
        """Return what a row holds for this task, none, one or several items."""

    @abstractmethod
    def conversation(self, item: Item, counts: Counter[str]) -> Conversation | None:
        """Return what is to be tokenised of an item, or ``None`` to drop it and count why."""

    @abstractmethod
    def example(self, item: Item, encoded: EncodedConversation, counts: Counter[str]) -> Example | None:
        """Make an example of an item's ids, or return ``None`` to drop it; either way count what was done to it."""

    @abstractmethod
    def collate(self, examples: list[Example]) -> Batch:
        """Return a batch of these examples."""

    def collate_for_training(self, examples: list[Example]) -> Batch:
        """Return a training batch of these examples, where that is another than :meth:`collate` gives."""
        return self.collate(examples)

    def prepare_data(self) -> None:
        """Download what is on the hub, on one process, for all to find in the cache."""
        for source, split in [
            (self.source, self.split),
            (self.val_source or self.source, self.val_split or self.split),
        ]:
            for name in filter(is_hub_name, named_sources(source)):
                read_rows(name, split=split)

    def setup(self, stage: str) -> None:
        """Read, parse, split and tokenise, once; training rows only if the stage is a training.

        Raises:
            UserError: If a row cannot be read, nothing is left of the data, or ``stage`` needs validation rows that are
                not there.
        """
        if stage in ("validate", "test") and not (self.val_source or self.val_split or self.val_size):
            command = getattr(stage, "value", stage)  # an enumeration when it comes from the Trainer
            raise UserError(f"{command} needs validation rows; set val_source or val_size.")
        if self._encoder is None:
            self._encoder = ConversationEncoder(self._tokenizer(), stop_token=self.stop_token, chat=self.chat)
        evaluates = stage in ("validate", "test", "predict")
        if not self.train_examples and not (evaluates and self.val_examples):
            self._read(with_train=not evaluates)

    def train_dataloader(self) -> BatchStream[Example, Batch]:
        """Return a new resumable stream over the training rows, from where a checkpoint that was loaded left it."""
        rank, world_size = self._place()
        self._stream = BatchStream(
            self.train_examples,
            self.batch_size,
            self.collate_for_training,
            seed=run_seed(),
            rank=rank,
            world_size=world_size,
            shuffle=self.shuffle,
            digest=content_digest(self.train_examples),
        )
        if self._taken_up is not None:
            self._stream.load_state_dict(self._taken_up)
            self._taken_up = None
        return self._stream

    def state_dict(self) -> dict[str, Any]:
        """Return where the training rows stand.

        Lightning keeps the state of the stream too, but takes it up only within an epoch: after the last step of one it
        would begin the first pass again.
        """
        return {} if self._stream is None else {"stream": self._stream.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there with the next stream."""
        self._taken_up = state_dict.get("stream")

    def val_dataloader(self) -> EvalBatches[Example, Batch] | list[Batch]:
        """Return the validation rows, each once; nothing where there are none."""
        if self.val_examples:
            return self._eval_batches(self.val_examples)
        # Lightning asks whether an empty list is meant: it is.
        warnings.filterwarnings("ignore", message=".*Total length of `list` across ranks is zero")
        return []

    def test_dataloader(self) -> EvalBatches[Example, Batch] | list[Batch]:
        """Return the validation rows."""
        return self.val_dataloader()

    def predict_dataloader(self) -> EvalBatches[Example, Batch]:
        """Return the validation rows, or all rows of the source where there are none, and say which."""
        examples = self.val_examples or self.train_examples
        taken_off = self.val_examples and not self.val_source and not self.val_split
        which = f"{'the validation' if self.val_examples else 'all'} rows {'taken off' if taken_off else 'of'}"
        if self._place()[0] == 0:
            source = self.val_source if self.val_examples and self.val_source else self.source
            log.info("predicting %s %s (%d); for others set val_source.", which, source, len(examples))
        return self._eval_batches(examples)

    def _read(self, *, with_train: bool) -> None:
        self.counts.clear()
        self._bad.clear()
        self._rows.clear()
        has_own_val = bool(self.val_source or self.val_split)
        train = [] if has_own_val and not with_train else self._parsed("train", self.source, self.split)
        if has_own_val:
            val_source = self.val_source or self.source
            val = self._parsed("val", val_source, self.val_split or self.split)
            seen = {prompt_key(entry.prompt) for entry in train}
            self.counts["val_prompts_in_training"] = sum(prompt_key(entry.prompt) in seen for entry in val)
        else:
            val_source = self.source
            train, val = split_by_prompt(train, self.val_size)
        if val or has_own_val:
            self.val_examples = self._encoded("val", val_source, val)
        if with_train or not self.val_examples:
            self.train_examples = self._encoded("train", self.source, train)
        self._judge_bad_rows()

    def _eval_batches(self, examples: Sequence[Example]) -> EvalBatches[Example, Batch]:
        rank, world_size = self._place()
        return EvalBatches(examples, self.val_batch_size, self.collate, rank=rank, world_size=world_size)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _tokenizer(self) -> Any:
        if self.tokenizer_name:
            return load_tokenizer(self.tokenizer_name)
        tokenizer = getattr(getattr(self.trainer, "lightning_module", None), "tokenizer", None)
        if tokenizer is None:
            raise UserError(
                "no tokenizer: the module that is trained has none; set tokenizer to a model folder or hub name."
            )
        return tokenizer

    def _parsed(self, part: str, source: str | list[str], split: str) -> list[Numbered[Item]]:
        return [entry for name in named_sources(source) for entry in self._parsed_one(part, name, split)]

    def _parsed_one(self, part: str, source: str, split: str) -> list[Numbered[Item]]:
        skip, limit = (self.skip, self.limit) if part == "train" else (0, None)
        rows = read_rows(source, split=split)[skip:][:limit]
        if not rows:
            raise UserError(f"skip is {skip}, but {source!r} has no more rows than that; give a smaller one.")
        self.counts[f"{part}_rows"] += len(rows)
        self._rows[source] += len(rows)
        items: list[Numbered[Item]] = []
        for number, row in enumerate(rows, start=skip + 1):
            with self._naming_row(part, source, number):
                found = [Numbered(source, number, item) for item in self.parse(row)]
                wanted = [entry for entry in found if not (self.chat and _is_blank(entry.prompt))]
                items += wanted
                self.counts[f"{part}_dropped_unwanted"] += not found
                self.counts[f"{part}_dropped_empty_prompt"] += len(found) - len(wanted)
        return items

    def _encoded(self, part: str, source: str | list[str], items: list[Numbered[Item]]) -> list[Example]:
        counts: Counter[str] = Counter()
        examples: list[Example] = []
        for entry, encoded in self._tokenised(items, counts):
            with self._naming_row(part, entry.source, entry.row):
                if isinstance(encoded, UserError):
                    raise encoded
                example = self.example(entry.item, encoded, counts)
                examples += [] if example is None else [example]
        self.counts.update({f"{part}_{name}": number for name, number in counts.items()})
        self.counts[f"{part}_kept"] = len(examples)
        own = {name.removeprefix(f"{part}_"): n for name, n in self.counts.items() if n and name.startswith(f"{part}_")}
        told = ", ".join(f"{name} {n}" for name, n in own.items())
        if not examples:
            self._judge_bad_rows()
            advice = "".join(f" {what}" for name, what in _AGAINST_DROPPING.items() if own.get(name))
            raise UserError(f"nothing is left of the {part} rows of {source!r}: {told}.{advice}")
        if self._place()[0] == 0:
            log.info("%s data from %s: %s", part, source, told)
        return examples

    def _judge_bad_rows(self) -> None:
        """Name the first rows that were dropped as bad, and refuse a source where they are too many."""
        for source, bad in self._bad.items():
            named = [_located(source, *entry) for entry in islice(bad.items(), _NAMED_ROWS)]
            if len(bad) > self.max_bad_share * self._rows[source]:
                raise UserError(
                    f"{len(bad)} of {self._rows[source]} rows of {source!r} cannot be read, more than the share of "
                    f"{self.max_bad_share:g} that max_bad_share allows. The first: {named[0]}"
                )
            if self._place()[0] == 0:
                more = f" (and {len(bad) - len(named)} more)" if len(bad) > len(named) else ""
                log.warning("%d rows were dropped as bad: %s%s", len(bad), " | ".join(named), more)

    def _tokenised(
        self, items: list[Numbered[Item]], counts: Counter[str]
    ) -> Iterator[tuple[Numbered[Item], EncodedConversation | UserError]]:
        """Yield the items that are kept with their ids; many are tokenised at a time, and not all are held as text."""
        cache = TokenCache(self.token_cache, self.encoder.tokenizer) if self.token_cache else None
        for start in range(0, len(items), _ITEMS_AT_A_TIME):
            some = [(entry, self.conversation(entry.item, counts)) for entry in items[start : start + _ITEMS_AT_A_TIME]]
            kept = [(entry, conversation) for entry, conversation in some if conversation is not None]
            encoded = self.encoder.encode_many([conversation for _, conversation in kept], cache)
            yield from zip((entry for entry, _ in kept), encoded, strict=True)
        if cache and self._place()[0] == 0:
            log.info("token_cache: %d of %d texts were in %s", cache.found, cache.asked, cache.folder)

    @contextlib.contextmanager
    def _naming_row(self, part: str, source: str, number: int) -> Iterator[None]:
        """Say which row an error is about, or count it and go on where bad rows are to be dropped."""
        try:
            yield
        except UserError as error:
            if self.bad_rows == "error":
                raise UserError(_located(source, number, str(error))) from error
            self.counts[f"{part}_dropped_bad"] += 1
            self._bad.setdefault(source, {}).setdefault(number, str(error))


def _located(source: str, number: int, what: str) -> str:
    return f"{source!r} row {number}{line_of_row(source, number)}: {what}"


def _is_blank(prompt: Prompt) -> bool:
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    return not any(text.strip() for text in texts)

"""Token ids on disk: the same examples and counts, and never the ids of anything else."""

import copy
import json
import re
import shutil
from array import array
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from rlhf_lightning.data.base import RowsDataModule
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.text import DemonstrationDataModule
from rlhf_lightning.data.token_cache import TokenCache, tokenizer_digest
from rlhf_lightning.data.unpaired import UnpairedDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import BUILTIN_MODELS, load_tokenizer

PAIRS = [{"prompt": f"Hi {n}", "chosen": f"yes {n}" * (n % 7), "rejected": "no. Yes"} for n in range(20)]
Data = RowsDataModule[Any, Any, Any]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_lightning.data.base._ITEMS_AT_A_TIME", 6)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that any tokenizer was asked for."""
    texts: list[str] = []
    ask = PreTrainedTokenizerBase.__call__

    def recorded(tokenizer: Any, text: Any, *arguments: Any, **named: Any) -> Any:
        texts.extend([text] if isinstance(text, str) else text)
        return ask(tokenizer, text, *arguments, **named)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", recorded)
    return texts


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Data]:
    """``read(cache, rows, kind, change, ...)``: a data module of these rows, set up; ``change`` edits the tokenizer."""

    def make(
        cache: Path | None,
        rows: list[dict[str, Any]] = PAIRS,
        kind: type[Data] = PreferenceDataModule,
        change: Callable[[PreTrainedTokenizerBase], object] = lambda tokenizer: None,
        **settings: Any,
    ) -> Data:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = copy.deepcopy(load_tokenizer("builtin:demo"))
        change(tokenizer)
        data = kind(str(tmp_path / "rows.jsonl"), token_cache=None if cache is None else str(cache), **settings)
        data._tokenizer = lambda: tokenizer  # type: ignore[method-assign]
        data.setup("fit")
        return data

    return make


def content(data: Data) -> tuple[Any, ...]:
    return data.train_examples, data.val_examples, data.counts


@pytest.mark.parametrize("kind", [PreferenceDataModule, DemonstrationDataModule, UnpairedDataModule, PromptDataModule])
def test_a_second_run_finds_all_and_is_the_same(
    read: Callable[..., Data], asked: list[str], tmp_path: Path, kind: type[Data], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rlhf_lightning")
    settings = {"kind": kind, "val_size": 5}
    without = read(None, **settings)
    assert not [record for record in caplog.records if "token_cache" in record.getMessage()]
    first = read(tmp_path / "cache", **settings)
    assert asked
    asked.clear()
    again = read(tmp_path / "cache", **settings)
    assert asked == []
    assert content(without) == content(first) == content(again)
    assert all(isinstance(ids, array) for example in again.train_examples for ids in example.sequences[0])
    told = [record.getMessage() for record in caplog.records if "token_cache" in record.getMessage()]
    found = [re.match(r"token_cache: (\d+) of (\d+) texts were in ", line) for line in told]
    assert len(found) == 4, "validation and training rows, twice"
    shares = [match and int(match[1]) / int(match[2]) for match in found]
    assert (shares[0], shares[2:]) == (0, [1, 1])
    assert {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {".safetensors"}


def add_a_word(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_tokens(["yes"])


def lower(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def change_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = f"<|im_start|>system\nBe kind.<|im_end|>\n{tokenizer.chat_template}"


def spell_out(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.split_special_tokens = True


ASKED: dict[str, dict[str, Any]] = {
    "a row": {"rows": [*PAIRS[:-1], {**PAIRS[-1], "rejected": "No"}]},
    "the tokenizer's words": {"change": add_a_word},
    "the tokenizer's normalizer": {"change": lower},
    "how the tokenizer takes special tokens": {"change": spell_out},
    "the chat template": {"change": change_template},
    "no chat": {"chat": False},
}
NOT_ASKED: dict[str, dict[str, Any]] = {
    "lengths": {"max_length": 25, "max_prompt_length": 16},
    "overlong": {"max_length": 25, "max_prompt_length": 16, "overlong": "truncate"},
    "the stop token": {"stop_token": "<|pad|>"},
}


@pytest.mark.parametrize("changed", [*ASKED, *NOT_ASKED])
def test_a_change_is_never_given_what_was_kept_before_it(
    read: Callable[..., Data], asked: list[str], tmp_path: Path, changed: str
) -> None:
    before = read(tmp_path / "cache")
    without = read(None, **(ASKED | NOT_ASKED)[changed])
    asked.clear()
    after = read(tmp_path / "cache", **(ASKED | NOT_ASKED)[changed])
    assert content(after) == content(without) != content(before)
    assert bool(asked) == (changed in ASKED), "lengths and stop tokens come after what is kept"


@pytest.mark.parametrize(("limit", "new"), [(18, 0), (20, 2), (19, 1)])
def test_rows_before_a_change_are_found(
    read: Callable[..., Data], asked: list[str], tmp_path: Path, limit: int, new: int
) -> None:
    read(tmp_path / "cache", limit=18)
    asked.clear()
    assert read(tmp_path / "cache", limit=limit).counts["train_kept"] == limit
    assert len([text for text in asked if "assistant" in text]) == 3 * new


def test_a_template_that_reads_the_clock_is_found_within_its_day_alone(
    read: Callable[..., Data], asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        day = 1

        @classmethod
        def now(cls, tz: Any = None) -> "Clock":
            return cls(2026, 11, cls.day)

    def dated(tokenizer: PreTrainedTokenizerBase) -> None:
        tokenizer.chat_template = "{{ strftime_now('%d.%m.') }}" + str(tokenizer.chat_template)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    first = read(tmp_path / "cache", change=dated)
    asked.clear()
    assert content(read(tmp_path / "cache", change=dated)) == content(first)
    assert asked == []
    Clock.day = 2
    assert content(read(tmp_path / "cache", change=dated)) == content(read(None, change=dated)) != content(first)


def test_rows_that_are_refused_are_refused_again(read: Callable[..., Data], asked: list[str], tmp_path: Path) -> None:
    def strict(tokenizer: PreTrainedTokenizerBase) -> None:
        words = "{% if 'no' in messages[-1].content %}{{ raise_exception('no such words') }}{% endif %}"
        tokenizer.chat_template = words + str(tokenizer.chat_template)

    rows = [{**row, "rejected": "no" if n in (3, 9) else "Yes"} for n, row in enumerate(PAIRS)]
    for _ in range(2):
        with pytest.raises(UserError, match=r"row 4: the chat template refuses a conversation of user, assistant"):
            read(tmp_path / "cache", rows, change=strict)
    first = read(tmp_path / "cache", rows, change=strict, bad_rows="drop")
    asked.clear()
    again = read(tmp_path / "cache", rows, change=strict, bad_rows="drop")
    assert (asked, again.counts["train_dropped_bad"]) == ([], 2)
    assert content(again) == content(first)


def test_a_damaged_file_is_named(read: Callable[..., Data], tmp_path: Path) -> None:
    read(tmp_path / "cache", PAIRS[:3], bad_rows="drop")
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    with pytest.raises(UserError, match=rf"token_cache: '.*{file.name}' is damaged .*; delete it"):
        read(tmp_path / "cache", PAIRS[:3], bad_rows="drop")
    read(tmp_path / "other", PAIRS[:2])
    (other,) = (tmp_path / "other").rglob("*.safetensors")
    file.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=rf"^token_cache: '.*{file.name}' is damaged .* not as long\); delete it"):
        read(tmp_path / "cache", PAIRS[:3], bad_rows="drop")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"token_cache '.*file' cannot be made a folder"):
        read(tmp_path / "file")


def test_texts_are_kept_as_they_are_even_none(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path, load_tokenizer("builtin:demo"))
    assert cache.ids([""], lambda texts: [array("i")]) == [array("i")]
    assert cache.ids([""], lambda texts: []) == [array("i")]
    assert cache.ids(["ab", "c"], lambda texts: [array("i", [1, 2]), array("i", [3])])[1][0] == 3
    assert cache.ids(["a", "bc"], lambda texts: [array("i", [4]), array("i")])[0][0] == 4, "not the same texts"
    assert (cache.found, cache.asked) == (1, 6)


def test_a_tokenizer_is_known_by_its_content_and_not_by_its_place(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("builtin:demo")
    shutil.copytree(BUILTIN_MODELS["builtin:demo"], tmp_path / "elsewhere")
    again, once_more = load_tokenizer(str(tmp_path / "elsewhere")), copy.deepcopy(tokenizer)
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer) == tokenizer_digest(once_more)
    slow = [ByT5Tokenizer(extra_ids=extra) for extra in (0, 5, 5)]
    assert tokenizer_digest(slow[0]) != tokenizer_digest(slow[1]) == tokenizer_digest(slow[2])

"""Whatever lies in a data file, it is read, or refused in one line: no traceback, no hang."""

import csv
import gzip
import io
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.base import RowsDataModule
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.readers import _READERS, read_rows
from rlhf_lightning.data.text import DemonstrationDataModule
from rlhf_lightning.data.unpaired import UnpairedDataModule
from rlhf_lightning.errors import UserError

ENDINGS = sorted(_READERS)
MODULES: list[type[RowsDataModule[Any, Any, Any]]] = [
    DemonstrationDataModule,
    PreferenceDataModule,
    PromptDataModule,
    UnpairedDataModule,
]
#: Columns that mean something here, so that a draw gets past the first check.
COLUMNS = ("prompt", "chosen", "rejected", "response", "completion", "messages", "text", "label", "conversations")
SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
#: Seconds that an input of a few letters may take.
LIMIT = 10.0
#: How many were read, by their ending: a draw that nothing accepts would test little.
ACCEPTED: Counter[str] = Counter()

characters = st.characters(codec=None, categories=None)
texts = st.text(characters, max_size=20) | st.sampled_from(["", " ", "\ud800", "\x00", "<|im_end|>", "Hi", "NaN"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars, lambda some: st.lists(some, max_size=3) | st.dictionaries(texts, some, max_size=3), max_leaves=6
)
messages = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "x"]), scalars | st.sampled_from(["user", "assistant"])
    )
    | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "gpt"]), "content": texts}),
    max_size=4,
)
chat = st.lists(texts, min_size=1, max_size=3).map(
    lambda said: [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
)
#: Rows of the known shapes, with any text in them, and sometimes one column more or of another kind.
shaped = st.one_of(
    st.fixed_dictionaries({"prompt": texts | chat, "chosen": texts | chat, "rejected": texts | chat}),
    st.fixed_dictionaries({"prompt": texts | chat, "completion": texts | chat, "label": st.booleans() | scalars}),
    st.fixed_dictionaries({"messages": chat | messages}),
    st.fixed_dictionaries({"text": texts}),
)
rows = (
    shaped
    | st.builds(lambda row, more: row | more, shaped, st.dictionaries(st.sampled_from(COLUMNS), values, max_size=1))
    | st.dictionaries(st.sampled_from(COLUMNS) | texts, values | messages | texts, max_size=5)
)


def accepted(source: Path, tokenizer: PreTrainedTokenizerBase | None = None, kind: Any = None, **options: Any) -> bool:
    """Read a file, or set a data module up on it; a refusal must be one line that names the file."""
    start = time.monotonic()
    try:
        if kind is None:
            assert read_rows(str(source))
        else:
            data = kind(str(source), **options)
            data._tokenizer = lambda: tokenizer
            data.setup("fit")
            assert len(data.train_examples) > 0
            data.collate(data.train_examples[:2])
    except UserError as error:
        message = " ".join(str(error).split())
    else:
        message = ""
        ACCEPTED[source.suffix] += 1
    assert time.monotonic() - start < LIMIT
    assert not message or source.name in message
    assert len(message.encode()) < 1000
    return not message


def check_bytes(folder: Path, content: bytes, ending: str) -> None:
    path = folder / f"any{ending}"
    path.write_bytes(gzip.compress(content, 1) if ending.endswith(".gz") and len(content) % 2 else content)
    accepted(path)


def check_parquet(folder: Path, changes: list[tuple[float, int]], kept: float) -> None:
    """Change some bytes of a good file, and cut off its end."""
    path = folder / "any.parquet"
    pq.write_table(
        pa.table({"prompt": ["Hi", "Bye"] * 9, "label": [0.5, None] * 9, "messages": [[{"a": 1}]] * 18}), path
    )
    content = bytearray(path.read_bytes())
    for place, byte in changes:
        content[int(place * len(content))] = byte
    path.write_bytes(content[: int(kept * len(content)) + 1])
    accepted(path)


def check_json(folder: Path, tokenizer: PreTrainedTokenizerBase, found: list[Any], options: dict[str, Any]) -> None:
    path = folder / "any.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    for kind in MODULES:
        accepted(path, tokenizer, kind, **options)


def check_csv(folder: Path, tokenizer: PreTrainedTokenizerBase, table: list[list[str]], raw: str) -> None:
    written = io.StringIO()
    csv.writer(written).writerows(table)
    for text in (written.getvalue(), raw):
        path = folder / "any.csv"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        if accepted(path):
            for kind in MODULES:
                accepted(path, tokenizer, kind)


any_options = st.fixed_dictionaries(
    {}, optional={"chat": st.booleans(), "bad_rows": st.sampled_from(["drop", "error"]), "limit": st.integers(1, 3)}
)
any_table = st.lists(st.lists(texts | st.sampled_from(COLUMNS), max_size=4), max_size=4)
any_csv = st.text(st.sampled_from(',"\n\r;\t pchosen\x00é'), max_size=40)


@settings(max_examples=100, deadline=None, suppress_health_check=SLOW)
@given(
    content=st.binary(max_size=200) | st.text(st.sampled_from('{}[]",:\\ud8 n1e.-\n'), max_size=40).map(str.encode),
    ending=st.sampled_from(ENDINGS),
)
def test_any_bytes(content: bytes, ending: str, tmp_path: Path) -> None:
    check_bytes(tmp_path, content, ending)


places = st.floats(0, 1, exclude_max=True)
any_changes = st.lists(st.tuples(places, st.integers(0, 255)), max_size=5)


@settings(max_examples=100, deadline=None, suppress_health_check=SLOW)
@given(changes=any_changes, kept=st.just(1.0) | places)
def test_any_damage_to_a_parquet_file(changes: list[tuple[float, int]], kept: float, tmp_path: Path) -> None:
    check_parquet(tmp_path, changes, kept)


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(found=st.lists(rows | values, max_size=4), options=any_options)
def test_any_json(
    found: list[Any], options: dict[str, Any], tmp_path: Path, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    check_json(tmp_path, demo_tokenizer, found, options)


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(table=any_table, raw=any_csv)
def test_any_csv(table: list[list[str]], raw: str, tmp_path: Path, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    check_csv(tmp_path, demo_tokenizer, table, raw)


@pytest.mark.slow
def test_many_of_each(tmp_path: Path, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    tried = dict.fromkeys(("bytes", "parquet", "json", "csv"), 0)

    @settings(max_examples=5000, deadline=None, suppress_health_check=SLOW)
    @given(content=st.binary(max_size=400), ending=st.sampled_from(ENDINGS))
    def many_bytes(content: bytes, ending: str) -> None:
        tried["bytes"] += 1
        check_bytes(tmp_path, content, ending)

    @settings(max_examples=3000, deadline=None, suppress_health_check=SLOW)
    @given(changes=any_changes, kept=st.just(1.0) | places)
    def many_parquet(changes: list[tuple[float, int]], kept: float) -> None:
        tried["parquet"] += 1
        check_parquet(tmp_path, changes, kept)

    @settings(max_examples=2000, deadline=None, suppress_health_check=SLOW)
    @given(found=st.lists(rows | values, max_size=4), options=any_options)
    def many_json(found: list[Any], options: dict[str, Any]) -> None:
        tried["json"] += 1
        check_json(tmp_path, demo_tokenizer, found, options)

    @settings(max_examples=2000, deadline=None, suppress_health_check=SLOW)
    @given(table=any_table, raw=any_csv)
    def many_csv(table: list[list[str]], raw: str) -> None:
        tried["csv"] += 1
        check_csv(tmp_path, demo_tokenizer, table, raw)

    many_bytes()
    many_parquet()
    many_json()
    many_csv()
    print(f"tried: {tried}, accepted: {dict(ACCEPTED)}")
    assert min(ACCEPTED[ending] for ending in (".jsonl", ".csv", ".parquet")) > 100
    assert min(tried.values()) >= 2000

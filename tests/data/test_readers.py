import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rlhf_lightning.data.readers import is_hub_name, read_rows
from rlhf_lightning.errors import UserError

ROWS = [{"prompt": "Grüß dich\u2028 😅", "chosen": 'a, "b"\nc'}, {"prompt": "x", "chosen": ""}]
LINES = "\n".join(json.dumps(row) for row in ROWS)
CSV = '\ufeffprompt,chosen\r\n"Grüß dich\u2028 😅","a, ""b""\nc"\r\nx,""\r\n'


def write(folder: Path, name: str, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", "\ufeff\n" + LINES.replace("\n", "\r\n\r\n") + "\n"),
        ("a.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.jsonl.gz", LINES),
        ("a.json", json.dumps(ROWS, indent=1, ensure_ascii=False)),
        ("a.json", LINES),
        ("a.json.gz", json.dumps(ROWS)),
        ("a.csv", CSV),
        ("a.csv.gz", CSV),
    ],
)
def test_every_text_format_gives_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    assert read_rows(write(tmp_path, name, content)) == ROWS


def test_parquet_keeps_nested_columns(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi"}], "label": True}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_rows(str(tmp_path / "a.parquet")) == rows


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "", ["a.jsonl", "no rows"]),
        ("a.jsonl", "\n \n", ["no rows"]),
        ("a.csv", "prompt,chosen\n", ["no rows"]),
        ("a.json", "[]", ["no rows"]),
        ("a.jsonl", '{"a": 1}\n\n{"a": }\n', ["a.jsonl' line 3", "not JSON", "column 7"]),
        ("a.jsonl", '{"a": 1}\n[1]\n', ["line 2", "a JSON array", "object"]),
        ("a.json", '[{"a": 1}, 3]', ["element 2", "a JSON number"]),
        ("a.json", '[{"a": 1},\n {"a" 2}]', ["not JSON", "line 2"]),
        ("a.jsonl", b'{"a": "ok"}\n{"a": "\xff"}\n', ["line 2", "UTF-8", "0xff"]),
        ("a.jsonl", '{"a": "ok"}\n{"a": "\\ud83d!"}', ["line 2", "half a character"]),
        ("a.jsonl", "[" * 100_000, ["line 1", "cannot be read"]),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", ["line 1", "cannot be read"]),
        ("a.csv", "a,b\n1,2\n1\n", ["line 3", "2 values"]),
        ("a.csv", "a,b\n1,2,3\n", ["line 2", "2 values"]),
        ("a.csv", "a,a\n1,2\n", ["same name"]),
        ("a.csv", 'a,b\n1,"2', ["not CSV"]),
        ("a.parquet", "PAR1 or not", ["not a parquet file"]),
        ("a.txt", "hello", ["a.txt", "no kind", ".jsonl"]),
    ],
)
def test_what_cannot_be_read_is_one_line_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, words: list[str]
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)
    assert [word for word in [path, *words] if word not in str(caught.value)] == []


@pytest.mark.parametrize("cut", [5, 30])
def test_broken_gzip_is_a_user_error(tmp_path: Path, cut: int) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:cut])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz' cannot be read"):
        read_rows(str(tmp_path / "a.jsonl.gz"))
    (tmp_path / "a.jsonl.gz").write_text("not gzip")
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(str(tmp_path / "a.jsonl.gz"))


def test_missing_file_names_the_nearest_and_a_folder_its_files(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl.gz", LINES)
    write(tmp_path, "notes.txt", "")
    with pytest.raises(UserError, match=r"does not exist. Did you mean 'train\.jsonl\.gz'"):
        read_rows(str(tmp_path / "trian.jsonl.gz"))
    with pytest.raises(UserError, match=r"is a folder; give one of its files: train\.jsonl\.gz\."):
        read_rows(str(tmp_path))
    with pytest.raises(UserError, match=r"folder .* does not exist either"):
        read_rows(str(tmp_path / "nowhere" / "train.jsonl"))


def test_builtin_names_are_checked() -> None:
    with pytest.raises(UserError, match="builtin:demo/<name>"):
        read_rows("builtin:pairs")
    with pytest.raises(UserError, match="no_such_rows"):
        read_rows("builtin:demo/no_such_rows")


def test_hub_names_are_told_from_paths_and_fail_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_hub_name("owner/name")
    assert is_hub_name("Salesforce/wikitext:wikitext-2-raw-v1")
    assert not any(
        is_hub_name(name) for name in ["", "./x", "/x/y", "a/b/c", "data/x.csv", "x.parquet", "builtin:demo/x"]
    )
    with pytest.raises(UserError, match=r"'nobody/nothing' \(split 'train'\) is no file here .* local file") as caught:
        read_rows("nobody/nothing")
    assert "\n" not in str(caught.value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    write(tmp_path / "owner", "name", "")
    assert not is_hub_name("owner/name"), "what is on disk is not looked for elsewhere"


def test_real_files_have_the_rows_that_are_documented(shared_data: Path) -> None:
    expected = {
        "human_like_dpo/train.jsonl.gz": 6262,
        "human_like_dpo/eval.jsonl": 400,
        "dolly/eval.jsonl": 501,
        "hh_rlhf_harmless/test_pairs.jsonl.gz": 2012,
        "preference_demos/dpo_en_demo.jsonl.gz": 300,
        "tinystories/train.jsonl.gz": 704,
        "wikitext2_raw/test.jsonl.gz": 4358,
    }
    assert {name: len(read_rows(str(shared_data / name))) for name in expected} == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def rows_or_error(path: str) -> list[dict[str, Any]] | UserError:
    try:
        return read_rows(path)
    except UserError as error:
        return error


@given(values=st.lists(json_values, max_size=4), name=st.sampled_from(["a.jsonl", "a.json", "a.json.gz"]))
@example(values=[{"a": float("nan")}], name="a.jsonl")
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_rows_or_a_user_error(tmp_path: Path, values: list[Any], name: str) -> None:
    content = "\n".join(map(json.dumps, values)) if name == "a.jsonl" else json.dumps(values)
    outcome = rows_or_error(write(tmp_path, name, content))
    if values and all(isinstance(value, dict) for value in values):
        assert repr(outcome) == repr(values)
    else:
        assert isinstance(outcome, UserError)
        assert "\n" not in str(outcome)


@given(content=st.binary(max_size=60), name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet"]))
@example(content=b"a,b\n\x00,1\n", name="a.csv")
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_rows_or_a_user_error(tmp_path: Path, content: bytes, name: str) -> None:
    outcome = rows_or_error(write(tmp_path, name, content))
    if isinstance(outcome, UserError):
        assert "\n" not in str(outcome)
    else:
        assert outcome
        assert all(isinstance(row, dict) for row in outcome)

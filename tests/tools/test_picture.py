from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_a_picture_is_as_wide_as_asked_and_as_long_as_the_page(
    load_tool: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = load_tool("picture")
    if tool.find_browser() is None:
        pytest.skip("no Chromium on this machine: no picture was taken")
    page, output = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text("<!doctype html><body style='margin:0'><div style='height:1234px'></div>")
    monkeypatch.setattr("sys.argv", ["picture.py", str(page), f"--output={output}", "--width=321", "--scale=2"])
    tool.main()
    header = output.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(header[start : start + 4]) for start in (16, 20)] == [642, 2468]


def test_a_browser_that_ends_is_an_error_and_no_wait(load_tool: Callable[[str], ModuleType], tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, BrokenPipeError)):
        load_tool("picture").Browser("/bin/false", tmp_path)

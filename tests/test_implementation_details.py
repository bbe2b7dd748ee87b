"""The lists of implementation details and of options name lines, arguments and tests that are there."""

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("implementation_details", ROOT / "tools/implementation_details.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = load_tool()
PLACES = list(TOOL.places())
ROWS = [row for row in TOOL.OPTIONS.read_text(encoding="utf-8").splitlines() if re.match(r"\| \d+ \|", row)]
OPTION_PLACES = list(TOOL.places(TOOL.OPTIONS))


def test_each_of_the_37_has_a_line_and_a_test() -> None:
    lines = {place.detail for place in PLACES if place.code and place.file.startswith("rlhf_lightning/")}
    tests = {place.detail for place in PLACES if place.file.startswith("tests/")}
    assert lines == set(range(1, 38))
    assert tests - {0} == set(range(1, 38))


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.detail}-{place.name}")
def test_it_is_there(place: "TOOL.Place") -> None:  # type: ignore[name-defined]
    assert place.line() >= 1


@pytest.mark.parametrize(
    ("file", "name", "code"),
    [
        ("rlhf_lightning/functional/nothing.py", "gae", None),
        ("rlhf_lightning/functional/advantages.py", "nothing", None),
        ("rlhf_lightning/functional/advantages.py", "gae", "a line that is not there"),
        # The line is there, but in another function of the file.
        ("rlhf_lightning/functional/advantages.py", "leave_one_out", "for t in reversed(range(rewards.shape[1])):"),
    ],
)
def test_what_is_not_there_is_noticed(file: str, name: str, code: str | None) -> None:
    with pytest.raises(LookupError):
        TOOL.Place(1, file, name, code).line()


def test_every_link_of_the_page_was_read() -> None:
    page = (ROOT / "docs/implementation_details.md").read_text(encoding="utf-8")
    assert page.count("](../") == len(PLACES)
    assert "docs/implementation_details.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_option_names_a_class_and_a_test() -> None:
    for number, row in enumerate(ROWS, start=1):
        assert row.startswith(f"| {number} |")
        own = [place.file for place in OPTION_PLACES if place.detail == number]
        assert [file.split("/")[0] for file in own] == ["rlhf_lightning", "tests"]
    assert "docs/options.md" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("place", OPTION_PLACES, ids=lambda place: f"{place.detail}-{place.name}")
def test_what_an_option_names_is_there(place: "TOOL.Place") -> None:  # type: ignore[name-defined]
    assert place.line() >= 1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split(" | ")[1])
def test_an_options_argument_is_one_of_its_class(row: str) -> None:
    """What stands behind the dot in ``part.argument`` is an argument of the class."""
    name, file = re.findall(r"\[(\w+)\]\(\.\./(rlhf_lightning[\w/]+)\.py\)", row)[0]
    module = importlib.import_module(file.replace("/", "."))
    arguments = inspect.signature(getattr(module, name)).parameters
    for key in re.findall(r"`\w+\.(\w+)(?:: [^`]*)?`", row.split(" | ")[2]):
        if key not in ("loss", "normalization"):
            assert key in arguments, key
        assert f"{key}:" in (inspect.getdoc(getattr(module, name)) or "") or key in ("loss", "normalization")

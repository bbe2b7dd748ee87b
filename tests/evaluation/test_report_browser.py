"""The report as a browser shows it: nothing overflows, nothing is loaded, all can be read, all works by keyboard."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlhf_lightning.evaluation.curves import plots_of
from rlhf_lightning.evaluation.report import render
from rlhf_lightning.evaluation.summary import Comparison

DESKTOP, PHONE = 1280, 360
EVIL = "</style></title><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&'\""
LONG = "a_name_without_any_place_to_break_it_" * 4
#: What reaches beyond the window, unless it lies in something that scrolls by itself.
OVERFLOWING = """[...document.querySelectorAll("body *")]
  .filter(e => e.getClientRects().length && !e.closest(".scroll table, svg"))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5 || e.getBoundingClientRect().left < -0.5)
  .map(e => e.outerHTML.slice(0, 80))"""
#: Texts, lines and dots that stand out too little: WCAG 2.2, 1.4.3 and 1.4.11.
PALE = """(() => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ground = e => {
    const [r, g, b, a = 1] = numbers(getComputedStyle(e).backgroundColor);
    return a === 1 || !e.parentElement ? [r, g, b] : ground(e.parentElement);
  };
  const ratio = (color, e) => {
    const [low, high] = [luminance(numbers(color)), luminance(ground(e))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const pale = [];
  const check = (e, color, needed) => {
    if (ratio(color, e) < needed) pale.push(`${ratio(color, e).toFixed(2)} ${color} ${e.outerHTML.slice(0, 80)}`);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let count = 0;
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement, style = getComputedStyle(e);
    if (!walker.currentNode.data.trim() || !e.getClientRects().length || e.closest("title")) continue;
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    check(e, e.closest("svg") ? style.fill : style.color, large ? 3 : 4.5);
    count += 1;
  }
  for (const e of document.querySelectorAll("svg .line, svg .mean")) check(e, getComputedStyle(e).stroke, 3);
  for (const e of document.querySelectorAll("svg circle.dot")) check(e, getComputedStyle(e).fill, 3);
  for (const e of document.querySelectorAll("span.dot")) check(e.parentElement, getComputedStyle(e).backgroundColor, 3);
  return {count, pale};
})()"""


@pytest.fixture(scope="module")
def browser(load_tool: Callable[[str], ModuleType]) -> Iterator[Any]:
    """A headless Chromium, started once."""
    tool = load_tool("picture")
    if tool.find_browser() is None:
        pytest.skip("no Chromium on this machine: the report was not looked at in a browser")
    with tool.browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, make_comparison: Callable[..., Comparison]) -> dict[str, Path]:
    """Reports by name: of two models, of ten, and of one that says what could run."""
    rows = [{"step": step, "train/loss": 1 / (1 + step), f"val/{LONG}": 1.0} for step in range(20)]
    ten = ("base", LONG, *(f"model{number}" for number in range(8)))
    made = {
        "two": (make_comparison(text=f"some words, {LONG}", more=True), {LONG: plots_of(rows)}),
        "ten": (make_comparison(ten, more=True), {}),
        "evil": (make_comparison(("base", EVIL), EVIL, more=True), {EVIL: plots_of(rows)}),
    }
    folder = tmp_path_factory.mktemp("pages")
    for name, (comparison, curves) in made.items():
        (folder / f"{name}.html").write_text(render(comparison, curves), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("name", ["two", "ten", "evil"])
def test_a_reader_sees_all_of_it(browser: Any, pages: dict[str, Path], name: str, width: int, dark: bool) -> None:
    browser.open(pages[name], width=width, dark=dark)
    browser.evaluate("document.querySelectorAll('.marks').forEach(box => box.click())")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(OVERFLOWING) == []
    seen = browser.evaluate(PALE)
    assert seen["pale"] == []
    assert seen["count"] > 200
    loaded = [event["params"]["request"]["url"] for event in told(browser, "Network.requestWillBeSent")]
    assert loaded == [pages[name].as_uri()]
    assert told(browser, "Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown") == []
    assert browser.evaluate("document.title") != "owned"
    light = browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(246, 247, 249)"
    assert light != dark


def told(browser: Any, *methods: str) -> list[dict[str, Any]]:
    return [event for event in browser.events if event.get("method") in methods]


def test_marks_are_shown_and_hidden_by_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    browser.open(pages["two"], width=DESKTOP)
    shown = "[...document.querySelectorAll('#part-5 ~ .sample del')].filter(e => e.getClientRects().length).length"
    assert browser.evaluate(shown) == 0
    passed = []
    while "marks-questions" not in passed:
        press(browser, "Tab", 9)
        passed.append(browser.evaluate("document.activeElement.id || document.activeElement.tagName"))
        assert len(passed) < 40
        assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert passed[:7] == ["A"] * 7  # the table of contents
    assert {"DIV", "SUMMARY"} <= set(passed)  # tables that scroll, curves that fold
    press(browser, " ", 32)
    assert browser.evaluate(shown) == 2
    press(browser, " ", 32)
    assert browser.evaluate(shown) == 0


def press(browser: Any, key: str, code: int) -> None:
    for kind in ("keyDown", "keyUp"):
        text = {"text": key} if key == " " and kind == "keyDown" else {}
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)


def test_a_table_of_many_models_becomes_cards_on_a_phone(browser: Any, pages: dict[str, Path]) -> None:
    places = (
        "[...document.querySelectorAll('tbody tr:first-child td')].slice(0, 10).map(e => e.getBoundingClientRect().{})"
    )
    for width, medium, cards in ((DESKTOP, "screen", False), (PHONE, "screen", True), (718, "print", False)):
        browser.open(pages["ten"], width=width, medium=medium)
        assert (len(set(browser.evaluate(places.format("left")))) == 1) == cards
        assert (len(set(browser.evaluate(places.format("top")))) == 1) != cards
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_a_link_of_the_contents_leads_to_its_part(browser: Any, pages: dict[str, Path]) -> None:
    browser.open(pages["ten"], width=PHONE)
    browser.evaluate("document.querySelector('nav li:last-child a').click()")
    top = browser.evaluate("document.querySelector(location.hash).getBoundingClientRect().top")
    assert browser.evaluate("scrollY") > 1000
    assert 0 <= top < 800

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from rlhf_lightning.evaluation.curves import plots_of
from rlhf_lightning.evaluation.questions import Question
from rlhf_lightning.evaluation.report import render
from rlhf_lightning.evaluation.report_words import draw_samples
from rlhf_lightning.evaluation.summary import Comparison

Make = Callable[..., Comparison]

EVIL = "</style></title><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&'\""


class Tags(HTMLParser):
    """Collects tags, the attributes that could load or run something, and identifiers, and checks that tags nest."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.dangerous: list[tuple[str, str | None]] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("href", "for") and re.fullmatch(r"#?[a-z]+-[a-z0-9]+", value or ""):
                self.targets.append((value or "").removeprefix("#"))
            elif name.startswith("on") or name in ("src", "href", "srcdoc", "for"):
                self.dangerous.append((name, value))
            elif name == "id":
                self.ids.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert len(set(tags.ids)) == len(tags.ids)
    assert set(tags.targets) <= set(tags.ids)
    return tags


def test_the_page_is_one_file_without_script(make_comparison: Make) -> None:
    rows = [{"step": 0, "train/loss": 1.0}, {"step": 1, "train/loss": 0.5}]
    page = render(make_comparison(more=True), {"ppo": plots_of(rows)})
    tags = parsed(page)
    assert not {"script", "img", "link", "iframe"} & set(tags.tags)
    assert tags.dangerous == []
    assert "@import" not in page
    assert "url(" not in page
    # Histograms of the scores and of the section, twice each, a strip for each row with two intervals, one curve.
    assert tags.tags.count("svg") == 2 + 2 + (5 + 1) + 1


@pytest.mark.parametrize("names", [("base", EVIL), ("base", EVIL, "c", "d", "e")])
def test_whatever_models_and_data_say_is_escaped(make_comparison: Make, names: tuple[str, ...]) -> None:
    comparison = make_comparison(names, EVIL, more=True)
    page = render(comparison, {EVIL: plots_of([{"step": 0, f"val/{EVIL}": 1.0}])})
    tags = parsed(page)
    assert not {"script", "img"} & set(tags.tags)
    assert tags.tags.count("style") == tags.tags.count("body") == 1
    assert tags.dangerous == []
    assert "&lt;script&gt;" in page


def test_numbers_of_the_page(make_comparison: Make) -> None:
    page = render(make_comparison(), {})
    assert "<h1>ppo against base</h1>" in page
    assert "20 of 40 prompts from data/plain" in page
    assert '<span class="from">0.95 → </span>1.95' in page  # mean of 0, 0.1, ... 1.9, and that plus 1
    assert "<b>+1.00</b><small>+1.00 to +1.00</small>" in page
    assert page.count("… cut off") == sum(number % 2 for number in draw_samples(20, 12, 0)) * 2


def test_a_section_has_its_place_after_what_was_measured(make_comparison: Make) -> None:
    page = render(make_comparison(more=True), {})
    heads = re.findall(r"<h2[^>]*>([^<]*)</h2>", page)
    assert heads == ["Measured", "Scores", "Pairs plain", "Questions", "Answers side by side", "How it was measured"]
    section = page[page.index("Pairs plain</h2>") : page.index("Questions</h2>")]
    assert '<p class="note">Note plain</p>' in section
    assert "<b>10.0 %</b><small>5.0 to 15.0</small>" in section
    assert "<figcaption>plain</figcaption>" in section


def test_the_contents_list_every_part_of_a_long_page(make_comparison: Make) -> None:
    assert "<nav" not in render(make_comparison(), {})
    page = render(make_comparison(more=True), {})
    listed = re.findall(r'<li><a href="#(part-\d)">([^<]*)</a></li>', page)
    assert listed == re.findall(r'<h2 id="(part-\d)">([^<]*)</h2>', page)
    assert len(listed) == 6


def test_what_differs_from_the_base_is_marked_and_can_be_hidden(make_comparison: Make) -> None:
    page = render(make_comparison(more=True), {})
    question = page[page.index("Questions</h2>") : page.index("Answers side by side</h2>")]
    assert question.count('<div class="text" dir="auto">plain base</div>') == 2
    assert question.count("plain <del>base</del><ins>ppo</ins>") == 2
    assert re.findall(r'<h4 class="way">(\w+)</h4>', question) == ["Greedy", "Sampled"]
    # The style sheet hides marks behind a box that is not ticked: so both stand beside each other, in this order.
    assert re.search(
        r'<input type="checkbox" class="marks"[^>]*><label[^>]*>.*?</label><article class="card sample"', page
    )


def test_an_answer_with_other_words_throughout_is_not_marked(make_comparison: Make) -> None:
    said = {"base": "As a language model I have no hobbies.", "ppo": "Hiking, mostly! Why?"}
    page = render(replace(make_comparison(), questions=[Question("q", said, {})]), {})
    question = page[page.index("Questions</h2>") : page.index("Answers side by side</h2>")]
    assert ">Hiking, mostly! Why?</div>" in question
    assert question.count("other words throughout") == 1
    assert "Sampled" not in question


def test_samples_are_drawn_by_the_seed(make_comparison: Make) -> None:
    assert draw_samples(100, 5, seed=1) == draw_samples(100, 5, seed=1) != draw_samples(100, 5, seed=2)
    page = render(make_comparison(), {}, shown=3)
    assert page.count("<article") == 3
    shown = {int(number) for number in re.findall(r'dir="auto">plain (\d+)', page)}
    assert shown == set(draw_samples(20, 3, 0))


def test_the_base_is_grey_wherever_it_stands(make_comparison: Make) -> None:
    page = render(make_comparison(("dpo", "base", "ppo")), {})
    heads = re.findall(r'<th scope="col" class="s(\d)"><b class="model"><span class="dot"></span><span>(\w+)<', page)
    assert heads == [("1", "dpo"), ("0", "base"), ("2", "ppo")]
    assert "<h1>dpo and ppo against base</h1>" in page


def test_one_model_alone_is_a_page_too(make_comparison: Make) -> None:
    page = render(make_comparison(("base",), more=True), {})
    assert "<h1>base alone</h1>" in page
    assert "<input" not in page
    assert parsed(page).dangerous == []


def test_ten_models_make_a_page_of_sane_size(make_comparison: Make) -> None:
    names = ("base", *(f"model{number}" for number in range(9)))
    rows = [{"step": step, **{f"val/v{key}": float(step) for key in range(12)}} for step in range(200)]
    page = render(make_comparison(names, more=True), {name: plots_of(rows) for name in names})
    assert page.count('class="tiles"') == 0
    assert page.count("above base") == 9
    assert len(page) < 1_500_000

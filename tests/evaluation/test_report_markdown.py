import re
from collections.abc import Callable

from markdown_it import MarkdownIt

from rlhf_lightning.evaluation.report_markdown import render_markdown
from rlhf_lightning.evaluation.report_words import draw_samples
from rlhf_lightning.evaluation.summary import Comparison

Make = Callable[..., Comparison]

EVIL = "# a\n\n- b\n\n```\n| c | d\n|---|---\n</td><script>alert(1)</script> ![i](http://x/y) [l](javascript:z) `e`"


def tags(page: str) -> set[str]:
    return set(re.findall(r"<(\w+)", MarkdownIt("commonmark", {"html": True}).enable("table").render(page)))


def test_it_tells_what_the_html_tells(make_comparison: Make) -> None:
    page = render_markdown(make_comparison(more=True))
    assert page.startswith("# ppo against base\n\n20 of 40 prompts from data/plain, answered once")
    heads = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert heads == ["Measured", "Pairs plain", "Questions", "Answers side by side", "How it was measured"]
    assert "| **Difference in score** to base, paired | – | +1.00 [+1.00, +1.00] |" in page
    assert "Note plain\n\n|  | base | ppo |" in page
    assert "| **plain** plain | 0.0 % [−5.0, 5.0] | 10.0 % [5.0, 15.0] |" in page
    assert "1 figure in `report.html`." in page
    assert "| model | greedy | sampled |\n|---|---|---|\n| base | plain base | plain base |" in page
    number = draw_samples(20, 12, 0)[0]
    ending = " … (cut off)" if number % 2 else ""
    assert f"| ppo | {1 + number / 10:.2f} | 7 | plain {number}{ending} |" in page


def test_whatever_models_and_data_say_is_shown_as_text(make_comparison: Make) -> None:
    page = render_markdown(make_comparison(("base", EVIL), EVIL, more=True))
    plain = render_markdown(make_comparison(more=True))
    assert tags(page) == tags(plain) | {"br"}
    assert page.count("\n## ") == plain.count("\n## ")
    assert len(page.splitlines()) == len(plain.splitlines())


def test_an_empty_answer_and_a_conversation(make_comparison: Make) -> None:
    comparison = make_comparison(more=True)
    comparison.questions[0].greedy["ppo"] = ""
    page = render_markdown(comparison, shown=20)
    assert "| ppo | (empty) | plain ppo |" in page
    assert "> **system:** plain<br>**plain:** plain" in page
    assert page.count("| model | score | tokens | answer |") == 20

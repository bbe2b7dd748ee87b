from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from rlhf_lightning.markdown import escape_cell, escape_line, markdown_table

#: CommonMark with the tables and strike-through of GitHub, and HTML that is let through.
READER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
MARKUP = [
    *(
        "`",
        "```\n",
        "# ",
        "> ",
        "- ",
        "1. ",
        "1) ",
        "=",
        "---",
        "\n",
        "\n\n",
        "|",
        "\\",
        "*",
        "_",
        "~~",
        "[a](b)",
        "![a](b)",
    ),
    *(
        "<b>",
        "<!--",
        "<script>",
        "&amp;",
        "    ",
        "\t",
        "[a]: b",
        "+ ",
        "a",
        "$x$",
        "http://a.b",
        "www.a.b",
        "@me",
        "\r",
    ),
]
TEXTS = st.lists(st.sampled_from(MARKUP), max_size=8).map("".join) | st.text(
    st.characters(exclude_categories=["Cc", "Cs"]), max_size=20
)


class Text(HTMLParser):
    """Collects the tags of a page and the words between them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.text += " " if tag == "br" else ""

    def handle_data(self, data: str) -> None:
        self.text += data


def read(markdown: str) -> Text:
    page = Text()
    page.feed(READER.render(markdown))
    return page


@settings(max_examples=300, deadline=None)
@given(TEXTS)
@example("a | b\n---|---\n1 | 2")
@example("    code")
def test_a_line_is_read_as_the_words_it_was_written_from(text: str) -> None:
    for prefix, tags in (("", ["p"]), ("# ", ["h1"]), ("- ", ["ul", "li"]), ("> ", ["blockquote", "p"])):
        line = escape_line(text)
        if line:
            page = read(prefix + line)
            assert page.tags == tags
            assert page.text.split() == text.split()


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS)
def test_a_cell_is_read_as_the_words_it_was_written_from(first: str, second: str) -> None:
    page = read(markdown_table(["a", "b"], [[escape_cell(first), escape_cell(second)]]))
    assert set(page.tags) <= {"table", "thead", "tbody", "tr", "th", "td", "br"}
    assert page.tags.count("td") == 2
    assert page.text.split() == ["a", "b", *first.split(), *second.split()]


@pytest.mark.parametrize("text", ["http://a.b", "www.a.b", "WWW.a.b", "me@a.b", "@me", "$x$"])
def test_nothing_is_left_of_which_github_makes_links_mentions_or_formulas(text: str) -> None:
    assert not any(mark in escape_cell(text) for mark in ("://", "www.", "WWW.", "@", "$"))

"""What a table of GitHub-flavoured Markdown is made of, whatever stands in its cells."""

import html
import re
from collections.abc import Sequence

# What Markdown, or GitHub on top of it, would read as markup, a link, a mention or a formula at any place of a line.
_MARKUP = re.compile(r"[\\`*_~|\[\]@$#]|:(?=//)|(?<=www)\.", re.IGNORECASE)
_LINE_BREAK = re.compile(r"\r\n|[\n\r\v\f\x85\u2028\u2029]")


def escape_cell(text: str) -> str:
    r"""Write a text so that a cell of a Markdown table shows it as it is.

    Markup of Markdown and HTML becomes character references, a line break becomes ``<br>``. What came out stands in
    one line, so that no heading, list or fence can begin in it.

    Example:
        >>> escape_cell("a|b <b>\n**c**")
        'a&#124;b &lt;b&gt;<br>&#42;&#42;c&#42;&#42;'
    """
    escaped = html.escape(text, quote=False)
    escaped = _MARKUP.sub(lambda match: f"&#{ord(match.group())};", escaped)
    return _LINE_BREAK.sub("<br>", escaped)


def escape_line(text: str, *, breaks: bool = False) -> str:
    r"""Write a text so that a heading or a paragraph shows it as it is, in one line.

    Args:
        text: Whatever is to be shown.
        breaks: Line breaks become ``<br>`` in place of spaces.

    Example:
        >>> escape_line("# a\n- b"), escape_line("1. a\nb", breaks=True)
        ('&#35; a - b', '&#49;. a<br>b')
    """
    escaped = escape_cell(text.strip())
    escaped = escaped if breaks else escaped.replace("<br>", " ")
    # At the beginning of a line: a list, a rule, the underline of a heading.
    return re.sub(r"^([+=-]|\d+(?=[.)]))", _first_as_reference, escaped)


def _first_as_reference(match: re.Match[str]) -> str:
    start = match.group()
    return f"&#{ord(start[0])};{start[1:]}"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, align: str = "") -> str:
    """Write a table whose texts have been escaped.

    Args:
        heads: Of the columns.
        rows: A cell for each column.
        align: For each column ``l``, ``r`` or a space for the default; may be shorter than the table is wide.

    Example:
        >>> print(markdown_table(["name", "score"], [["ppo", "1.5"]], align=" r"))
        | name | score |
        |---|---:|
        | ppo | 1.5 |
    """
    marks = {"l": ":---", "r": "---:", " ": "---"}
    rule = "|".join(marks[letter] for letter in align.ljust(len(heads)))
    lines = [" | ".join(row) for row in [heads, *rows]]
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])

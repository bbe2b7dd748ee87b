"""Print the implementation details, and the options, with the lines and tests that they have now.

    python tools/implementation_details.py

Reads ``docs/implementation_details.md`` and ``docs/options.md``. A place is written there as
``[function](file): `line of code```, a test as
``[test](file)``; what is not found is printed as an error, with exit status 1.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "implementation_details.md"
OPTIONS = ROOT / "docs" / "options.md"
LINK = re.compile(r"\[([\w.\\]+)\]\(\.\./([\w/]+\.py)\)(?:: `(.+?)`(?= \|))?")


class Place(NamedTuple):
    """Something that the page names: its detail (0 outside of the tables), file, function and, for code, the line."""

    detail: int
    file: str
    name: str
    code: str | None

    def line(self) -> int:
        """Return the number of the line where it stands now.

        Raises:
            LookupError: If file, function or line is not there.
        """
        path = ROOT / self.file
        if not path.exists():
            raise LookupError(f"there is no {self.file}")
        text = path.read_text(encoding="utf-8")
        if self.name == path.name:
            return 1
        found = _definition(ast.parse(text), self.name.split("."))
        if found is None:
            raise LookupError(f"{self.file} has no {self.name}")
        if self.code is None:
            return found.lineno
        lines = text.splitlines()
        for number in range(found.lineno, (found.end_lineno or found.lineno) + 1):
            if self.code in lines[number - 1]:
                return number
        raise LookupError(f"{self.name} in {self.file} has no line with {self.code!r}")


def places(page: Path = PAGE) -> Iterator[Place]:
    """Yield every place and every test that a page names, in its order."""
    for row in page.read_text(encoding="utf-8").splitlines():
        number = re.match(r"\| (\d+) \|", row)
        for name, file, code in LINK.findall(row):
            written = code.replace(r"\|", "|") or None
            yield Place(int(number[1]) if number else 0, file, name.replace("\\", ""), written)


def _definition(node: ast.AST, name: list[str]) -> ast.FunctionDef | ast.ClassDef | None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and child.name == name[0]:
            return child if len(name) == 1 else _definition(child, name[1:])
    return None


def main() -> int:
    missing = 0
    for place in (*places(PAGE), *places(OPTIONS)):
        try:
            where = f"{place.file}:{place.line()}"
        except LookupError as error:
            where, missing = f"error: {error}", missing + 1
        print(f"{place.detail or '':>2}  {where}  {place.code or place.name}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())

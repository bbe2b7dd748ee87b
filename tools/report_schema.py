"""Write docs/report_schema.md from the JSON Schema that comes with the package.

    python tools/report_schema.py            # prints the page
    python tools/report_schema.py --write    # writes it

The schema is what is maintained; a test asserts that the page agrees with it.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "rlhf_lightning/evaluation/report.schema.json"
PAGE = ROOT / "docs/report_schema.md"
HEAD = """# report.json

`rlhf-lightning compare` writes `report.json` beside `report.html`. This page lists its keys; it is made by
`tools/report_schema.py` from the JSON Schema
[report.schema.json](../rlhf_lightning/evaluation/report.schema.json), against which a test validates real reports. To
validate your own: `jsonschema.validate(json.load(open("report.json")), json.load(open("report.schema.json")))`.

`format` is `{format}`. The number rises when a key goes or changes its type or meaning; new keys come without.
Every key listed is there, unless it says otherwise. A link names an object that is described further down; `<name>`
stands for names that the user gave. Intervals cover the draw of prompts and answers, not that of training runs.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/report_schema.md")
    page = render(json.loads(SCHEMA.read_text(encoding="utf-8")))
    if parser.parse_args().write:
        PAGE.write_text(page, encoding="utf-8")
    else:
        print(page, end="")


def render(schema: Mapping[str, Any]) -> str:
    """Return the page."""
    parts = [HEAD.format(format=schema["properties"]["format"]["const"]), _table(schema)]
    for name, definition in schema["$defs"].items():
        parts.append(f"## {name}\n\n{_words(definition)}\n")
        if "anyOf" not in definition:
            parts.append(_table(definition))
    return "\n".join(parts)


def _table(definition: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| `{path}` | {kind} | {words} |" for path, kind, words in _keys(definition))
    return f"| key | value | meaning |\n| --- | --- | --- |\n{rows}\n"


def _keys(definition: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield path, type and meaning of every key below a definition, those of inner objects after their own."""
    inner = dict(definition.get("properties", {}))
    if isinstance(definition.get("additionalProperties"), dict):
        inner["<name>"] = definition["additionalProperties"]
    for key, value in inner.items():
        place = f"{path}.{key}" if path else key
        missing = key != "<name>" and key not in definition.get("required", ()) and bool(definition.get("required"))
        yield place, _kind(value), _words(value) + (" May be absent." if missing else "")
        items = value.get("items")
        yield from _keys(items if isinstance(items, dict) else value, f"{place}[]" if items else place)


def _kind(value: Mapping[str, Any]) -> str:
    """Return what a value may be, as the page writes it."""
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return f"[{name}](#{name})"
    for choice in ("anyOf", "allOf"):
        if choice in value:
            kinds = [_kind(one) for one in value[choice]]
            return " or ".join(kinds) if choice == "anyOf" else ", ".join(kind for kind in kinds if kind)
    if "const" in value or "enum" in value:
        return ", ".join(f"`{one}`" for one in value.get("enum", [value.get("const")]))
    if value.get("maxProperties") == 0:
        return "empty object"
    if "items" in value:
        return f"list of {_kind(value['items'])}"
    if "type" not in value:
        data = value.get("properties", {}).get("data", {})
        return f"`data`: {_kind(data)}" if data else ""
    kinds = value["type"] if isinstance(value["type"], list) else [value["type"]]
    return " or ".join(kinds)


def _words(value: Mapping[str, Any]) -> str:
    return str(value.get("description", "")).replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    main()

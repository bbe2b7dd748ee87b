"""What ``tools/record_references.py`` recorded from TRL."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Case = dict[str, Any]


@pytest.fixture(scope="session")
def reference() -> Callable[[str, str], Case]:
    """``reference(area, case)`` reads a case; its lists of numbers are tensors."""

    def read(area: str, case: str) -> Case:
        text = (Path(__file__).parent / f"{area}.json").read_text(encoding="utf-8")
        found: Case = _with_tensors(json.loads(text)["cases"][case])
        return found

    return read


def _with_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tensors(entry) for key, entry in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [_with_tensors(entry) for entry in value]
    if isinstance(value, list) and value and not isinstance(value[0], str):
        return torch.tensor(value)
    return value

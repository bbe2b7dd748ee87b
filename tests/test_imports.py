"""Imports point one way, and importing the package itself is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlhf_lightning"
#: What each folder may import of the package beside itself; what is open to all imports nothing of it.
ALLOWED = {
    "functional": set(),
    "models": {"functional"},
    "data": {"functional", "models", "demo"},
    "demo": {"models"},
    "rollout": {"functional", "models", "data"},
    "algorithm": {"functional", "models", "rollout"},
    "modules": {"functional", "models", "data", "rollout", "algorithm", "metrics"},
    "evaluation": {"functional", "models", "data", "rollout", "loggers", "metrics"},
    "model_card": {"data", "evaluation", "loggers", "models"},
    "callbacks": {"loggers", "evaluation", "model_card"},
    "planning": {"data", "models", "modules", "rollout", "algorithm", "cli"},
}
OPEN_TO_ALL = {"checkpoint_files", "earlier", "errors", "markdown", "seeding", "distributed"}


def imported_parts(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf_lightning."):
            names.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("rlhf_lightning.")}
    return names


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_a_folder_imports_only_what_lies_below_it(folder: str) -> None:
    allowed = ALLOWED[folder] | OPEN_TO_ALL | {folder}
    wrong = {
        f"{path.relative_to(PACKAGE)} imports {part}"
        for path in (PACKAGE / folder).rglob("*.py")
        for part in imported_parts(path) - allowed
    }
    assert not wrong


def test_every_folder_is_in_the_table() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(ALLOWED)


def test_importing_the_package_does_not_import_torch() -> None:
    script = "import sys, rlhf_lightning; assert 'torch' not in sys.modules; print(rlhf_lightning.__version__)"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_every_exported_name_can_be_imported() -> None:
    import rlhf_lightning

    assert all(getattr(rlhf_lightning, name).__name__ == name for name in rlhf_lightning.__all__)

"""docs/notebook.ipynb: every cell runs, one after the other, and no output is kept in the file."""

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_the_notebook_has_no_outputs_and_cells_that_compile() -> None:
    assert len(CODE) > 4
    for cell in CODE:
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        compile("".join(cell["source"]), cell["id"], "exec")
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    assert max(len(line.rstrip("\n")) for cell in CELLS for line in cell["source"]) <= 140


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in CODE:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["folder"].is_relative_to(tmp_path)
    assert names["reward_module"].global_step == 32  # two epochs of 256 pairs
    assert len(names["keep_best"].scores) == 3
    assert names["keep_best"].best["score"] >= max(names["keep_best"].scores)
    assert any(row["finished"] for row in names["ppo"].samples)  # else the subclass would learn from nothing
    assert names["measured"].difference.mean != 0

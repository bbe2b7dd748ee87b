"""Every YAML under configs/ names classes and arguments that exist; the demo's are run elsewhere."""

import re
from pathlib import Path

import pytest
import yaml

from rlhf_lightning.cli import check_command
from rlhf_lightning.commands import check_function_command
from rlhf_lightning.stages import read_pipeline

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TRAINED = [path for path in CONFIGS if "trainer" in yaml.safe_load(path.read_text(encoding="utf-8"))]
COMPARED = [path for path in CONFIGS if "models" in yaml.safe_load(path.read_text(encoding="utf-8"))]
PIPELINES = [path for path in CONFIGS if "stages" in yaml.safe_load(path.read_text(encoding="utf-8"))]


def test_every_config_is_of_a_known_kind() -> None:
    assert CONFIGS
    assert sorted(TRAINED + COMPARED + PIPELINES) == CONFIGS


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_training_config_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check_command(["fit", "--config", str(path)])


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_comparison_config_parses(path: Path) -> None:
    check_function_command("compare", ["--config", str(path)])


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_pipeline_names_configs_that_exist(path: Path) -> None:
    _, stages = read_pipeline(path)
    assert all(stage.config.is_file() for stage in stages)


PUBLISHED = [path for path in CONFIGS if path.parent.name in ("a", "b") and path.stem != "pipeline"]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_number_of_a_published_experiment_has_its_source_beside_it(path: Path) -> None:
    numbered = [line for line in path.read_text(encoding="utf-8").splitlines() if re.search(r": [-\d]", line)]
    assert [line for line in numbered if "#" not in line] == []
    assert any("published" in line for line in numbered)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_config_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40

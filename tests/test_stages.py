import json
from pathlib import Path

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.stages import Stage, StageState, read_pipeline

GOOD = """
run_dir: runs/demo
stages:
  - {name: sft, command: fit, config: sft.yaml}
  - {name: reward, command: fit, config: sub/reward.yaml, set: {model.model: "{run_dir}/sft/model"}}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(text)
    return path


def test_stages_are_read_with_configs_beside_the_file(tmp_path: Path) -> None:
    run_dir, stages = read_pipeline(written(tmp_path, GOOD))
    assert run_dir == Path("runs/demo")
    assert [stage.name for stage in stages] == ["sft", "reward"]
    assert stages[1].config == tmp_path / "sub/reward.yaml"


def test_command_line_of_a_stage(tmp_path: Path) -> None:
    stage = Stage("ppo", "fit", Path("ppo.yaml"), {"model.policy": "{run_dir}/sft/model", "a": [1, None], "b": True})
    assert stage.arguments(Path("out"), "auto") == [
        "fit",
        "--config=ppo.yaml",
        "--run_dir=out/ppo",
        "--model.policy=out/sft/model",
        "--a=[1, null]",
        "--b=true",
        "--ckpt_path=auto",
    ]
    assert Stage("c", "compare", Path("c.yaml")).arguments(Path("out"))[2] == "--output=out/c"


def test_nested_override_gets_the_run_dir_too() -> None:
    stage = Stage("c", "compare", Path("c.yaml"), {"models": {"ppo": "{run_dir}/ppo/model"}})
    assert json.loads(stage.arguments(Path("out"))[-1].partition("=")[2]) == {"ppo": "out/ppo/model"}


def test_fingerprint_sees_values_and_not_layout(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("x: 1\ny: [2, 3]\n")
    stage = Stage("a", "fit", config, {"k": 1})
    before = stage.fingerprint()
    config.write_text("# remark\ny:\n- 2\n- 3\nx: 1\n")
    assert stage.fingerprint() == before
    config.write_text("x: 2\ny: [2, 3]\n")
    assert stage.fingerprint() != before
    config.write_text("x: 1\ny: [2, 3]\n")
    assert Stage("a", "fit", config, {"k": 2}).fingerprint() != before


def test_state_comes_back_as_it_was_written(tmp_path: Path) -> None:
    state = StageState("done", "f", "r", None, seconds=1.5, table="a b")
    state.write(tmp_path / "sft")
    assert StageState.read(tmp_path / "sft") == state
    assert [path.name for path in (tmp_path / "sft").iterdir()] == ["stage.json"]
    assert StageState.read(tmp_path / "other") is None


def test_damaged_state_is_told(tmp_path: Path) -> None:
    (tmp_path / "stage.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        StageState.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "must hold the keys run_dir and stages; it holds missing"),
        ("[1]", "must hold the keys run_dir and stages; it holds list"),
        ("stages: []", "stages must be a list of at least one stage"),
        ("stage: []", "'stage' is not a key. Did you mean 'stages'?"),
        ("stages: [sft]", "stage 1 must be a mapping"),
        ("stages: [{nam: sft, command: fit, config: a}]", "'nam' is not a key. Did you mean 'name'?"),
        ("stages: [{name: sft, command: fit}]", "stage 1: config must be given as text; it is missing"),
        ("stages: [{name: a/b, command: fit, config: a}]", "'a/b' becomes a folder"),
        ("stages: [{name: a, command: fti, config: a}]", "no stage command 'fti'. Did you mean 'fit'?"),
        ("stages: [{name: a, command: fit, config: a, set: [1]}]", "set must map dotted keys to values"),
        (
            "stages: [{name: a, command: fit, config: a}, {name: a, command: fit, config: b}]",
            "two stages are called 'a'",
        ),
        ("stages:\n  - {name: a\n", "line 3, column 1: not valid YAML"),
    ],
)
def test_wrong_pipeline_takes_one_line(text: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        read_pipeline(written(tmp_path, text))
    assert line in str(refusal.value)
    assert str(tmp_path / "pipeline.yaml") in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_missing_and_unreadable_files_are_told(tmp_path: Path) -> None:
    written(tmp_path, GOOD)
    with pytest.raises(UserError, match=r"no file .*pipelin.yaml. Did you mean 'pipeline.yaml'\?"):
        read_pipeline(tmp_path / "pipelin.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_pipeline(tmp_path / "latin.yaml")

"""What the README shows works: its Python runs, its commands parse. So do those of the other pages, and their links."""

import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from rlhf_lightning.__main__ import COMMANDS, TRAINER_COMMANDS
from rlhf_lightning.cli import check_command
from rlhf_lightning.commands import check_function_command
from rlhf_lightning.stages import read_pipeline

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text: str = TEXT) -> list[list[str]]:
    lines = "\n".join(blocks("bash", text)).splitlines()
    parts = [part for line in lines for part in line.split("&&")]
    words = [shlex.split(part, comments=True) for part in parts]
    ours = []
    for argv in words:
        if argv[:1] == ["rlhf-lightning"]:
            ours.append(argv[1:])
        elif "rlhf_lightning" in argv and argv[argv.index("rlhf_lightning") - 1] == "-m":
            ours.append(argv[argv.index("rlhf_lightning") + 1 :])
    return ours


def test_every_kind_of_command_is_shown() -> None:
    assert {argv[0] for argv in commands()} >= set(COMMANDS) - {"test"}


TUTORIAL = commands((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("argv", commands() + TUTORIAL, ids=" ".join)
def test_a_command_parses(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if argv[0] == "pipeline":
        assert read_pipeline(argv[argv.index("--config") + 1])[1]
    elif argv[0] == "plan":
        check_command(["fit", *argv[1:]])
    elif argv[0] in TRAINER_COMMANDS:
        if "--print_config" in argv:
            with pytest.raises(SystemExit) as ending:
                check_command(argv)
            assert ending.value.code in (0, None)
        else:
            check_command(argv)
    else:
        check_function_command(argv[0], argv[1:])


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = next(block for block in blocks("python") if "Trainer" in block)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        exec(compile(example, "README.md", "exec"), {})
    said = " ".join(str(warning.message) for warning in warned)
    assert "module(s) in eval mode" not in said
    assert "across ranks is zero" not in said
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "my-model").num_parameters() > 0


def test_the_reward_function_example_scores_each_response() -> None:
    names: dict[str, object] = {}
    example = next(block for block in blocks("python") if "def concise" in block)
    exec(compile(example, "README.md", "exec"), names)
    assert names["concise"](["p", "p"], ["12345", ""]) == [-0.05, 0.0]  # type: ignore[operator]


def test_every_local_link_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *PAGES]:
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        assert links or page.name != "README.md"
        assert [link for link in links if not (page.parent / link).exists()] == [], page


def run_tool(readme: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "readme_commands.py"), "--readme", str(readme), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


def test_the_tool_that_runs_the_commands_stops_at_the_first_that_fails(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    shown = ["test -f README.md  # in a copy", "rlhf-lightning fit --config configs/smollm/b/ppo.yaml"]
    shown += ["false", "echo never"]
    readme.write_text("```python\nno\n```\n```bash\n# nothing\n" + "\n".join(shown) + "\n```\n")
    done = run_tool(readme)
    assert done.returncode == 1
    table = [line.split(maxsplit=1)[1] for line in done.stdout.partition("outcome, command\n")[2].splitlines()]
    assert table == [
        "ok: test -f README.md",
        "not run: needs the hub: rlhf-lightning fit --config configs/smollm/b/ppo.yaml",
        "FAILED with status 1: false",
        "in all; 3 of 4 commands",
    ]


@pytest.mark.slow
def test_the_tool_asks_tensorboard_for_its_page_and_stops_it(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("```bash\ntensorboard --logdir runs\n```\n")
    done = run_tool(readme)
    assert done.returncode == 0, done.stdout
    assert "started, gave its page, stopped: tensorboard --logdir runs" in done.stdout

"""docs/tutorial.md: its commands run one after the other, in small, and the curves it names are logged.

That each command parses as it stands is tests/test_readme.py's.
"""

import json
import re
import shlex
from pathlib import Path

import pytest

from rlhf_lightning.__main__ import main

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line)[1:] for line in PAGE.splitlines() if line.startswith("rlhf-lightning ")]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
SIZES |= {"head_dim": 4, "intermediate_size": 16, "max_position_embeddings": 512}
#: What makes a stage small enough for a test.
SMALLER = {
    "fit": ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--data.limit=64"],
    "predict": ["--trainer.limit_predict_batches=2"],
    "compare": ["--limit=4", "--sampling.max_new_tokens=4", "--likelihood={}", "--pairs.held out.limit=8"],
    "generate": ["--max_new_tokens=4"],
}


def smaller(argv: list[str]) -> list[str]:
    """Return a command of the page with less to do."""
    more = SMALLER.get(argv[0], [])
    if "configs/humanlike/sft.yaml" in argv:
        more = [*more, f"--model.config_overrides={json.dumps(SIZES)}"]
    if "configs/humanlike/ppo.yaml" in argv and argv[0] == "fit":
        more = [*more, "--model.sampling.max_new_tokens=4"]
    return [*argv, *more]


def test_the_curves_that_the_page_names_are_logged() -> None:
    keys = re.findall(r"`((?:train|rollout|val|time|check)/\w+)`", PAGE)
    assert len(keys) > 15
    assert [key for key in keys if key not in README and f"`{key.split('/')[1]}`" not in README] == []


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "checkout"
    place.mkdir()
    (place / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "shared").symlink_to(shared_data.parent)
    monkeypatch.chdir(place)
    for argv in COMMANDS:
        if "--push_to_hub" not in argv:  # tests/test_hub.py has a server for that
            assert not main(smaller(argv)), argv
    runs = place / "runs" / "tutorial"
    assert (runs / "compare" / "report.html").is_file()
    assert len((runs / "scores" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 32
    assert "Win rate" in (runs / "my-model" / "README.md").read_text(encoding="utf-8")  # of the comparison
    assert (runs / "my-model" / "model.safetensors").is_file()

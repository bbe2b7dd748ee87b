"""Pairs sampled from a model: they follow their prompts, and the known score decides."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("sample_pairs")


def options(shared_data: Path, score: str) -> argparse.Namespace:
    return argparse.Namespace(
        model=str(shared_data / "models" / "stories260K"),
        prompts=str(shared_data / "tinystories" / "eval.jsonl"),
        score=score,
        pairs=6,
        text_words=8,
        max_prompt_length=16,
        max_new_tokens=12,
        stop_token="<s>",
        batch_size=12,
        seed=0,
    )


def test_chosen_is_what_the_score_prefers(tool: ModuleType, shared_data: Path, tmp_path: Path) -> None:
    steep = tmp_path / "score.py"  # differences of thousands leave Bradley-Terry no doubt
    steep.write_text("def steep(prompts, responses):\n    return [1000.0 * hash_of(r) for r in responses]\n\n\n")
    steep.write_text(steep.read_text() + "def hash_of(text):\n    return sum(map(ord, text)) % 997\n")
    rows = tool.labelled_pairs(options(shared_data, f"{steep}:steep"))
    assert len(rows) == 6
    assert all(row["score_chosen"] >= row["score_rejected"] for row in rows)
    assert any(row["score_chosen"] > row["score_rejected"] for row in rows)
    assert rows == tool.labelled_pairs(options(shared_data, f"{steep}:steep"))  # the seed decides all


def test_a_flat_score_leaves_the_order_to_chance(tool: ModuleType, shared_data: Path, tmp_path: Path) -> None:
    for name, sign in (("up", 1), ("down", -1)):
        (tmp_path / f"{name}.py").write_text(
            f"def score(prompts, responses):\n    return [{sign}e-9 * len(r) for r in responses]\n"
        )
    up, down = (tool.labelled_pairs(options(shared_data, f"{tmp_path / name}.py:score")) for name in ("up", "down"))
    assert [row["chosen"] for row in up] == [row["chosen"] for row in down]


def test_responses_keep_the_blank_after_the_prompt(tool: ModuleType, shared_data: Path) -> None:
    rows = tool.labelled_pairs(options(shared_data, f"{ROOT / 'configs/stories/reward.py'}:bright"))
    starts = [str(row[side])[:1] for row in rows for side in ("chosen", "rejected")]
    assert starts.count(" ") > len(starts) / 2

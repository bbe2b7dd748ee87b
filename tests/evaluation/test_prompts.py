import json
from pathlib import Path

import pytest

from rlhf_lightning.data.chat import ConversationEncoder
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.prompts import encode_prompts, read_prompts
from rlhf_lightning.models.loading import load_tokenizer


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_limit_draws_prompts_by_the_seed_in_their_order(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", [{"prompt": f"{number:02d}", "topic": "x"} for number in range(50)])
    drawn = read_prompts(source, limit=10, seed=1)
    assert drawn == read_prompts(source, limit=10, seed=1)
    assert drawn.prompts != read_prompts(source, limit=10, seed=2).prompts
    assert (len(set(map(str, drawn.prompts))), drawn.available) == (10, 50)
    assert drawn.prompts == sorted(drawn.prompts, key=str)
    assert [row["prompt"] for row in drawn.rows] == drawn.prompts
    assert drawn.prompts != [f"{number:02d}" for number in range(10)]  # not just the first ones


@pytest.mark.parametrize("limit", [None, 3, 4])
def test_all_prompts_where_there_are_not_more(tmp_path: Path, limit: int | None) -> None:
    source = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}])
    assert read_prompts(source, limit=limit).prompts == ["a", "b", "c"]


def test_words_of_running_text(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", [{"text": "Once upon a time there was"}])
    assert read_prompts(source, chat=False, text_words=3).prompts == ["Once upon a"]


def test_a_row_without_a_prompt_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"promt": "b"}])
    with pytest.raises(UserError, match=r"p\.jsonl', row 2: .*prompt"):
        read_prompts(source)


def test_prompts_keep_their_last_tokens() -> None:
    encoder = ConversationEncoder(load_tokenizer("builtin:demo"))
    (whole,) = encode_prompts(encoder, ["Do you like pizza?"], 100)
    (cut,) = encode_prompts(encoder, ["Do you like pizza?"], 4)
    assert cut == whole[-4:]


def test_rewards_get_prompts_as_in_training(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", [{"prompt": "a"}])
    assert read_prompts(source).as_trained == [[{"role": "user", "content": "a"}]]
    assert read_prompts(source, chat=False).as_trained == ["a"]

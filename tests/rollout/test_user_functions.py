from pathlib import Path

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.rollout.user_functions import columns_of, load_function, named_function


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_colon", "must have the form package.module:name or path/to/file.py:name"),
        ("statistics:", "must have the form"),
        (
            "broken.py:f",
            "'broken.py:f' cannot be imported: ZeroDivisionError: division by zero (broken.py, line 2)",
        ),
        (
            "broken:f",
            "cannot be imported: ZeroDivisionError: division by zero (broken.py, line 2). For the file give",
        ),
        ("brokn.py:f", "the file 'brokn.py' of a reward function does not exist. Did you mean 'broken.py'?"),
        ("no_such_package.rewards:f", "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("none.py:f", "the file 'none.py' of a reward function does not exist"),
        ("statistics:meen", "statistics has no function 'meen'. Did you mean 'mean'?"),
        ("math:pi", "'pi' is a float, not a function"),
    ],
)
def test_a_path_that_leads_nowhere(path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("\n1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as error:
        load_function(path)
    assert message in str(error.value)


def test_functions_of_installed_modules() -> None:
    assert load_function("statistics:mean")([1, 2, 6]) == 3  # type: ignore[comparison-overlap]


def test_rows_become_columns() -> None:
    rows = [{"a": 1, "responses": "x"}, {"b": 2, "prompts": "y"}]
    assert columns_of(rows) == {"a": [1, None], "b": [None, 2]}


def test_a_function_itself_is_taken_under_its_own_name() -> None:
    def short(prompts: list[str], responses: list[str]) -> list[float]:
        return [-len(response) for response in responses]

    assert named_function(short, None) == (short, "short")
    assert named_function(short, "brief") == (short, "brief")
    assert named_function("statistics:correlation", None)[1] == "correlation"


def test_a_function_without_room_for_prompts_and_responses_is_refused() -> None:
    def trl_style(completions: list[str], **columns: object) -> list[float]:
        return []

    with pytest.raises(UserError) as error:
        named_function(trl_style, None)
    assert str(error.value).endswith(
        "it must take prompts and responses by place: trl_style(prompts, responses, **columns)."
    )
    anything = named_function(lambda *texts, **columns: [], "anything")  # has room
    assert anything[1] == "anything"

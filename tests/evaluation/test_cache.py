from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation import cache as cache_module
from rlhf_lightning.evaluation.cache import ResultCache, code_version
from rlhf_lightning.models.digests import model_digest
from rlhf_lightning.models.loading import load_causal_lm

MADE = {"tokens": torch.tensor([[1, 2], [3, 4]]), "kl": torch.tensor([0.1, 0.2], dtype=torch.float64)}


class Work:
    """Makes a result, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> dict[str, Tensor]:
        self.times += 1
        return dict(MADE)


def assert_made(found: dict[str, Tensor]) -> None:
    assert found.keys() == MADE.keys()
    for name, tensor in MADE.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def test_a_result_is_made_once_and_found_again_by_another_start(tmp_path: Path) -> None:
    work = Work()
    for cache in (ResultCache(tmp_path / "a"), ResultCache(tmp_path / "a")):
        for _ in range(2):
            found = cache.get("answers", lambda: ["x"], work)
            assert_made(found)
    assert work.times == 1
    assert [file.suffix for file in (tmp_path / "a").iterdir()] == [".safetensors"]  # whole, and nothing beside it


@pytest.mark.parametrize("other", [("answers", ["y"]), ("answers", ["x", ""]), ("scores", ["x"])])
def test_another_input_is_another_result(tmp_path: Path, other: tuple[str, list[str]]) -> None:
    work, cache = Work(), ResultCache(tmp_path)
    cache.get("answers", lambda: ["x"], work)
    cache.get(other[0], lambda: other[1], work)
    assert work.times == 2


def test_other_code_is_another_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, before = Work(), code_version()
    ResultCache(tmp_path).get("answers", lambda: ["x"], work)
    monkeypatch.setattr(cache_module, "_CODE", ("functional",))
    code_version.cache_clear()
    assert code_version() != before
    ResultCache(tmp_path).get("answers", lambda: ["x"], work)
    monkeypatch.undo()
    code_version.cache_clear()
    assert (work.times, code_version()) == (2, before)


def test_without_a_folder_nothing_is_kept_nor_any_digest_taken() -> None:
    def refuse() -> list[str]:
        raise AssertionError

    work = Work()
    for _ in range(2):
        ResultCache(None).get("answers", refuse, work)
    assert work.times == 2


def flipped(place: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_a_damaged_entry_is_made_anew_and_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    work, cache = Work(), ResultCache(tmp_path)
    cache.get("answers", lambda: ["x"], work)
    file = next(tmp_path.iterdir())
    whole = file.read_bytes()
    damages = [flipped(place) for place in range(len(whole))]
    damages += [lambda data: b"", lambda data: data[:-1], lambda data: b"x" * 40]
    for damage in damages:
        file.write_bytes(damage(whole))
        times = work.times
        found = cache.get("answers", lambda: ["x"], work)
        assert_made(found)
        if work.times > times:
            assert f"cache: '{file}' is damaged; its result is made anew" in caplog.text
            assert file.read_bytes() == whole
            caplog.clear()
    assert work.times > len(whole) * 0.9  # all but where blanks of the header do not count


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; give a folder, or null for none"):
        ResultCache(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be made a folder"):
        ResultCache(tmp_path / "file" / "below").get("answers", lambda: ["x"], Work())


def test_a_model_is_known_by_every_bit_and_not_by_its_place(tiny_models: dict[str, str]) -> None:
    model, again, other = (load_causal_lm(tiny_models[name]) for name in ("base", "base", "other"))
    cache = ResultCache(None)
    assert cache.model(model) == cache.model(again) == model_digest(model) != cache.model(other)
    weight = again.model.layers[1].mlp.up_proj.weight
    weight.data[0, :2] = weight.data[0, :2].flip(0)  # the same numbers in other places
    assert model_digest(again) != model_digest(model)
    weight.data[0, :2] = weight.data[0, :2].flip(0)
    assert model_digest(again) == model_digest(model)
    again.config.rope_parameters = {**again.config.rope_parameters, "rope_theta": 7.0}
    assert model_digest(again) != model_digest(model)

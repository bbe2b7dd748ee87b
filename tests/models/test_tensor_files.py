from pathlib import Path

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.tensor_files import make_folder, read_tensors, write_tensors

TENSORS = {"ids": torch.tensor([5, 6, 2])}


def test_what_is_written_is_read_and_nothing_else_is_left(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b", setting="cache")
    path = tmp_path / "a" / "b" / "x.safetensors"
    for tensors in ({"ids": torch.zeros(2)}, TENSORS):
        write_tensors(path, tensors, setting="cache")
    assert read_tensors(path, setting="cache")["ids"].tolist() == [5, 6, 2]
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache '.*file' cannot be made a folder: Not a directory\."):
        make_folder(tmp_path / "file" / "b", setting="cache")
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(UserError, match=r"cache: '.*x\.safetensors' cannot be written: Is a directory\."):
        write_tensors(tmp_path / "x.safetensors", TENSORS, setting="cache")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["file", "x.safetensors"]
    (tmp_path / "y.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match=r"cache: '.*y\.safetensors' is damaged \(.*\); delete it\."):
        read_tensors(tmp_path / "y.safetensors", setting="cache")

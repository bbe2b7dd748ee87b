"""A checkpoint file is whole or told from one that is, and there is a whole one at every moment."""

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning import checkpoint_files
from rlhf_lightning.checkpoint_files import (
    CHECKPOINT_FORMAT,
    CHECKPOINT_KEY,
    DamagedCheckpointError,
    check_file,
    kept_checkpoints,
    put_in_place,
    read_head,
    unfinished,
    write_file,
)
from rlhf_lightning.errors import UserError


def content(step: int) -> dict[str, Any]:
    return {"global_step": step, "state_dict": {"weight": torch.arange(40.0) + step}}


def step_in(path: Path) -> int:
    check_file(path)
    return int(torch.load(path, weights_only=True)["global_step"])


def save(folder: Path, step: int, before: int | None, keep: int = 2, is_best: bool = False) -> None:
    written = unfinished(folder / "last.ckpt")
    write_file(content(step), written)
    put_in_place(written, folder, step=step, before=before, keep=keep, is_best=is_best)


def steps(folder: Path) -> dict[str, int]:
    return {path.name: step_in(path) for path in sorted(folder.iterdir())}


def test_every_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_file(content(3), path)
    whole = path.read_bytes()
    noticed = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            check_file(path)
            read_head(path)
        except DamagedCheckpointError:
            noticed += 1
            continue
        loaded = torch.load(path, weights_only=True)
        assert loaded["global_step"] == 3
        assert torch.equal(loaded["state_dict"]["weight"], content(3)["state_dict"]["weight"])
    assert noticed > len(whole) // 4  # the rest is padding, dates and sizes that the directory repeats


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_file(content(3), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpointError):
            check_file(path)


def test_a_damaged_file_is_named_with_the_one_before_it(tmp_path: Path) -> None:
    save(tmp_path, 3, None)
    save(tmp_path, 5, 3)
    last = tmp_path / "last.ckpt"
    whole = last.read_bytes()
    place = whole.index(torch.arange(40.0).add(5).numpy().tobytes())
    last.write_bytes(whole[:place] + b"\0\0\0\0" + whole[place + 4 :])
    assert torch.load(last, weights_only=True)["state_dict"]["weight"][0] == 0  # torch says nothing
    with pytest.raises(DamagedCheckpointError, match=r"last\.ckpt' is damaged: .*/data/0 does not match its checksum"):
        check_file(last)
    with pytest.raises(DamagedCheckpointError, match=r"an earlier one of this run is '.*step-3\.ckpt'"):
        check_file(last)


@pytest.mark.parametrize(("keep", "names"), [(1, []), (2, ["step-6.ckpt"]), (3, ["step-6.ckpt", "step-4.ckpt"])])
def test_the_newest_are_kept_by_their_step(keep: int, names: list[str], tmp_path: Path) -> None:
    for step, before in ((2, None), (4, 2), (6, 4), (10, 6), (10, 10)):  # the last one twice
        save(tmp_path, step, before, keep)
    assert [path.name for path in kept_checkpoints(tmp_path)] == ["last.ckpt", *names]
    assert [step_in(path) for path in kept_checkpoints(tmp_path)] == [10, 6, 4][: len(names) + 1]


def test_a_course_that_was_left_leaves_no_checkpoint(tmp_path: Path) -> None:
    for step, before in ((2, None), (4, 2), (6, 4)):
        save(tmp_path, step, before, keep=3)
    save(tmp_path, 3, 6, keep=3)  # taken up from step 2
    assert steps(tmp_path) == {"last.ckpt": 3, "step-2.ckpt": 2}


def test_the_best_stays(tmp_path: Path) -> None:
    save(tmp_path, 2, None, is_best=True)
    for step, before in ((4, 2), (6, 4), (8, 6)):
        save(tmp_path, step, before)
    assert steps(tmp_path) == {"best.ckpt": 2, "last.ckpt": 8, "step-6.ckpt": 6}
    save(tmp_path, 9, 8, is_best=True)
    assert steps(tmp_path) == {"best.ckpt": 9, "last.ckpt": 9, "step-8.ckpt": 8}
    assert os.path.samefile(tmp_path / "best.ckpt", tmp_path / "last.ckpt")  # it takes no room of its own


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_before(call: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Raise before the n-th call that changes the disk; yield the names of those that were made."""
    made: list[str] = []

    def counted(function: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            if len(made) == call:
                raise Killed
            made.append(function.__name__)
            return function(*args, **kwargs)

        return count

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", counted(Path.replace))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(os, "link", counted(os.link))
        yield made


def test_there_is_a_whole_checkpoint_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in range(20):
        folder = tmp_path / str(call)
        folder.mkdir()
        save(folder, 2, None)
        save(folder, 4, 2)
        with contextlib.suppress(Killed), killed_before(call, monkeypatch) as made:
            save(folder, 6, 4, is_best=True)
        assert step_in(folder / "last.ckpt") in (4, 6)
        assert {step_in(path) for path in kept_checkpoints(folder)[1:]} <= {2, 4}
        assert len(kept_checkpoints(folder)) >= 2
        save(folder, 6, step_in(folder / "last.ckpt"), is_best=True)
        assert steps(folder) == {"best.ckpt": 6, "last.ckpt": 6, "step-4.ckpt": 4}
    assert len(made) < 20  # the last of them ran through


def test_where_the_disk_knows_no_links_names_are_given_by_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError("links are not supported")

    monkeypatch.setattr(os, "link", refused)
    save(tmp_path, 2, None)
    save(tmp_path, 4, 2, is_best=True)
    assert steps(tmp_path) == {"best.ckpt": 4, "last.ckpt": 4, "step-2.ckpt": 2}


def test_a_checkpoint_in_parts_is_kept_too(tmp_path: Path) -> None:
    for step, before in ((2, None), (4, 2), (6, 4)):
        written = unfinished(tmp_path / "last.ckpt")
        written.mkdir()
        (written / ".metadata").write_text(str(step))
        put_in_place(written, tmp_path, step=step, before=before, keep=2, is_best=step == 2)
    found = {path.name: (path / ".metadata").read_text() for path in tmp_path.iterdir()}
    assert found == {"best.ckpt": "2", "last.ckpt": "6", "step-4.ckpt": "4"}


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    with files_of_at_most(1000), pytest.raises(OSError, match="File too large"):
        write_file(content(1), tmp_path / "last.ckpt")


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_file({CHECKPOINT_KEY: {"format": CHECKPOINT_FORMAT + 1}}, path)
    with pytest.raises(UserError, match=r"last\.ckpt' was written by a newer rlhf_lightning \(format 2, this version"):
        read_head(path)
    write_file({CHECKPOINT_KEY: {"format": CHECKPOINT_FORMAT}}, path)
    assert read_head(path) == {CHECKPOINT_KEY: {"format": CHECKPOINT_FORMAT}}


def test_a_disk_that_cannot_be_read_is_told_from_a_lack_of_rights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    write_file(content(1), path)

    def refused(*_: Any) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint_files.zipfile, "is_zipfile", refused)
    with pytest.raises(UserError, match="cannot be read: Permission denied") as told:
        check_file(path)
    assert not isinstance(told.value, DamagedCheckpointError)

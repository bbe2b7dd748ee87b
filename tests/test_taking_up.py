"""What a run may be taken up from."""

from pathlib import Path

import pytest
import torch

from rlhf_lightning.checkpoint_files import CHECKPOINT_KEY
from rlhf_lightning.errors import UserError
from rlhf_lightning.taking_up import (
    LAST_CHECKPOINT,
    default_checkpoint,
    refuse_to_take_up,
    resolve_checkpoint,
)


def checkpoint_file(folder: Path) -> Path:
    path = folder / LAST_CHECKPOINT
    path.parent.mkdir(parents=True)
    torch.save({"pytorch-lightning_version": "2.6.6"}, path)
    return path


def test_auto_takes_the_last_checkpoint_or_the_beginning(tmp_path: Path) -> None:
    assert resolve_checkpoint("auto", tmp_path) is None
    last = checkpoint_file(tmp_path)
    assert resolve_checkpoint("auto", tmp_path) == str(last)
    assert resolve_checkpoint("last", tmp_path) == str(last)
    assert resolve_checkpoint(str(last), None) == str(last)
    assert resolve_checkpoint(None, tmp_path) is None


def test_last_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist, so there is nothing to take up"):
        resolve_checkpoint("last", tmp_path)


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    last = checkpoint_file(tmp_path)
    last.write_bytes(last.read_bytes()[:50])
    with pytest.raises(UserError, match="not a checkpoint, or a damaged one"):
        resolve_checkpoint(str(last), None)


def test_file_that_no_trainer_wrote_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="was not written by a Trainer"):
        resolve_checkpoint(str(tmp_path / "other.ckpt"), None)


def test_folder_is_a_checkpoint_only_if_it_is_one_in_parts(tmp_path: Path) -> None:
    last = checkpoint_file(tmp_path)
    with pytest.raises(UserError, match=f"is a folder; give '{last}'"):
        resolve_checkpoint(str(tmp_path), None)
    with pytest.raises(UserError, match=f"is a folder; give '{last}'"):
        resolve_checkpoint(str(last.parent), None)
    (tmp_path / ".metadata").touch()
    assert resolve_checkpoint(str(tmp_path), None) == str(tmp_path)


def test_a_folder_with_a_run_is_taken_up(tmp_path: Path) -> None:
    assert default_checkpoint(None) is None
    assert default_checkpoint(tmp_path) is None
    checkpoint_file(tmp_path)
    assert default_checkpoint(tmp_path) == "auto"


def test_a_checkpoint_of_another_module_is_refused_by_name() -> None:
    head = {CHECKPOINT_KEY: {"module": "DPOModule"}}
    with pytest.raises(UserError, match=r"last\.ckpt' was written by DPOModule, and this run trains PPOModule; give"):
        refuse_to_take_up("last.ckpt", head, "rlhf_lightning.PPOModule", -1)
    refuse_to_take_up("last.ckpt", head, "rlhf_lightning.modules.dpo.DPOModule", -1)
    refuse_to_take_up("last.ckpt", head, "mine.MyDPO", -1)  # may well be made from it


def test_auto_says_that_it_starts_from_the_beginning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_checkpoint("auto", tmp_path) is None
    assert "this run starts from the beginning" in caplog.text

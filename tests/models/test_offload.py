"""Weights that leave memory are the same when they come back, and the memory is free meanwhile."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.offload import OffloadedModels


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_free_while_nobody_asks(tmp_path: Path) -> None:
    size = 64 * 2**20
    layer = nn.Linear(4096, 4096, bias=False).requires_grad_(False)
    x = torch.randn(2, 4096)
    expected = layer(x)
    before = resident()
    models = OffloadedModels([layer], tmp_path)
    assert resident() < before - 0.9 * size
    with models.at_hand():
        assert torch.equal(layer(x), expected)
        assert resident() > before - 0.1 * size
    assert resident() < before - 0.9 * size
    assert torch.equal(layer(x), expected)  # outside too, only dearer
    assert list(tmp_path.iterdir()) == []


def test_bits_alignment_and_ties_are_kept(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model, other = make_model("tied_llama"), make_model("llama").bfloat16()
    before = {**model.state_dict(), **{f"other.{name}": tensor for name, tensor in other.state_dict().items()}}
    before = {name: tensor.clone() for name, tensor in before.items()}
    OffloadedModels([model, other], tmp_path / "new" / "folder")
    after = {**model.state_dict(), **{f"other.{name}": tensor for name, tensor in other.state_dict().items()}}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(parameter.data_ptr() % 64 == 0 for each in (model, other) for parameter in each.parameters())


def test_nothing_to_offload_and_no_room(tmp_path: Path) -> None:
    with OffloadedModels([nn.Identity()], tmp_path).at_hand():
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"offload_frozen: 0 MiB cannot be written to .*file'"):
        OffloadedModels([nn.Linear(2, 2)], tmp_path / "file")


@pytest.mark.gpu
def test_from_a_gpu_weights_go_to_the_host_and_back(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    layer = nn.Linear(512, 512).cuda().requires_grad_(False)
    x = torch.randn(2, 512, device="cuda")
    expected, before = layer(x), torch.cuda.memory_allocated()
    models = OffloadedModels([layer], tmp_path)
    assert layer.weight.device.type == "cpu"
    assert torch.cuda.memory_allocated() < before
    with models.at_hand():
        assert torch.equal(layer(x), expected)
    assert layer.weight.device.type == "cpu"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and asks glibc")
def test_what_was_freed_goes_back_to_the_system() -> None:
    """Pieces of 1 MiB between others that stay, as gradients lie among moments."""
    program = """
import torch
from rlhf_lightning.models.offload import return_freed_memory
from tests.models.test_offload import resident
del_me = torch.ones(2**22)  # 16 MiB: once such a piece is freed, glibc keeps smaller ones
del del_me
pieces = [torch.ones(2**18) for _ in range(256)]
kept = pieces[::2]
before = resident()
del pieces
held = resident()
return_freed_memory()
print(before - held, before - resident())
"""
    root = str(Path(__file__).parents[2])
    printed = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    held_back, given_back = map(int, printed.split())
    assert given_back > 0.9 * 128 * 2**20 > held_back + 64 * 2**20

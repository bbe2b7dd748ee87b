import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_lightning.rollout import linear
from rlhf_lightning.rollout.linear import PackedLinears, can_be_packed, packing_works

pytestmark = pytest.mark.skipif(not packing_works(), reason="this PyTorch has no packed product")
IDS = torch.arange(12).view(3, 4)


@pytest.fixture(autouse=True)
def _pack_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SMALLEST", 0)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 40])
def test_a_packed_layer_is_the_plain_one(bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    transposed = Conv1D(30, 20)
    nn.init.normal_(transposed.bias)
    layers = nn.ModuleList([nn.Linear(20, 30, bias=bias), transposed])
    for x in (torch.randn(rows, 20), torch.randn(rows, 2, 20)[:, -1], torch.randn(rows, 3, 20)):
        expected = [layer(x) for layer in layers]
        with PackedLinears().applied(layers):
            for layer, plain in zip(layers, expected, strict=True):
                assert layer(x).shape == plain.shape
                torch.testing.assert_close(layer(x), plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_models_of_every_family(family: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(family)
    before, parameters = model(input_ids=IDS).logits, list(model.parameters())
    values = [parameter.clone() for parameter in parameters]
    packed = PackedLinears()
    with packed.applied(model):
        inside = model(input_ids=IDS).logits
    torch.testing.assert_close(inside, before, atol=1e-4, rtol=1e-4)
    assert len(packed._packed) == sum(can_be_packed(module) for module in model.modules()) >= 9
    # Outside of sampling nothing is left of it.
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert not any("forward" in module.__dict__ for module in model.modules())
    for parameter, old, value in zip(model.parameters(), parameters, values, strict=True):
        assert parameter is old
        assert torch.equal(parameter, value)


def test_it_is_undone_after_an_error() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), PackedLinears().applied(layer):
        layer(torch.ones(3))
    assert "forward" not in layer.__dict__


@torch.no_grad()
def test_weights_are_packed_once_a_version() -> None:
    layer, packed, x = nn.Linear(4, 3, bias=False), PackedLinears(), torch.eye(4)

    def product_after(value: float, version: int | None) -> float:
        layer.weight.fill_(value)
        with packed.applied(layer, version):
            return float(layer(x)[0, 0])

    assert product_after(1.0, version=0) == 1
    assert product_after(2.0, version=0) == 1  # the same version is not packed again
    assert product_after(3.0, version=1) == 3
    assert product_after(4.0, version=None) == 4
    assert product_after(5.0, version=None) == 5  # nothing is known of it
    packed.release()
    assert not packed._packed
    assert product_after(6.0, version=1) == 6


class Wider(nn.Linear):
    """A layer that does more than its weight says."""


def test_other_layers_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    patched = nn.Linear(4, 4)
    patched.__dict__["forward"] = lambda x: x
    others: list[Any] = [
        patched,
        Wider(4, 4),
        nn.Linear(4, 4).double(),
        nn.Linear(4, 4).to("meta"),
        parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.Embedding(4, 4),
    ]
    assert not any(can_be_packed(module) for module in others)
    assert can_be_packed(nn.Linear(4, 4))
    monkeypatch.setattr(linear, "SMALLEST", 17)
    assert not can_be_packed(nn.Linear(4, 4))
    with torch.no_grad(), PackedLinears().applied(patched):
        assert torch.equal(patched(torch.ones(2)), torch.ones(2))
    assert "forward" in patched.__dict__


@torch.no_grad()
def test_without_the_operation_layers_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "packing_works", lambda: False)
    layer, packed = nn.Linear(4, 3), PackedLinears()
    before = copy.deepcopy(layer)(torch.eye(4))
    with packed.applied(layer):
        assert "forward" not in layer.__dict__
        assert torch.equal(layer(torch.eye(4)), before)
    assert not packed._packed

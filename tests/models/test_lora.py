"""Adapters by hand: what they compute, what they leave alone, and the model without them."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.models import lora as lora_module
from rlhf_lightning.models.causal_lm import head_is_plain, response_logprobs
from rlhf_lightning.models.lora import (
    LoRA,
    adapted_layers,
    adapter_settings,
    add_adapters,
    before_adapters,
    merged,
    merged_parameters,
    merged_weight,
    share_frozen_weights,
)
from rlhf_lightning.models.packed import packable

pytest.importorskip("peft", reason="adapters need peft, which is not installed")

MakeModel = Callable[..., PreTrainedModel]
IDS = torch.arange(12).view(3, 4)
#: Rows of unequal lengths, so that they are packed.
BATCH = SequenceBatch(torch.arange(3, 24).view(3, 7), torch.tensor([2, 1, 3]), torch.tensor([5, 2, 3]))


def disturb(model: nn.Module, seed: int = 1) -> None:
    """Give every adapter a second half that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        weight = layer.lora_B["default"].weight
        weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora.rank is 0; it must be at least 1."),
        ({"alpha": 0.0}, "lora.alpha is 0.0; it must be above 0."),
        ({"target_modules": []}, "lora.target_modules is empty; name at least one"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoRA(**options)


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(lora_module.importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    with pytest.raises(UserError, match=r"lora needs the package peft; install it by: pip install 'rlhf_lightning\[lo"):
        LoRA()


def test_a_target_that_is_not_there_is_refused(make_model: MakeModel) -> None:
    for target in ("q_prj", "lm_head", "proj"):  # mistyped, the head, the end of a word
        with pytest.raises(UserError, match=rf"lora.target_modules: '{target}' is no linear layer of LlamaForCausalLM"):
            add_adapters(make_model("llama"), LoRA(target_modules=["v_proj", target]))
    with pytest.raises(UserError, match=r"Did you mean 'q_proj'\? It has down_proj, gate_proj, k_proj, o_proj, q_pr"):
        add_adapters(make_model("llama"), LoRA(target_modules=["q_prj"]))


def test_a_model_begins_as_it_was(family: str, make_model: MakeModel) -> None:
    """To the last bit; all linear layers but the head have adapters, and nothing else is trained."""
    plain, model = make_model(family), add_adapters(make_model(family), LoRA(rank=3))
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert torch.equal(response_logprobs(model, BATCH), response_logprobs(plain, BATCH))
    assert set(adapter_settings(model).values().__iter__().__next__()) == {3, 32.0}
    backbone = plain.base_model.modules()
    assert len(adapted_layers(model)) == sum(type(m).__name__ in ("Linear", "Conv1D") for m in backbone) > 7
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{half}.default.weight" for name in adapted_layers(model) for half in "AB"}


def test_passes_take_the_same_ways_as_without(family: str, make_model: MakeModel) -> None:
    plain, model = make_model(family), add_adapters(make_model(family), LoRA(rank=3))
    assert head_is_plain(model) == head_is_plain(plain)
    assert packable(model.base_model) == packable(plain.base_model)


def test_a_scalar_head_stays_trainable(make_model: MakeModel) -> None:
    model = add_adapters(make_model("llama", scalar=True), LoRA(rank=2))
    others = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name}
    assert others == {"score.weight"}


@pytest.mark.parametrize(("targets", "ends"), [(["q_proj"], {"q_proj"}), (["1.mlp.up_proj"], {"up_proj"})])
def test_target_modules_are_ends_of_names(make_model: MakeModel, targets: list[str], ends: set[str]) -> None:
    layers = adapted_layers(add_adapters(make_model("llama"), LoRA(target_modules=targets)))
    assert {name.rpartition(".")[2] for name in layers} == ends
    assert len(layers) == (2 if targets == ["q_proj"] else 1)


def test_gradients_of_a_layer_by_hand(make_model: MakeModel) -> None:
    """y = x Wᵀ + s x Aᵀ Bᵀ with s = alpha / rank, so dB = s gᵀ (x Aᵀ) and dA = s (g B)ᵀ x for slopes g by y."""
    model = add_adapters(make_model("llama"), LoRA(rank=3, alpha=6.0, target_modules=["0.self_attn.q_proj"]))
    disturb(model)
    [layer] = adapted_layers(model).values()
    seen: dict[str, Tensor] = {}
    layer.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0].flatten(0, -2), y=output))
    layer.register_full_backward_hook(lambda _, __, slopes: seen.update(g=slopes[0].flatten(0, -2)))
    response_logprobs(model, BATCH).sum().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x, g = seen["x"].detach(), seen["g"]
    expected = x @ layer.base_layer.weight.T + 2.0 * x @ a.T @ b.T
    torch.testing.assert_close(seen["y"].flatten(0, -2), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b.grad, 2.0 * g.T @ (x @ a.T), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.grad, 2.0 * (g @ b).T @ x, rtol=1e-5, atol=1e-6)
    assert b.grad.norm() > 1e-3 < a.grad.norm()
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("alpha", [4.0, 8.0])
@pytest.mark.parametrize("rank", [2, 4])
def test_rank_and_alpha_weigh_the_adapter(make_model: MakeModel, rank: int, alpha: float) -> None:
    model = add_adapters(make_model("llama"), LoRA(rank=rank, alpha=alpha))
    disturb(model)
    for layer in adapted_layers(model).values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert len(a) == b.shape[1] == rank
        expected = layer.base_layer.weight + alpha / rank * b @ a
        torch.testing.assert_close(merged_weight(layer), expected, rtol=1e-5, atol=1e-6)


def test_the_model_before_its_adapters_shares_its_weights(family: str, make_model: MakeModel) -> None:
    plain, model = make_model(family), add_adapters(make_model(family), LoRA(rank=3))
    reference = before_adapters(model)
    disturb(model)
    assert {id(parameter) for parameter in reference.parameters()} < {id(p) for p in model.parameters()}
    assert reference.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(response_logprobs(reference, BATCH), response_logprobs(plain, BATCH))
    assert not torch.allclose(response_logprobs(model, BATCH), response_logprobs(plain, BATCH), atol=1e-2)
    assert type(reference) is type(plain)


@torch.no_grad()
def test_merged_it_is_a_plain_model_of_the_same_numbers(family: str, make_model: MakeModel) -> None:
    model = add_adapters(make_model(family), LoRA(rank=3))
    disturb(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = merged(model)
    assert not adapted_layers(plain)
    torch.testing.assert_close(response_logprobs(plain, BATCH), response_logprobs(model, BATCH), rtol=0, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    parameters = dict(merged_parameters(model))
    assert parameters.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in plain.named_parameters())
    assert merged(plain) is plain


def test_merging_is_not_rounded_by_autocast(make_model: MakeModel) -> None:
    model = add_adapters(make_model("llama"), LoRA(rank=3))
    disturb(model)
    [layer, *_] = adapted_layers(model).values()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(merged_weight(layer), inside := merged_weight(layer))
        assert inside.dtype == torch.float32
    assert torch.equal(merged_weight(layer), inside)


def test_sharing_keeps_a_head_and_its_embedding_one(make_model: MakeModel) -> None:
    """The reward model comes first, whose embedding the policy takes over; its head is the same tensor."""
    policy, scorer = make_model("tied_llama"), make_model("tied_llama", scalar=True)
    scorer.base_model.load_state_dict(policy.base_model.state_dict())
    add_adapters(policy, LoRA(rank=2))
    share_frozen_weights(nn.ModuleList([scorer.requires_grad_(False), policy]))
    assert policy.get_input_embeddings().weight is scorer.get_input_embeddings().weight
    assert policy.get_output_embeddings().weight is policy.get_input_embeddings().weight

"""Gradients that are added where they arise equal autograd's, and are left to it where somebody waits for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.models.causal_lm import response_logprobs
from rlhf_lightning.models.gradients import adding_in_place, embedding_in_place
from rlhf_lightning.models.lm_head import head_logprobs

BATCHES = [
    SequenceBatch(torch.tensor([[5, 6, 5, 7, 8], [6, 0, 9, 0, 0]]), torch.tensor([2, 1]), torch.tensor([3, 2])),
    SequenceBatch(torch.tensor([[9, 9, 5], [3, 4, 0]]), torch.tensor([1, 1]), torch.tensor([2, 1])),
]


def backward(model: PreTrainedModel, *, in_place: bool) -> None:
    """Run two passes of a step."""
    for number, batch in enumerate(BATCHES, start=1):
        loss = (number * response_logprobs(model, batch)).sum()
        if in_place:
            with adding_in_place():
                loss.backward()
        else:
            loss.backward()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_a_step_are_those_of_autograd(
    family: str, tied: bool, make_model: Callable[..., PreTrainedModel]
) -> None:
    gradients = []
    for in_place in (False, True):
        model = make_model(family, tie_word_embeddings=tied)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
        backward(model, in_place=in_place)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        found = gradients[1][name]
        assert expected is not None
        assert found is not None
        assert expected.any()
        assert (found - expected).norm() <= 1e-6 * expected.norm(), name


def test_the_padding_word_of_an_embedding_learns_nothing() -> None:
    words = nn.Embedding(6, 3, padding_idx=4)
    model = Model(words)
    with embedding_in_place(model):
        states = words(torch.tensor([[1, 4, 1]]))
    assert torch.equal(states, words(torch.tensor([[1, 4, 1]])))
    with adding_in_place():
        states.sum().backward()
    assert words.weight.grad is not None
    assert words.weight.grad[:, 0].tolist() == [0, 2, 0, 0, 0, 0]


class Model(nn.Module):
    """What the embedding is taken from."""

    def __init__(self, words: nn.Embedding) -> None:
        super().__init__()
        self.words = words

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding, as models of transformers do."""
        return self.words


class OfTheWeightsSize(TorchDispatchMode):
    """Counts new tensors of the weights' shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.storages, self.count = shape, set[int](), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and tuple(output.shape) == self.shape:
            self.count += output.untyped_storage().data_ptr() not in self.storages
            self.storages.add(output.untyped_storage().data_ptr())
        return output


def test_one_tensor_of_a_tied_weights_size_is_made_a_step(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    backward(model, in_place=True)  # the trials of a model's first pass are over
    model.zero_grad(set_to_none=True)
    weight = model.get_input_embeddings().weight
    with OfTheWeightsSize(tuple(weight.shape)) as seen:
        seen.storages.add(weight.data_ptr())
        backward(model, in_place=True)
    assert seen.count == 1


def test_who_asks_for_a_gradient_or_hooks_it_gets_it() -> None:
    hidden, tokens = torch.randn(4, 3), torch.tensor([0, 1, 1, 2])
    head = nn.Linear(3, 5)
    with adding_in_place():
        head_logprobs(head, hidden, tokens).logprobs.sum().backward()
    expected, seen = head.weight.grad, list[Tensor]()
    assert expected is not None
    [asked] = torch.autograd.grad(head_logprobs(head, hidden, tokens).logprobs.sum(), [head.weight])
    assert torch.equal(asked, expected)
    head.weight.grad = None
    head.weight.register_hook(seen.append)
    with adding_in_place():
        head_logprobs(head, hidden, tokens).logprobs.sum().backward()
    assert torch.equal(seen[0], expected)
    torch.testing.assert_close(dict(head.named_parameters())["weight"].grad, expected, rtol=0, atol=0)


def test_a_weight_that_was_computed_hands_its_gradient_on() -> None:
    """A merged adapter, say, is no leaf."""
    words = nn.Embedding(5, 2)
    factor = nn.Parameter(torch.tensor(2.0))
    del words._parameters["weight"]
    words.weight = torch.ones(5, 2) * factor
    with embedding_in_place(Model(words)), adding_in_place():
        words(torch.tensor([1, 3])).sum().backward()
    assert factor.grad is not None
    assert factor.grad.item() == 4.0

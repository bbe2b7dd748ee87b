"""The head in chunks says and teaches what the head at once does, and never holds all logits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_lightning.models.lm_head import HeadOutput, head_logprobs

TOKENS, HIDDEN, VOCABULARY = 13, 5, 7


def made(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[nn.Linear, Tensor, Tensor]:
    """Return a head, hidden states and tokens; some tokens come twice."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias).to(dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    return head, hidden, torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)


def slopes(head: nn.Linear, hidden: Tensor, output: HeadOutput) -> list[Tensor]:
    """Return the gradients of a sum in which every log-probability and every entropy has a weight of its own."""
    weights = torch.linspace(-1, 2, TOKENS)
    total = (weights * output.logprobs).sum()
    if output.entropy is not None and output.entropy.requires_grad:
        total = total + (weights.flip(0) * output.entropy).sum()
    return list(torch.autograd.grad(total, [hidden, *head.parameters()]))


@pytest.mark.parametrize("chunk", [1, VOCABULARY, 3 * VOCABULARY + 2])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", [{}, {"with_entropy": True}, {"with_entropy": True, "entropy_gradient": True}])
@pytest.mark.parametrize("bias", [True, False])
def test_chunks_change_neither_values_nor_gradients(
    chunk: int, temperature: float, entropy: dict[str, bool], bias: bool
) -> None:
    head, hidden, tokens = made(torch.float32, bias)
    whole, parts = (
        head_logprobs(head, hidden, tokens, temperature=temperature, chunk=size, **entropy) for size in (10**9, chunk)
    )
    torch.testing.assert_close(parts.logprobs, whole.logprobs, rtol=1e-5, atol=1e-5)
    assert (parts.entropy is None) == (whole.entropy is None) == (not entropy)
    if whole.entropy is not None and parts.entropy is not None:
        torch.testing.assert_close(parts.entropy, whole.entropy, rtol=1e-5, atol=1e-5)
        assert parts.entropy.requires_grad == whole.entropy.requires_grad == ("entropy_gradient" in entropy)
    for found, expected in zip(slopes(head, hidden, parts), slopes(head, hidden, whole), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_gradients_match_finite_differences() -> None:
    head, hidden, tokens = made(bias=True)

    def function(*tensors: Tensor) -> Any:
        return head_logprobs(_Given(tensors[1], tensors[2]), tensors[0], tokens, temperature=0.7, chunk=20).logprobs

    # The results are float32 by contract, so the step is coarse and the tolerance with it.
    inputs = [hidden, *(parameter.detach().clone().requires_grad_() for parameter in head.parameters())]
    assert torch.autograd.gradcheck(function, inputs, eps=1e-2, atol=2e-3, rtol=1e-2, nondet_tol=1e-6)


class _Given(nn.Linear):
    """A head of given tensors."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        nn.Module.__init__(self)
        self.__dict__["weight"], self.__dict__["bias"] = weight, bias


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return result


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_no_tensor_holds_all_logits_forwards_or_backwards(entropy_gradient: bool) -> None:
    head, tokens = nn.Linear(4, 50), torch.arange(40)
    hidden = torch.randn(40, 4, requires_grad=True)
    with Largest() as seen:
        output = head_logprobs(head, hidden, tokens, with_entropy=True, entropy_gradient=entropy_gradient, chunk=5 * 50)
        (output.logprobs.sum() + output.entropy.sum() * entropy_gradient).backward()  # type: ignore[union-attr]
    assert seen.size == 5 * 50  # a chunk of five rows; the weight has 200 numbers, all logits 2,000
    with Largest() as seen:
        head_logprobs(head, hidden, tokens).logprobs.sum().backward()
    assert seen.size == 40 * 50


def test_under_autocast_chunks_compute_in_its_type() -> None:
    head, hidden, tokens = made(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        whole, parts = (head_logprobs(head, hidden, tokens, chunk=size) for size in (10**9, 20))
    exact = head_logprobs(head, hidden, tokens)
    torch.testing.assert_close(parts.logprobs, whole.logprobs, rtol=1e-6, atol=1e-6)
    assert (parts.logprobs - exact.logprobs).abs().max() > 1e-3
    for found, expected in zip(slopes(head, hidden, parts), slopes(head, hidden, whole), strict=True):
        assert found.dtype == expected.dtype == torch.float32
        assert (found - expected).norm() <= 0.02 * expected.norm()


def test_a_head_of_another_kind_is_asked_as_it_is() -> None:
    """A wrapped head, such as one with adapters, computes its logits itself."""

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.weight, self.inner = inner.weight, inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    head, hidden, tokens = made(torch.float32)
    expected = (2 * head(hidden)).log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(head_logprobs(Doubled(head), hidden, tokens, chunk=1).logprobs, expected)

"""The fused head says and teaches what autograd does with all logits, kept or computed again, and never holds more."""

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


def plain(head: nn.Module, hidden: Tensor, tokens: Tensor, temperature: float = 1.0) -> HeadOutput:
    """Return what the definition gives, all logits at once."""
    logprobs = (head(hidden).float() / temperature).log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens[:, None]).squeeze(1)
    return HeadOutput(chosen, -(logprobs.exp() * logprobs).sum(dim=-1))


#: None kept, a part, and all.
KEPT = [6, 5 * VOCABULARY + 3, 10**9]


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("tile", [(1, 1), (2, 3), (3, 10), (50, 4), (100, 100), None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", [{}, {"with_entropy": True}, {"with_entropy": True, "entropy_gradient": True}])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_all_logits(
    keep: int, tile: tuple[int, int] | None, temperature: float, entropy: dict[str, bool], bias: bool
) -> None:
    head, hidden, tokens = made(torch.float32, bias)
    whole = plain(head, hidden, tokens, temperature)
    found = head_logprobs(head, hidden, tokens, temperature=temperature, keep=keep, tile=tile, **entropy)
    torch.testing.assert_close(found.logprobs, whole.logprobs, rtol=1e-5, atol=1e-5)
    assert (found.entropy is None) == (not entropy)
    if found.entropy is not None:
        torch.testing.assert_close(found.entropy, whole.entropy, rtol=1e-5, atol=1e-5)
        assert found.entropy.requires_grad == ("entropy_gradient" in entropy)
    if "entropy_gradient" not in entropy:
        whole = whole._replace(entropy=None)
    for one, other in zip(slopes(head, hidden, found), slopes(head, hidden, whole), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_far_apart_logits_neither_overflow_nor_vanish() -> None:
    """Some probabilities round to 0, whose logarithm must not spoil the entropy or its gradient."""
    head, hidden, tokens = made(torch.float32)
    found, whole = (f(head, 300 * hidden, tokens) for f in (_with_entropy, plain))
    assert (whole.logprobs.exp() == 0).any()
    torch.testing.assert_close(found.logprobs, whole.logprobs, rtol=1e-5, atol=1e-4)
    for one, other in zip(
        slopes(head, hidden, found), slopes(head, hidden, plain(head, 300 * hidden, tokens)), strict=True
    ):
        assert torch.isfinite(one).all()
        assert (one - other).norm() <= 1e-4 * other.norm()


def _with_entropy(head: nn.Linear, hidden: Tensor, tokens: Tensor) -> HeadOutput:
    return head_logprobs(head, hidden, tokens, with_entropy=True, entropy_gradient=True)


def test_a_word_that_a_bias_bars_leaves_the_entropy_finite() -> None:
    head, hidden, tokens = made(torch.float32)
    with torch.no_grad():
        head.bias[2] = -torch.inf
    tokens = tokens.masked_fill(tokens == 2, 1)
    logprobs = head(hidden).log_softmax(dim=-1)
    expected = -(logprobs.exp() * logprobs).nan_to_num(0.0).sum(dim=-1)
    found = _with_entropy(head, hidden, tokens)
    assert found.entropy is not None
    torch.testing.assert_close(found.entropy, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.isfinite(slope).all() for slope in slopes(head, hidden, found))


def test_a_second_derivative_is_refused() -> None:
    head, hidden, tokens = made(torch.float32)
    total = head_logprobs(head, hidden, tokens).logprobs.sum()
    [first] = torch.autograd.grad(total, [hidden], create_graph=True)
    assert not first.requires_grad  # the kept probabilities would count as constants


def test_a_second_backward_pass_gives_the_same_again() -> None:
    head, hidden, tokens = made(torch.float32)
    logprobs = head_logprobs(head, hidden, tokens).logprobs
    first, second = (torch.autograd.grad(logprobs.sum(), [hidden, head.weight], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_with_and_without_gradients_the_bits_are_the_same() -> None:
    """So the first ratio of a PPO iteration is exactly 1."""
    head, hidden, tokens = made(torch.float32)
    for keep in KEPT:
        with torch.no_grad():
            before = head_logprobs(head, hidden, tokens, with_entropy=True, keep=keep, tile=(4, 3))
        after = head_logprobs(head, hidden, tokens, with_entropy=True, keep=keep, tile=(4, 3))
        assert torch.equal(before.logprobs, after.logprobs)


def test_no_token_teaches_nothing() -> None:
    head, hidden, tokens = made(torch.float32)
    head_logprobs(head, hidden[:0], tokens[:0]).logprobs.sum().backward()
    assert head.weight.grad is None
    assert not hidden.grad.any()  # type: ignore[union-attr]


def test_gradients_match_finite_differences() -> None:
    head, hidden, tokens = made(bias=True)

    def function(*tensors: Tensor) -> Any:
        return head_logprobs(
            _Given(tensors[1], tensors[2]), tensors[0], tokens, temperature=0.7, keep=0, tile=(3, 2)
        ).logprobs

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
@pytest.mark.parametrize("kept", [0, 6, 40])
def test_no_tensor_holds_all_logits_forwards_or_backwards(entropy_gradient: bool, kept: int) -> None:
    head, tokens = nn.Linear(4, 50), torch.arange(40)
    hidden = torch.randn(40, 4, requires_grad=True)
    with Largest() as seen:
        output = head_logprobs(
            head, hidden, tokens, with_entropy=True, entropy_gradient=entropy_gradient, keep=kept * 50, tile=(15, 14)
        )
        (output.logprobs.sum() + output.entropy.sum() * entropy_gradient).backward()  # type: ignore[union-attr]
    assert seen.size == 15 * 14  # a tile; the weight has 200 numbers, all logits 2,000


def test_under_autocast_chunks_compute_in_its_type() -> None:
    head, hidden, tokens = made(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        whole = plain(head, hidden, tokens)._replace(entropy=None)
        parts = head_logprobs(head, hidden, tokens, keep=20, tile=(3, 4))
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
    torch.testing.assert_close(head_logprobs(Doubled(head), hidden, tokens, tile=(1, 1)).logprobs, expected)


class OfTheWeightsSize(TorchDispatchMode):
    """Counts the products of the weights' size."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.count += isinstance(output, Tensor) and output.shape == (VOCABULARY, HIDDEN) and "mm" in str(func)
        return output


@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_head_gets_no_gradient(bias: bool) -> None:
    """And none is computed; the hidden states' slopes are the same."""
    found, counts = [], []
    for frozen in (False, True):
        head, hidden, tokens = made(torch.float32, bias)
        head.requires_grad_(not frozen)
        with OfTheWeightsSize() as counter:
            head_logprobs(head, hidden, tokens, tile=(2 * TOKENS, VOCABULARY)).logprobs.sum().backward()
        assert hidden.grad is not None
        found.append(hidden.grad)
        counts.append(counter.count)
        assert all((parameter.grad is None) == frozen for parameter in head.parameters())
    assert torch.equal(*found)
    assert counts == [1, 0]

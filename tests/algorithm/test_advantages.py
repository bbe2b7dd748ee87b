import pytest
import torch

from rlhf_lightning.algorithm.advantages import GAE
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.advantages import gae
from rlhf_lightning.functional.sequences import length_mask


def numbers() -> dict[str, torch.Tensor]:
    """Return rewards, values and mask of three responses."""
    mask = length_mask(torch.tensor([3, 1, 4]))
    rewards, values = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    return {"rewards": rewards, "values": values, "response_mask": mask}


def test_discount_and_lambda_reach_the_formula() -> None:
    # delta: 1 + 0.5 · 2 - 1 = 1 and 3 - 2 = 1; advantages 1 + 0.5 · 0.4 · 1 = 1.2 and 1.
    tensors = {"rewards": torch.tensor([[1.0, 3.0]]), "values": torch.tensor([[1.0, 2.0]])}
    result = GAE(gamma=0.5, gae_lambda=0.4, whiten=False).estimate(**tensors, response_mask=torch.ones(1, 2).bool())
    torch.testing.assert_close(result.advantages, torch.tensor([[1.2, 1.0]]))
    torch.testing.assert_close(result.returns, torch.tensor([[2.2, 3.0]]))


def test_whitened_advantages_have_mean_0_and_variance_1_and_returns_are_from_before() -> None:
    tensors = numbers()
    mask = tensors["response_mask"]
    plain = GAE(whiten=False).estimate(**tensors)
    white = GAE().estimate(**tensors)
    kept = white.advantages[mask]
    assert kept.mean().item() == pytest.approx(0, abs=1e-6)
    assert kept.var(correction=0).item() == pytest.approx(1, abs=1e-5)
    raw = plain.advantages[mask]
    torch.testing.assert_close(kept, (raw - raw.mean()) / raw.std(correction=0))
    assert not white.advantages[~mask].any()
    assert torch.equal(white.returns, plain.returns)


def test_the_default_is_undiscounted_with_lambda_095() -> None:
    tensors = numbers()
    expected = gae(
        rewards=tensors["rewards"],
        values=tensors["values"],
        response_mask=tensors["response_mask"],
        gamma=1.0,
        gae_lambda=0.95,
    )
    assert torch.equal(GAE(whiten=False).estimate(**tensors).advantages, expected[0])


@pytest.mark.parametrize("name", ["gamma", "gae_lambda"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"{name} is .*; it must lie in \[0, 1\]"):
        GAE(**{name: value})  # type: ignore[arg-type]

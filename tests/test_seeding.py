import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.seeding import derive_seed, derived_generator, run_seed


def test_a_seed_is_the_hash_of_what_it_is_for() -> None:
    # Fixed for good: another value would be another run for everyone who resumes.
    digest = hashlib.sha256(b"42:rollout:3:1").digest()
    assert derive_seed(42, "rollout", 3, 1) == int.from_bytes(digest[:8], "little") // 2


@given(seed=st.integers(0, 2**32), counters=st.lists(st.integers(0, 10**9), max_size=3))
def test_seeds_fit_into_63_bits(seed: int, counters: list[int]) -> None:
    assert 0 <= derive_seed(seed, "rollout", *counters) < 2**63


def test_every_use_has_its_own_stream() -> None:
    uses = [(seed, purpose, a, b) for seed in (0, 1) for purpose in ("row", "shuffle") for a in (0, 1) for b in (0, 11)]
    assert len({derive_seed(*use) for use in uses}) == len(uses)
    assert derive_seed(0, "row", 1, 11) != derive_seed(0, "row", 11, 1)
    assert derive_seed(0, "row", 1, 11) != derive_seed(0, "row", 111)


def test_a_generator_repeats_itself_and_leaves_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    draws = [torch.rand(3, generator=derived_generator(7, "row", counter)) for counter in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_run_seed_is_what_lightning_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert run_seed() == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "123")
    assert run_seed() == 123

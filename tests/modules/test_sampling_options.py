"""What the sampling settings change, seen through the PPO module: responses, and the log-probabilities it trains on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.rollout.collect import Rollout
from rlhf_lightning.rollout.sampler import SamplingConfig


class Watched(PPOModule):
    """Keeps its last rollout."""

    rollout: Rollout

    def score(self, *args: Any, **kwargs: Any) -> Rollout:
        self.rollout = super().score(*args, **kwargs)
        return self.rollout


@pytest.fixture
def roll_out(
    ppo: Callable[..., PPOModule], prompts: Callable[..., Any], trainer: Callable[..., Trainer]
) -> Callable[..., Watched]:
    """``roll_out(**sampling)`` lets the tiny policy respond to eight prompts, without an update."""

    def run(**sampling: Any) -> Watched:
        module = ppo(Watched, sampling=SamplingConfig(**{"max_new_tokens": 10, **sampling}))
        trainer().predict(module, datamodule=prompts(8, val=8, val_batch_size=8))
        assert isinstance(module, Watched)
        return module

    return run


def rows(batch: SequenceBatch) -> list[list[int]]:
    pairs = zip(batch.response_tokens.tolist(), batch.response_lengths.tolist(), strict=True)
    return [tokens[:length] for tokens, length in pairs]


@torch.no_grad()
def by_hand(module: Watched, temperature: float) -> torch.Tensor:
    """Log-probability of each response token, one row at a time, straight from transformers' logits."""
    sequences, result = module.rollout.sequences, torch.zeros_like(module.rollout.old_logprobs)
    for row, tokens in enumerate(rows(sequences)):
        start = int(sequences.prompt_lengths[row])
        ids = sequences.input_ids[row, : start + len(tokens)]
        logits = module.policy(input_ids=ids[None]).logits[0, start - 1 : -1] / temperature
        result[row, : len(tokens)] = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return result


def test_stop_strings_change_where_responses_end(roll_out: Callable[..., Watched]) -> None:
    free, stopped = roll_out().rollout, roll_out(stop_strings=["e"])
    decode = stopped.tokenizer.decode
    ended = 0
    for long, short, finished in zip(
        rows(free.sequences), rows(stopped.rollout.sequences), stopped.rollout.finished.tolist(), strict=True
    ):
        assert long[: len(short)] == short
        assert "e" not in decode(short[:-1])
        assert finished == ("e" in decode(short) or short[-1] in stopped.stop_ids)
        assert len(short) == len(long) or "e" in decode(short)
        ended += len(short) < len(long)
    assert ended > 2


def test_temperature_changes_the_responses_and_the_logprobs_trained_on(roll_out: Callable[..., Watched]) -> None:
    """Policy and reference are divided by it too, so the sampler's own log-probabilities are those trained on."""
    warm, cold = roll_out(), roll_out(temperature=0.5)
    assert rows(warm.rollout.sequences) != rows(cold.rollout.sequences)
    for module, temperature in ((warm, 1.0), (cold, 0.5)):
        rollout, expected = module.rollout, by_hand(module, temperature)
        torch.testing.assert_close(rollout.old_logprobs, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(rollout.ref_logprobs, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(rollout.sampler_logprobs, expected, atol=1e-4, rtol=1e-4)
    assert (by_hand(cold, 1.0) - cold.rollout.old_logprobs).abs().max() > 0.1


@pytest.mark.parametrize("sampling", [{"top_k": 2}, {"top_p": 0.3}], ids=str)
def test_top_k_and_top_p_change_the_draws_but_not_what_is_trained_on(
    roll_out: Callable[..., Watched], sampling: dict[str, Any]
) -> None:
    module = roll_out(**sampling)
    assert rows(module.rollout.sequences) != rows(roll_out().rollout.sequences)
    expected, mask = by_hand(module, 1.0), module.rollout.sequences.response_mask
    torch.testing.assert_close(module.rollout.old_logprobs, expected, atol=1e-4, rtol=1e-4)
    # What the sampler drew from gives each token more than the policy does: the bias that the docstring tells of.
    assert ((module.rollout.sampler_logprobs - expected)[mask] > 0).all()

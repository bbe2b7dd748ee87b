import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.models.causal_lm import ResponsePass, response_logprobs, response_pass
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.rollout.collect import (
    Rollout,
    Scorers,
    decode_responses,
    score_samples,
)
from rlhf_lightning.rollout.reward_sources import RewardSource, Scores, ScoringBatch
from rlhf_lightning.rollout.sampler import Samples

PROMPTS, PROMPT_MASK = torch.tensor([[0, 5, 6], [7, 8, 9], [0, 0, 10]]), torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]])
SAMPLES = Samples(
    tokens=torch.tensor([[11, 2, 0, 0], [12, 13, 14, 15], [2, 0, 0, 0]]),
    lengths=torch.tensor([2, 4, 1]),
    finished=torch.tensor([True, False, True]),
    logprobs=torch.tensor([[-1.0, -2.0, 0.0, 0.0], [-3.0, -4.0, -5.0, -6.0], [-7.0, 0.0, 0.0, 0.0]]),
)
SEQUENCES = SequenceBatch.join(PROMPTS, PROMPT_MASK.bool(), SAMPLES.tokens, SAMPLES.lengths)
ROWS = [{"n": 0}, {"n": 1}, {"n": 2}]


class LastToken(RewardSource):
    """Scores the number of the last token, and keeps what it was shown."""

    seen: ScoringBatch

    def score(self, batch: ScoringBatch) -> Scores:
        self.seen = batch
        last = batch.sequences.input_ids.gather(1, batch.sequences.lengths[:, None] - 1)[:, 0].float()
        return Scores(last, {"last": last})


class OwnPass(ScalarModel):
    """A critic with a pass of its own, which notes what it was given of the policy's."""

    given: ResponsePass

    def values(self, batch: SequenceBatch, policy_pass: ResponsePass) -> torch.Tensor:  # type: ignore[override]
        self.given = policy_pass
        return super().values(batch)


@pytest.fixture
def scorers(make_model: Callable[..., PreTrainedModel]) -> Scorers:
    """Three different models and a reward."""
    critic = OwnPass(make_model("llama", seed=3, scalar=True))
    return Scorers(make_model("llama", seed=1), make_model("llama", seed=2), critic, LastToken(), temperature=0.7)


def score(scorers: Scorers, tokenizer: PreTrainedTokenizerFast, groups: list[list[int]], **more: Any) -> Rollout:
    return score_samples(
        SAMPLES,
        sequences=SEQUENCES,
        groups=[torch.tensor(group) for group in groups],
        scorers=scorers,
        prompts=["a", "b", "c"],
        rows=ROWS,
        tokenizer=tokenizer,
        **more,
    )


def test_every_model_says_its_own(scorers: Scorers, word_tokenizer: PreTrainedTokenizerFast) -> None:
    rollout = score(scorers, word_tokenizer, [[1], [0, 2]])
    with torch.no_grad():
        old = response_logprobs(scorers.policy, SEQUENCES, temperature=0.7)
        ref = response_logprobs(scorers.reference, SEQUENCES, temperature=0.7)
        values = ScalarModel.values(scorers.critic, SEQUENCES)
    torch.testing.assert_close(rollout.old_logprobs, old, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rollout.ref_logprobs, ref, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rollout.old_values, values, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(old, ref)
    assert not any(tensor.requires_grad for tensor in (rollout.old_logprobs, rollout.ref_logprobs, rollout.old_values))
    assert rollout.scores.total.tolist() == [2, 15, 2]
    assert rollout.sampler_logprobs is SAMPLES.logprobs


def test_without_a_critic_values_are_zero(scorers: Scorers, word_tokenizer: PreTrainedTokenizerFast) -> None:
    rollout = score(dataclasses.replace(scorers, critic=None), word_tokenizer, [[0, 1, 2]], group_size=3)
    assert not rollout.old_values.any()
    assert rollout.old_logprobs.any()
    assert rollout.group_size == 3


def test_a_critic_is_shown_the_policys_own_pass(scorers: Scorers, word_tokenizer: PreTrainedTokenizerFast) -> None:
    score(scorers, word_tokenizer, [[0, 1, 2]])
    with torch.no_grad():
        expected = response_pass(scorers.policy, SEQUENCES, temperature=0.7)
    torch.testing.assert_close(scorers.critic.given.hidden, expected.hidden)


def test_groups_change_nothing(scorers: Scorers, word_tokenizer: PreTrainedTokenizerFast) -> None:
    whole = score(scorers, word_tokenizer, [[0, 1, 2]])
    for groups in ([[2], [1], [0]], [[2, 0], [1]]):
        parts = score(scorers, word_tokenizer, groups)
        for name in ("old_logprobs", "ref_logprobs", "old_values"):
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=1e-5, rtol=1e-5)


def test_no_padding_is_computed(scorers: Scorers, word_tokenizer: PreTrainedTokenizerFast) -> None:
    policy: Any = scorers.policy
    score(scorers, word_tokenizer, [[0, 1, 2]])  # the trials of head and packing would be noted too
    shapes: list[torch.Size] = []
    policy.model.embed_tokens.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[:2]))
    score(scorers, word_tokenizer, [[1], [0, 2]])
    assert [int(SEQUENCES.lengths[1]), int(SEQUENCES.lengths[[0, 2]].sum())] == [7, 6]
    assert shapes == [(1, 7), (1, 6)]  # a group's rows stand one behind another


def test_the_reward_sees_text_tokens_and_rows(scorers: Scorers, word_tokenizer: PreTrainedTokenizerFast) -> None:
    rollout = score(scorers, word_tokenizer, [[0, 1, 2]])
    assert isinstance(scorers.reward, LastToken)
    seen = scorers.reward.seen
    assert seen.responses == rollout.responses == ["w11", "w12 w13 w14 w15", ""]
    assert seen.prompts == rollout.prompts == ["a", "b", "c"]
    assert seen.rows == ROWS
    assert seen.finished.tolist() == rollout.finished.tolist() == [True, False, True]
    assert torch.equal(seen.sequences.input_ids, SEQUENCES.input_ids)


def test_progress_counts_rows(scorers: Scorers, word_tokenizer: PreTrainedTokenizerFast) -> None:
    calls: list[tuple[int, int]] = []
    score(scorers, word_tokenizer, [[1], [0, 2]], progress=lambda done, of: calls.append((done, of)))
    assert calls == [(1, 3), (3, 3)]


def test_padding_is_not_decoded_even_if_its_id_is_a_word() -> None:
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate("abcdefghi")}, unk_token="a"))
    sequences = SequenceBatch(torch.tensor([[5, 0, 6], [7, 8, 0]]), torch.tensor([1, 1]), torch.tensor([2, 1]))
    assert decode_responses(PreTrainedTokenizerFast(tokenizer_object=backend), sequences) == ["a g", "i"]

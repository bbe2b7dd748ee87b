from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_lightning.algorithm.critics import SeparateCritic, TrunkCritic
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.models.causal_lm import ResponsePass
from rlhf_lightning.models.loading import load_causal_lm, load_sequence_classifier
from rlhf_lightning.models.scalar_head import ScalarModel

BATCH = SequenceBatch(torch.tensor([[5, 6, 7, 2], [8, 2, 0, 0]]), torch.tensor([2, 1]), torch.tensor([2, 1]))
NO_PASS = ResponsePass(torch.empty(0), None, torch.empty(0))  # a separate critic makes its own
SIZES = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def policy(tmp_path: Path) -> str:
    """Folder of a language model."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "policy")
    return str(tmp_path / "policy")


@pytest.fixture
def reward_model(tmp_path: Path) -> str:
    """Folder of a reward model."""
    torch.manual_seed(1)
    config = LlamaConfig(**SIZES, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward")


def test_from_the_policy_every_value_starts_at_zero_and_can_be_trained(policy: str) -> None:
    critic = SeparateCritic()
    critic.setup(policy, load_causal_lm(policy))
    values = critic.values(BATCH, NO_PASS)
    assert values.tolist() == [[0, 0], [0, 0]]
    ((values - 1) ** 2).sum().backward()
    assert critic.scalar.model.score.weight.grad.any()
    assert critic.scalar.model.training


def test_from_a_reward_model_the_first_values_are_its_scores(policy: str, reward_model: str) -> None:
    critic = SeparateCritic(init_from=reward_model)
    critic.setup(policy, load_causal_lm(policy))
    source = ScalarModel(load_sequence_classifier(reward_model))
    values = critic.values(BATCH, NO_PASS)
    assert values.any()
    assert torch.equal(values, source.values(BATCH))
    # The value before the last token is the score of the sequence without it.
    shorter = SequenceBatch(torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([2, 1]), torch.tensor([1, 0]))
    torch.testing.assert_close(torch.stack([values[0, 1], values[1, 0]]), source.scores(shorter))


def test_normalize_puts_the_first_values_on_the_scale_of_normalised_scores(policy: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1, score_mean=0.5, score_std=0.25))
    model.save_pretrained(tmp_path / "reward")
    path = str(tmp_path / "reward")
    raw, normalized = SeparateCritic(path), SeparateCritic(path, normalize=True)
    for critic in (raw, normalized):
        critic.setup(policy, load_causal_lm(policy))
    wanted = torch.where(BATCH.response_mask, (raw.values(BATCH, NO_PASS) - 0.5) / 0.25, 0.0)
    torch.testing.assert_close(normalized.values(BATCH, NO_PASS), wanted)
    ((normalized.values(BATCH, NO_PASS) - 1) ** 2).sum().backward()
    head = normalized.scalar.model.score
    assert head.weight.grad.any()
    assert head.bias.grad.any()


def test_normalize_asks_for_a_reward_model_with_statistics(policy: str, reward_model: str) -> None:
    with pytest.raises(UserError, match="normalize is true, but there is no init_from"):
        SeparateCritic(normalize=True)
    with pytest.raises(
        UserError, match=r"SeparateCritic: normalize is true, but the config.json of .* score_mean None"
    ):
        SeparateCritic(reward_model, normalize=True).setup(policy, load_causal_lm(policy))


def test_it_is_set_up_once(policy: str, reward_model: str) -> None:
    critic = SeparateCritic()
    critic.setup(policy, load_causal_lm(policy))
    with torch.no_grad():
        critic.scalar.model.score.weight.fill_(1.0)
    critic.setup(reward_model, load_causal_lm(policy))
    assert critic.scalar.model.score.weight.unique().tolist() == [1]


def test_its_learning_rate_is_checked() -> None:
    assert SeparateCritic(learning_rate=0.0).learning_rate == 0
    with pytest.raises(UserError, match=r"learning_rate is -1e-05; it must be at least 0"):
        SeparateCritic(learning_rate=-1e-5)
    with pytest.raises(UserError, match=r"learning_rate is nan; it must be at least 0"):
        SeparateCritic(learning_rate=float("nan"))


def trunk_pass(requires_grad: bool = True) -> ResponsePass:
    """The hidden states before the three response tokens of ``BATCH``."""
    hidden = torch.arange(24.0).view(3, 8).requires_grad_(requires_grad)
    return ResponsePass(torch.zeros(2, 2), None, hidden)


def test_a_trunk_critic_reads_the_policys_hidden_states(policy: str) -> None:
    critic = TrunkCritic()
    critic.setup(policy, load_causal_lm(policy))
    assert critic.values(BATCH, trunk_pass()).tolist() == [[0, 0], [0, 0]]  # a new head says nothing
    with torch.no_grad():
        critic.head.weight[0, 1], critic.head.bias[0] = 2.0, 0.5
    critic.setup(policy, load_causal_lm(policy))  # once
    # The second of each state's eight numbers: 1, 9 and 17; the two tokens of the first row, the one of the second.
    assert critic.values(BATCH, trunk_pass()).tolist() == [[2.5, 18.5], [34.5, 0.0]]


@pytest.mark.parametrize("detach", [False, True])
def test_detach_keeps_the_value_loss_out_of_the_trunk(policy: str, detach: bool) -> None:
    critic, given = TrunkCritic(detach=detach), trunk_pass()
    critic.setup(policy, load_causal_lm(policy))
    with torch.no_grad():
        critic.head.weight.fill_(1.0)
    (critic.values(BATCH, given) ** 2).sum().backward()
    assert critic.head.weight.grad is not None
    assert critic.head.weight.grad.any()
    assert (given.hidden.grad is None) == detach


def test_warmup_is_checked() -> None:
    assert TrunkCritic(warmup_iterations=3).warmup_iterations == 3
    with pytest.raises(UserError, match="TrunkCritic: warmup_iterations is -1; it must be at least 0"):
        TrunkCritic(warmup_iterations=-1)

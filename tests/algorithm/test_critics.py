from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_lightning.algorithm.critics import SeparateCritic
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.models.loading import load_sequence_classifier
from rlhf_lightning.models.scalar_head import ScalarModel

BATCH = SequenceBatch(torch.tensor([[5, 6, 7, 2], [8, 2, 0, 0]]), torch.tensor([2, 1]), torch.tensor([2, 1]))
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
    critic.setup(policy)
    values = critic.values(BATCH)
    assert values.tolist() == [[0, 0], [0, 0]]
    ((values - 1) ** 2).sum().backward()
    assert critic.scalar.model.score.weight.grad.any()
    assert critic.scalar.model.training


def test_from_a_reward_model_the_first_values_are_its_scores(policy: str, reward_model: str) -> None:
    critic = SeparateCritic(init_from=reward_model)
    critic.setup(policy)
    source = ScalarModel(load_sequence_classifier(reward_model))
    values = critic.values(BATCH)
    assert values.any()
    assert torch.equal(values, source.values(BATCH))
    # The value before the last token is the score of the sequence without it.
    shorter = SequenceBatch(torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([2, 1]), torch.tensor([1, 0]))
    torch.testing.assert_close(torch.stack([values[0, 1], values[1, 0]]), source.scores(shorter))


def test_it_is_set_up_once(policy: str, reward_model: str) -> None:
    critic = SeparateCritic()
    critic.setup(policy)
    with torch.no_grad():
        critic.scalar.model.score.weight.fill_(1.0)
    critic.setup(reward_model)
    assert critic.scalar.model.score.weight.unique().tolist() == [1]


def test_its_learning_rate_is_checked() -> None:
    assert SeparateCritic(learning_rate=0.0).learning_rate == 0
    with pytest.raises(UserError, match=r"learning_rate is -1e-05; it must be at least 0"):
        SeparateCritic(learning_rate=-1e-5)

"""Data that a module cannot read is refused before its weights are loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule, Trainer

from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.text import DemonstrationDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.modules.base import ModelModule
from rlhf_lightning.modules.data_checks import check_data
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.sft import SFTModule


@pytest.fixture
def refused(trainer: Callable[..., Trainer], tmp_path: Path) -> Callable[..., str]:
    """``refused(module, data class, words=1)`` is the message for a pair whose response repeats a word."""

    def attempt(module: ModelModule, kind: Any, words: int = 1, **settings: Any) -> str:
        row = {"prompt": "tea", "chosen": "good " * words, "rejected": "no", "margin": 0.5}
        (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
        with pytest.raises(UserError) as caught:
            trainer(max_steps=1).fit(module, datamodule=kind(str(tmp_path / "pairs.jsonl"), **settings))
        assert not hasattr(module, "policy")
        assert not hasattr(module, "scalar")
        return str(caught.value)

    return attempt


def test_batches_of_another_kind(refused: Callable[..., str], ppo: Callable[..., ModelModule], demo: str) -> None:
    line = "{} cannot read the batches of {}; set data to {}."
    assert refused(SFTModule(demo), PreferenceDataModule) == line.format(
        "SFTModule", "PreferenceDataModule", "DemonstrationDataModule"
    )
    assert refused(RewardModule(demo), PromptDataModule) == line.format(
        "RewardModule", "PromptDataModule", "PreferenceDataModule"
    )
    assert refused(ppo(), DemonstrationDataModule) == line.format(
        "PPOModule", "DemonstrationDataModule", "PromptDataModule"
    )


def test_margins_that_nobody_reads(refused: Callable[..., str], demo: str) -> None:
    assert refused(DPOModule(demo), PreferenceDataModule, margin_column="margin") == (
        "data.margin_column is 'margin', but DPOModule takes no notice of margins; RewardModule does. Leave it out."
    )


def test_longer_sequences_than_the_model_reads(refused: Callable[..., str], demo: str) -> None:
    message = refused(SFTModule(demo), DemonstrationDataModule, words=200)
    assert message.startswith("the data has sequences of 2")
    assert message.endswith(f"tokens, but model {demo!r} reads at most 128; lower data.max_length.")


def test_overrides_count(refused: Callable[..., str], demo: str) -> None:
    shorter = SFTModule(demo, pretrained=False, config_overrides={"max_position_embeddings": 8})
    assert "reads at most 8" in refused(shorter, DemonstrationDataModule, words=10)


def test_tokens_that_the_model_lacks(refused: Callable[..., str], demo: str) -> None:
    fewer = SFTModule(demo, pretrained=False, config_overrides={"vocab_size": 8})
    assert f"model {demo!r} knows only 8; its tokenizer belongs to another model." in refused(
        fewer, DemonstrationDataModule
    )


def test_data_of_ones_own_is_not_looked_at(demo: str) -> None:
    check_data(SFTModule(demo), LightningDataModule())
    check_data(SFTModule(demo), None)


@pytest.fixture
def demo(language_model: str, tmp_path: Path) -> str:
    """The language model under a short name."""
    return shutil.copytree(language_model, str(tmp_path / "model"))

"""Data that a module cannot read is refused before its weights are loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

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


@pytest.mark.parametrize("kind", [SFTModule, RewardModule, DPOModule])
def test_batches_of_a_dataloader_of_another_kind(kind: Any, demo: str, trainer: Callable[..., Trainer]) -> None:
    rows: Any = DataLoader([{"prompt": "tea", "chosen": "good", "rejected": "no"}], batch_size=1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"reads batches of the class \w+Batch, but the dataloader gives a dict; give"):
        trainer(max_steps=1).fit(kind(demo), rows)


def test_a_dataloader_as_the_message_says(demo: str, trainer: Callable[..., Trainer]) -> None:
    data = PreferenceDataModule("builtin:demo/train", limit=6, tokenizer="builtin:demo")
    data.setup("fit")
    run = trainer(max_steps=2)
    run.fit(DPOModule(demo), DataLoader(data.train_examples, batch_size=3, collate_fn=data.collate))  # type: ignore[arg-type]
    assert run.global_step == 2


def test_weights_of_few_digits_are_warned_of(
    demo: str, trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    data = PreferenceDataModule("builtin:demo/train", limit=6, batch_size=2)
    for precision, said in (("bf16-true", True), ("bf16-mixed", False)):
        caplog.clear()
        trainer(max_steps=1, precision=precision).fit(RewardModule(demo), datamodule=data)
        assert ("round small steps to nothing" in caplog.text) == said


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

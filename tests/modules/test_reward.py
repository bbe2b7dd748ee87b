"""The reward model: loss and metrics by hand, what it exports, what it notes for PPO."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_lightning.data.collate import PairBatch, PairExample, collate_pairs
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.models.export import export_checkpoint
from rlhf_lightning.models.loading import load_tokenizer
from rlhf_lightning.modules.reward import RewardModule

MakeTrainer = Callable[..., Trainer]
SaveModel = Callable[..., str]
Weights = Callable[[LightningModule], dict[str, Tensor]]

# Five pairs of unequal lengths; the third is a tie. The demo's stop token has id 4 and is the padding here too.
PAIRS = [
    PairExample([5, 6, 7], [20, 21, 4], [22, 4]),
    PairExample([8], [23, 4], [24, 25, 26, 27, 4]),
    PairExample([9, 10], [28, 4], [28, 4]),
    PairExample([11, 12, 13, 14], [4], [29, 30, 4]),
    PairExample([15, 16], [31, 32, 33, 4], [34, 35, 4]),
]


def batches(size: int) -> list[PairBatch]:
    return [collate_pairs(PAIRS[start : start + size], pad_id=4) for start in range(0, len(PAIRS), size)]


def loader(size: int, most: int | None = None) -> DataLoader[PairBatch]:
    """The rows in batches of ``size``, the last one shorter; the first ``most`` batches."""
    return DataLoader(batches(size)[:most], batch_size=None)  # type: ignore[arg-type]


@torch.no_grad()
def score(folder: str | Path, ids: list[int]) -> float:
    """Of one unpadded row at its last token, by transformers itself."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.pad_token_id = None
    return model(input_ids=torch.tensor([ids])).logits.item()


def margins(folder: str) -> list[float]:
    return [score(folder, [*p, *c]) - score(folder, [*p, *r]) for p, c, r in PAIRS]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def test_the_loss_is_bradley_terry(reward_model: str, trainer: MakeTrainer) -> None:
    run = trainer(max_steps=1)
    run.fit(RewardModule(reward_model, optimizer=sgd), loader(5))
    expected = margins(reward_model)
    metrics = {name: value.item() for name, value in run.callback_metrics.items()}
    losses = [math.log1p(math.exp(-margin)) for margin in expected]
    assert metrics["train/loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert metrics["train/margin"] == pytest.approx(sum(expected) / 5, rel=1e-4)
    right = sum(margin > 0 for margin in expected)
    assert 0 < right < 4
    assert metrics["train/accuracy"] == pytest.approx((right + 0.5) / 5)  # the tie counts as half
    assert metrics["train/lr"] == pytest.approx(0.1)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_validation_is_over_all_pairs_whatever_the_batches(reward_model: str, trainer: MakeTrainer, size: int) -> None:
    expected = margins(reward_model)
    [metrics] = trainer().validate(RewardModule(reward_model), loader(size), verbose=False)
    mean = sum(expected) / 5
    assert metrics["val/loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in expected) / 5, rel=1e-5)
    assert metrics["val/accuracy"] == pytest.approx((sum(m > 0 for m in expected) + 0.5) / 5)
    assert metrics["val/ties"] == pytest.approx(1 / 5)
    assert metrics["val/margin_mean"] == pytest.approx(mean, rel=1e-4)
    assert metrics["val/margin_std"] == pytest.approx((sum((m - mean) ** 2 for m in expected) / 5) ** 0.5, rel=1e-4)
    assert metrics["val/margin_median"] == pytest.approx(sorted(expected)[2], rel=1e-4, abs=1e-6)


def test_every_validation_starts_from_nothing(reward_model: str, trainer: MakeTrainer) -> None:
    module = RewardModule(reward_model)
    first = trainer().validate(module, loader(2), verbose=False)
    assert trainer().validate(module, loader(2), verbose=False) == first
    assert trainer().test(module, loader(2), verbose=False) == first
    trainer().validate(module, loader(2, most=1), verbose=False)
    assert trainer().validate(module, loader(2), verbose=False) == first


def test_a_head_without_training_is_not_judged_in_silence(
    trained: tuple[RewardModule, Path],
    language_model: str,
    reward_model: str,
    trainer: MakeTrainer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def told() -> list[str]:
        return [record.message for record in caplog.records if record.name == "rlhf_lightning.modules.scoring"]

    trainer().validate(RewardModule(language_model), loader(5), verbose=False)
    assert told() == ["the scalar head is untrained, its scores are random: name a checkpoint by --ckpt_path."]
    caplog.clear()
    module, checkpoint = trained
    trainer().validate(RewardModule(language_model), loader(5), ckpt_path=checkpoint, verbose=False)
    trainer().validate(module, loader(5), verbose=False)
    trainer().validate(RewardModule(reward_model), loader(5), verbose=False)
    assert not told()


def test_predict_gives_both_scores(reward_model: str, trainer: MakeTrainer) -> None:
    predictions: Any = trainer().predict(RewardModule(reward_model), loader(2))
    for side, place in (("chosen", 1), ("rejected", 2)):
        scores = torch.cat([part[f"{side}_score"] for part in predictions]).tolist()
        assert scores == pytest.approx([score(reward_model, [*pair[0], *pair[place]]) for pair in PAIRS], rel=1e-4)
        tokenizer = load_tokenizer(reward_model)
        texts = [text for part in predictions for text in part[side]]
        assert texts == [tokenizer.decode(pair[place]) for pair in PAIRS]


def test_it_learns_the_preferences(language_model: str, trainer: MakeTrainer) -> None:
    pairs = [PAIRS[number] for number in (0, 1, 3, 4)]
    module = RewardModule(language_model, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
    trainer(max_epochs=20).fit(module, DataLoader([collate_pairs(pairs, pad_id=4)], batch_size=None))  # type: ignore[arg-type]
    [metrics] = trainer().validate(module, loader(5), verbose=False)
    assert metrics["val/accuracy"] == pytest.approx(0.9)  # all but the tie
    assert metrics["val/margin_q25"] > 1


@pytest.fixture
def trained(language_model: str, trainer: MakeTrainer, tmp_path: Path) -> tuple[RewardModule, Path]:
    """A module after some training, and its checkpoint."""
    module, run = RewardModule(language_model, optimizer=sgd), trainer(max_epochs=3)
    run.fit(module, loader(5))
    run.save_checkpoint(tmp_path / "run.ckpt")
    return module, tmp_path / "run.ckpt"


def test_exports_score_as_the_module(trained: tuple[RewardModule, Path], tmp_path: Path) -> None:
    """Also in a padded batch by transformers, which finds the last token by the padding's id."""
    module, checkpoint = trained
    module.export_model(tmp_path / "model")
    export_checkpoint(checkpoint, tmp_path / "from_checkpoint")
    batch = batches(5)[0].chosen
    with torch.no_grad():
        expected = module.scalar.scores(batch)
    for folder in ("model", "from_checkpoint"):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        pad = AutoTokenizer.from_pretrained(tmp_path / folder).pad_token_id
        assert model.config.pad_token_id == pad != 4
        ids = torch.where(batch.attention_mask, batch.input_ids, pad)
        with torch.no_grad():
            scores = model(input_ids=ids, attention_mask=batch.attention_mask.long()).logits.squeeze(1)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


def test_it_notes_the_token_at_which_it_is_read(trained: tuple[RewardModule, Path], tmp_path: Path) -> None:
    module, checkpoint = trained
    module.export_model(tmp_path / "model")
    export_checkpoint(checkpoint, tmp_path / "from_checkpoint")
    loaded = RewardModule.load_from_checkpoint(checkpoint, weights_only=True)
    loaded.export_model(tmp_path / "from_loaded")
    for folder in ("model", "from_checkpoint", "from_loaded"):
        config = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder).config
        assert config.scored_token_id == 4


def test_a_reward_model_trained_further_keeps_its_token(
    save_model: SaveModel, trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = RewardModule(save_model(tmp_path / "other", seed=3, scalar=True, scored_token_id=9))
    trainer(max_steps=1).fit(module, loader(5))
    assert module.scalar.model.config.scored_token_id == 9


def test_padding_that_ends_texts_gets_a_token_of_its_own(
    save_model: SaveModel, trainer: MakeTrainer, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "start", seed=0, pad_token_id=4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    module = RewardModule(folder, optimizer=sgd)
    trainer(max_steps=1).fit(module, loader(5))
    module.export_model(tmp_path / "model")
    exported = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert exported.pad_token_id not in (exported.eos_token_id, exported.bos_token_id, exported.unk_token_id)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").config.pad_token_id == (
        exported.pad_token_id
    )


def test_the_same_seed_gives_the_same_bits(language_model: str, trainer: MakeTrainer, weights: Weights) -> None:
    results = []
    for seed in (1, 1, 2):
        seed_everything(seed, verbose=False)
        module = RewardModule(language_model)
        data = PreferenceDataModule(
            "builtin:demo/train", limit=10, val_size=2, batch_size=4, max_length=96, max_prompt_length=48
        )
        trainer(max_epochs=2).fit(module, datamodule=data)
        results.append(weights(module))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    assert not torch.equal(results[0]["scalar.model.score.weight"], results[2]["scalar.model.score.weight"])


def test_a_trained_head_is_kept(reward_model: str) -> None:
    module = RewardModule(reward_model)
    module.configure_model()
    start = AutoModelForSequenceClassification.from_pretrained(reward_model)
    assert torch.equal(module.scalar.model.score.weight, start.score.weight)


def test_responses_that_end_anywhere_leave_no_token_noted(reward_model: str, trainer: MakeTrainer) -> None:
    cut = [PairExample([5, 6], [20 + row, 30 + row % 2], [22, 23]) for row in range(4)]  # ends: 30, 31, 30, 31
    half, most = (collate_pairs([*cut, *more], pad_id=4) for more in ([], [PairExample([7], [8, 30], [9, 31])]))
    for batch, expected in ((half, None), (most, 30)):
        module = RewardModule(reward_model)
        module.configure_model()
        module.scalar.model.config.scored_token_id = None
        trainer(max_steps=1).fit(module, DataLoader([batch], batch_size=None))  # type: ignore[arg-type]
        assert module.scalar.model.config.scored_token_id == expected

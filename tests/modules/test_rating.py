"""Regression on ratings: error and correlations by hand, what it learns, what it exports."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from rlhf_lightning.data.collate import LabelledBatch, LabelledExample, collate_labelled
from rlhf_lightning.data.unpaired import UnpairedDataModule
from rlhf_lightning.modules.rating import RatingModule

MakeTrainer = Callable[..., Trainer]

# Seven responses of unequal lengths, all ending with the demo's stop token.
RATED = [
    LabelledExample([5, 6, 7], [20, 21, 4], 1.0),
    LabelledExample([8], [23, 4], 4.0),
    LabelledExample([9, 10], [28, 4], 2.5),
    LabelledExample([11, 12, 13, 14], [4], 5.0),
    LabelledExample([15, 16], [31, 32, 33, 4], 3.0),
    LabelledExample([15], [34, 35, 4], 2.0),
    LabelledExample([17, 18], [36, 4], 4.5),
]
LABELS = [example.label for example in RATED]


def loader(size: int) -> DataLoader[LabelledBatch]:
    batches = [collate_labelled(RATED[start : start + size], pad_id=4) for start in range(0, len(RATED), size)]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


@torch.no_grad()
def scores(folder: str | Path) -> list[float]:
    """Of each unpadded row at its last token, by transformers itself."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.pad_token_id = None
    rows = [[*example.prompt_ids, *example.response_ids] for example in RATED]
    return [model(input_ids=torch.tensor([ids])).logits.item() for ids in rows]


def correlation(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / (sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y)) ** 0.5


def ranks(x: list[float]) -> list[float]:
    return [float(sorted(x).index(value)) for value in x]  # no two are equal


def squared_error(found: list[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(found, LABELS, strict=True)) / len(LABELS)


def test_the_loss_is_the_mean_squared_error(reward_model: str, trainer: MakeTrainer) -> None:
    run = trainer(max_steps=1)
    run.fit(RatingModule(reward_model), loader(7))
    assert run.callback_metrics["train/loss"].item() == pytest.approx(squared_error(scores(reward_model)), rel=1e-4)


@pytest.mark.parametrize("size", [2, 7])
def test_validation_is_over_all_rows_whatever_the_batches(reward_model: str, trainer: MakeTrainer, size: int) -> None:
    found, module = scores(reward_model), RatingModule(reward_model)
    for _ in range(2):  # the second starts from nothing
        [metrics] = trainer().validate(module, loader(size), verbose=False)
        assert metrics["val/loss"] == pytest.approx(squared_error(found), rel=1e-4)
        assert metrics["val/pearson"] == pytest.approx(correlation(found, LABELS), abs=1e-4)
        assert metrics["val/spearman"] == pytest.approx(correlation(ranks(found), ranks(LABELS)), abs=1e-4)


def test_it_learns_the_ratings_and_exports_a_reward_model(
    language_model: str, trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = RatingModule(
        language_model,
        head_std=0.0,
        store_score_statistics=True,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
    )
    run = trainer(max_epochs=40, check_val_every_n_epoch=40)
    run.fit(module, loader(7), loader(2))
    assert run.callback_metrics["val/loss"] < 0.1
    assert run.callback_metrics["val/spearman"] > 0.9
    module.export_model(tmp_path)
    found, config = scores(tmp_path), json.loads((tmp_path / "config.json").read_text())
    assert found == pytest.approx(LABELS, abs=1)
    assert config["scored_token_id"] == 4
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["score_mean"] == pytest.approx(sum(found) / 7, rel=1e-3)


def test_predict_gives_scores_beside_labels(reward_model: str, trainer: MakeTrainer) -> None:
    predictions: Any = trainer().predict(RatingModule(reward_model), loader(2))
    assert torch.cat([part["score"] for part in predictions]).tolist() == pytest.approx(scores(reward_model), rel=1e-4)
    assert torch.cat([part["label"] for part in predictions]).tolist() == LABELS
    assert sum(len(part["response"]) for part in predictions) == 7


def test_it_reads_the_unpaired_data_module(language_model: str, trainer: MakeTrainer, tmp_path: Path) -> None:
    rows = [{"prompt": f"is tea {n}", "response": "good " * (n % 3 + 1), "stars": n % 5 + 1} for n in range(12)]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = UnpairedDataModule(str(tmp_path / "rated.jsonl"), val_size=4, label_column="stars", batch_size=4)
    run = trainer(max_epochs=1)
    run.fit(RatingModule(language_model), datamodule=data)
    assert {"val/loss", "val/pearson", "val/spearman"} <= run.callback_metrics.keys()

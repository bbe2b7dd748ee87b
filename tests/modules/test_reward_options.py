"""What the options of the reward model change: its loss, where it starts, what its config tells."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from rlhf_lightning.data.collate import MarginPairExample, PairBatch, PairExample, collate_pairs
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.export import export_checkpoint
from rlhf_lightning.models.loading import load_tokenizer
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.rollout.reward_model import RewardModel
from rlhf_lightning.rollout.reward_sources import ScoringBatch

MakeTrainer = Callable[..., Trainer]
SaveModel = Callable[..., str]

PAIRS = [
    PairExample([5, 6, 7], [20, 21, 4], [22, 4]),
    PairExample([8], [23, 4], [24, 25, 26, 27, 4]),
    PairExample([9, 10], [28, 4], [29, 4]),
    PairExample([11, 12, 13, 14], [4], [29, 30, 4]),
    PairExample([15, 16], [31, 32, 33, 4], [34, 35, 4]),
]
MARGINS = [0.0, 0.5, 1.0, 2.0, 3.0]


def loader(size: int = 5, margins: list[float] | None = None) -> DataLoader[PairBatch]:
    pairs: list[Any] = PAIRS
    if margins:
        pairs = [MarginPairExample(*pair, margin) for pair, margin in zip(PAIRS, margins, strict=True)]
    batches = [collate_pairs(pairs[start : start + size], pad_id=4) for start in range(0, 5, size)]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


@torch.no_grad()
def scores(module: RewardModule) -> tuple[Tensor, Tensor]:
    """Of the chosen and of the rejected responses."""
    module.configure_model()
    batch = collate_pairs(PAIRS, pad_id=4)
    return module.scalar.scores(batch.chosen), module.scalar.scores(batch.rejected)


@pytest.fixture
def losses(reward_model: str, trainer: MakeTrainer) -> Callable[..., tuple[dict[str, float], RewardModule]]:
    """``losses(margins=None, **settings)`` takes one step on the five pairs; what it logged, and the module."""

    def run(margins: list[float] | None = None, **settings: Any) -> tuple[dict[str, float], RewardModule]:
        module, fit = RewardModule(reward_model, optimizer=sgd, **settings), trainer(max_steps=1)
        fit.fit(module, loader(margins=margins), loader(2, margins))
        return {name: value.item() for name, value in fit.callback_metrics.items()}, module

    return run


def test_margins_change_the_loss_and_what_is_learnt(reward_model: str, losses: Callable[..., Any]) -> None:
    chosen, rejected = scores(RewardModule(reward_model))
    gaps = (chosen - rejected).tolist()
    expected = [math.log1p(math.exp(margin - gap)) for gap, margin in zip(gaps, MARGINS, strict=True)]
    plain, with_margins = losses(), losses(MARGINS)
    assert with_margins[0]["train/loss"] == pytest.approx(sum(expected) / 5, rel=1e-4)
    assert plain[0]["train/loss"] == pytest.approx(sum(math.log1p(math.exp(-gap)) for gap in gaps) / 5, rel=1e-4)
    assert with_margins[0]["train/margin"] == pytest.approx(plain[0]["train/margin"])  # of the scores, as ever
    # Validation measures what is trained.
    after, after_plain = (torch.sub(*scores(module)) for _, module in (with_margins, plain))
    assert not torch.equal(after, after_plain)
    gaps = after.tolist()
    expected = [math.log1p(math.exp(margin - gap)) for gap, margin in zip(gaps, MARGINS, strict=True)]
    assert with_margins[0]["val/loss"] == pytest.approx(sum(expected) / 5, rel=1e-4)


def test_larger_margins_drive_scores_further_apart(reward_model: str, trainer: MakeTrainer) -> None:
    gaps = []
    for margins in (None, [3.0] * 5):
        module = RewardModule(reward_model, optimizer=functools.partial(torch.optim.SGD, lr=0.02))
        trainer(max_epochs=10).fit(module, loader(margins=margins))
        gaps.append(float(torch.sub(*scores(module)).mean()))
    assert gaps[1] > gaps[0] + 0.5


def test_center_coef_changes_the_loss_and_holds_scores_around_zero(
    reward_model: str, losses: Callable[..., Any], trainer: MakeTrainer
) -> None:
    chosen, rejected = scores(RewardModule(reward_model))
    center = float(((chosen + rejected) ** 2).mean())
    plain, centred = losses()[0], losses(center_coef=0.1)[0]
    assert centred["train/center_loss"] == pytest.approx(center, rel=1e-4)
    assert centred["train/loss"] == pytest.approx(plain["train/loss"] + 0.1 * center, rel=1e-4)
    assert "train/center_loss" not in plain
    levels = []
    for coef in (0.0, 0.5):
        module = RewardModule(
            reward_model, center_coef=coef, optimizer=lambda params: torch.optim.Adam(params, lr=3e-3)
        )
        trainer(max_epochs=30).fit(module, loader())
        chosen, rejected = scores(module)
        assert (chosen - rejected).mean() > 0.5
        levels.append(float((chosen + rejected).abs().mean()))
    assert levels[1] < 0.3 * levels[0]


class TestHead:
    def head(self, folder: str, **settings: Any) -> Tensor:
        seed_everything(3, verbose=False)
        module = RewardModule(folder, **settings)
        module.configure_model()
        weight = module.scalar.model.score.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def test_head_std_changes_the_first_weights(self, save_model: SaveModel, tmp_path: Path) -> None:
        folder = save_model(tmp_path, seed=0, hidden_size=512, intermediate_size=16, num_hidden_layers=1)
        assert float(self.head(folder).std()) == pytest.approx(513**-0.5, rel=0.15)
        assert float(self.head(folder, head_std=2.0).std()) == pytest.approx(2, rel=0.15)

    def test_head_std_0_begins_with_scores_of_0_also_from_a_reward_model(self, reward_model: str) -> None:
        assert self.head(reward_model).any()
        assert not self.head(reward_model, head_std=0.0).any()
        assert not torch.cat(scores(RewardModule(reward_model, head_std=0.0))).any()

    def test_a_checkpoint_brings_its_own_head(self, reward_model: str, trainer: MakeTrainer, tmp_path: Path) -> None:
        module, run = RewardModule(reward_model, head_std=1.0, optimizer=sgd), trainer(max_steps=1)
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "run.ckpt")
        loaded = RewardModule.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
        assert loaded.head_std == 1
        assert all(torch.equal(one, other) for one, other in zip(scores(loaded), scores(module), strict=True))


def statistics(folder: str | Path) -> tuple[float, float] | None:
    """What the config of an exported model tells."""
    config = json.loads((Path(folder) / "config.json").read_text())
    assert ("score_mean" in config) == ("score_std" in config)
    return (config["score_mean"], config["score_std"]) if "score_mean" in config else None


def measured(module: RewardModule) -> tuple[float, float]:
    both = torch.cat(scores(module)).double()
    return float(both.mean()), float(both.std(correction=0))


class TestStatistics:
    @pytest.mark.parametrize(
        "length",
        [
            {"max_epochs": 2},
            {"max_steps": 2},  # ends within an epoch, after which nothing is validated
            {"max_epochs": 3, "check_val_every_n_epoch": 2},  # nor after the third
            {"max_epochs": 1, "val_check_interval": 2},  # validated before the last step
        ],
        ids=str,
    )
    def test_store_score_statistics_changes_the_exported_config(
        self, language_model: str, trainer: MakeTrainer, tmp_path: Path, length: dict[str, Any]
    ) -> None:
        for wanted in (True, False):
            module = RewardModule(language_model, store_score_statistics=wanted, optimizer=sgd)
            trainer(**length).fit(module, loader(2), loader(2))
            assert module.training
            module.export_model(tmp_path / str(wanted))
        assert statistics(tmp_path / "False") is None
        trained = RewardModule(str(tmp_path / "True"))
        assert statistics(tmp_path / "True") == pytest.approx(measured(trained), rel=1e-4, abs=1e-6)

    def test_scores_by_them_have_mean_0_and_variance_1(
        self, language_model: str, trainer: MakeTrainer, tmp_path: Path
    ) -> None:
        module = RewardModule(language_model, store_score_statistics=True, optimizer=sgd)
        trainer(max_epochs=1, num_sanity_val_steps=1).fit(module, loader(2), loader(2))
        module.export_model(tmp_path)
        source = RewardModel(str(tmp_path), normalize=True)
        source.setup(load_tokenizer(str(tmp_path)))
        both = [
            source.score(ScoringBatch(side, torch.ones(5).bool(), [""] * 5, [""] * 5, [{}] * 5)).total
            for side in collate_pairs(PAIRS, pad_id=4)[:2]
        ]
        assert float(torch.cat(both).mean()) == pytest.approx(0, abs=1e-4)
        assert float(torch.cat(both).std(correction=0)) == pytest.approx(1, rel=1e-4)

    def test_checkpoints_carry_them(self, language_model: str, trainer: MakeTrainer, tmp_path: Path) -> None:
        module, run = RewardModule(language_model, store_score_statistics=True, optimizer=sgd), trainer(max_epochs=1)
        run.fit(module, loader(2), loader(2))
        run.save_checkpoint(tmp_path / "run.ckpt")
        export_checkpoint(tmp_path / "run.ckpt", tmp_path / "exported")
        loaded = RewardModule.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
        loaded.export_model(tmp_path / "loaded")
        found = statistics(tmp_path / "exported")
        assert found == pytest.approx(measured(module), rel=1e-4)
        assert statistics(tmp_path / "loaded") == found

    def test_a_resumed_run_measures_what_one_never_stopped_measures(
        self, language_model: str, trainer: MakeTrainer, tmp_path: Path
    ) -> None:
        found = []
        for cut in (True, False):
            seed_everything(1, verbose=False)
            module = RewardModule(language_model, store_score_statistics=True, optimizer=sgd)
            run = trainer(max_epochs=1 if cut else 2)
            run.fit(module, loader(2), loader(2))
            if cut:
                run.save_checkpoint(tmp_path / "cut.ckpt")
                module = RewardModule(language_model, store_score_statistics=True, optimizer=sgd)
                trainer(max_epochs=2).fit(module, loader(2), loader(2), ckpt_path=tmp_path / "cut.ckpt")
            module.export_model(tmp_path / str(cut))
            found.append(statistics(tmp_path / str(cut)))
        assert found[0] == found[1] is not None

    def test_those_of_other_weights_are_forgotten(
        self, save_model: SaveModel, trainer: MakeTrainer, tmp_path: Path
    ) -> None:
        start = save_model(tmp_path / "start", seed=1, scalar=True, score_mean=5.0, score_std=2.0)
        module = RewardModule(start, optimizer=sgd)
        trainer(max_steps=1).fit(module, loader())
        module.export_model(tmp_path / "trained")
        assert statistics(tmp_path / "trained") is None

    def test_validation_alone_changes_nothing(
        self, save_model: SaveModel, trainer: MakeTrainer, tmp_path: Path
    ) -> None:
        start = save_model(tmp_path / "start", seed=1, scalar=True, score_mean=5.0, score_std=2.0)
        module = RewardModule(start, store_score_statistics=True)
        trainer().validate(module, loader(2), verbose=False)
        module.export_model(tmp_path / "same")
        assert statistics(tmp_path / "same") == (5, 2)

    def test_without_validation_rows_they_are_refused_before_the_first_step(
        self, language_model: str, trainer: MakeTrainer
    ) -> None:
        data = PreferenceDataModule("builtin:demo/train", limit=4, max_length=96, max_prompt_length=48)
        run = trainer(max_steps=1)
        with pytest.raises(UserError, match=r"needs validation rows .* set data\.val_source or data\.val_size"):
            run.fit(RewardModule(language_model, store_score_statistics=True), datamodule=data)
        assert run.global_step == 0
        with pytest.raises(UserError, match="needs validation rows"):
            run.fit(RewardModule(language_model, store_score_statistics=True), loader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"center_coef": -0.1}, r"center_coef is -0\.1; it must be at least 0"),
        ({"center_coef": math.nan}, "center_coef is nan"),
        ({"head_std": -1.0}, r"head_std is -1\.0; it must be at least 0, or null"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RewardModule("builtin:demo", **settings)

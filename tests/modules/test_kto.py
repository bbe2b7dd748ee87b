"""KTO: the loss against transformers row by row, the reference point, what every option does, what is saved."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from rlhf_lightning.data.collate import LabelledBatch, LabelledExample, collate_labelled, collate_sequences
from rlhf_lightning.data.unpaired import UnpairedDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.export import export_checkpoint
from rlhf_lightning.modules.kto import KTOModule, mismatched_sequences

MakeTrainer = Callable[..., Trainer]
SaveModel = Callable[..., str]
Weights = Callable[[LightningModule], dict[str, Tensor]]

ROWS = [
    LabelledExample([5, 6, 7], [20, 21, 4], 1.0),
    LabelledExample([8], [24, 25, 26, 27, 4], 0.0),
    LabelledExample([9, 10], [28, 4], 0.0),
    LabelledExample([11, 12, 13, 14], [4], 1.0),
    LabelledExample([15, 16], [31, 32, 33, 4], 0.0),
]
#: The same prompts with the response of the next row.
MISMATCHED = [(ROWS[n].prompt_ids, ROWS[(n + 1) % 5].response_ids) for n in range(5)]


def loader(size: int, examples: list[LabelledExample] = ROWS) -> DataLoader[LabelledBatch]:
    parts = [examples[start : start + size] for start in range(0, len(examples), size)]
    return DataLoader([collate_labelled(part, pad_id=4) for part in parts], batch_size=None)  # type: ignore[arg-type]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


@torch.no_grad()
def logprob(folder: str, prompt: Any, response: Any) -> float:
    """Of one unpadded row, by transformers itself."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    logprobs = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
    return sum(logprobs[len(prompt) + place - 1, token].item() for place, token in enumerate(response))


@pytest.fixture(scope="session")
def other_model(save_model: SaveModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another language model of the same tokenizer."""
    return save_model(tmp_path_factory.mktemp("other_model"), seed=5)


@pytest.fixture(scope="session")
def ratios(language_model: str, other_model: str) -> tuple[list[float], list[float]]:
    """Log-ratios of the rows and of the mismatched rows, of the one model to the other."""
    rows = [(row.prompt_ids, row.response_ids) for row in ROWS]
    own, mismatched = (
        [logprob(language_model, *row) - logprob(other_model, *row) for row in part] for part in (rows, MISMATCHED)
    )
    return own, mismatched


def first_metrics(module: KTOModule, trainer: MakeTrainer, size: int = 5) -> dict[str, float]:
    run = trainer(max_steps=1)
    run.fit(module, loader(size))
    return {name: value.item() for name, value in run.callback_metrics.items()}


def expected_loss(ratios: tuple[list[float], list[float]], beta: float, good: float, bad: float, border: float) -> Any:
    """Return the mean of λ - v after eq. 8, and z₀, of all rows in one batch."""
    own, mismatched = ratios
    z = max(0.0, sum(mismatched) / 5)
    losses = []
    for row, r in zip(ROWS, own, strict=True):
        weight, sign = (good, 1) if row.label > border else (bad, -1)
        losses.append(weight - weight / (1 + math.exp(-sign * beta * (r - z))))
    return sum(losses) / 5, z


def test_before_the_first_step_the_loss_is_half(language_model: str, trainer: MakeTrainer) -> None:
    metrics = first_metrics(KTOModule(language_model, optimizer=sgd), trainer)
    assert metrics["train/loss"] == 0.5
    assert [metrics[f"train/{name}"] for name in ("kl", "reward_desirable", "reward_undesirable")] == [0, 0, 0]
    assert metrics["train/lr"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.4},
        {"desirable_weight": 2.0},
        {"undesirable_weight": 0.25},
        {"threshold": -1.0},
    ],
    ids=str,
)
def test_every_option_changes_the_loss_as_by_hand(
    language_model: str, other_model: str, trainer: MakeTrainer, ratios: Any, options: dict[str, float]
) -> None:
    names = ("beta", "desirable_weight", "undesirable_weight", "threshold")
    defaults = dict(zip(names, (0.1, 1.0, 1.0, 0.5), strict=True))
    expected, z = expected_loss(ratios, *(defaults | options).values())
    plain, _ = expected_loss(ratios, *defaults.values())
    assert bool(options) == (abs(expected - plain) > 1e-3)
    given: Any = {"optimizer": sgd, **options}
    metrics = first_metrics(KTOModule(language_model, other_model, **given), trainer)
    assert metrics["train/loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["train/kl"] == pytest.approx(z, rel=1e-4, abs=1e-6)


def test_rewards_and_logprobs_are_logged_by_label(
    language_model: str, other_model: str, trainer: MakeTrainer, ratios: Any
) -> None:
    metrics = first_metrics(KTOModule(language_model, other_model, beta=0.3, optimizer=sgd), trainer)
    own, logprobs = ratios[0], [logprob(language_model, row.prompt_ids, row.response_ids) for row in ROWS]
    good, bad = [0, 3], [1, 2, 4]
    for kind, rows in (("desirable", good), ("undesirable", bad)):
        reward = 0.3 * sum(own[row] for row in rows) / len(rows)
        assert metrics[f"train/reward_{kind}"] == pytest.approx(reward, rel=1e-4)
        mean = sum(logprobs[row] for row in rows) / len(rows)
        assert metrics[f"train/logprob_{kind}"] == pytest.approx(mean, rel=1e-4)


def test_the_reference_point_is_positive_where_the_policy_has_moved_away(
    language_model: str, other_model: str, trainer: MakeTrainer, ratios: Any
) -> None:
    """One of the two directions has a positive mean; the other is cut off at 0."""
    there = first_metrics(KTOModule(language_model, other_model, optimizer=sgd), trainer)["train/kl"]
    back = first_metrics(KTOModule(other_model, language_model, optimizer=sgd), trainer)["train/kl"]
    mean = sum(ratios[1]) / 5
    assert abs(mean) > 0.1
    assert (there, back) == pytest.approx((max(mean, 0), max(-mean, 0)), rel=1e-4)


def test_a_lone_row_has_no_mismatch(language_model: str, other_model: str, trainer: MakeTrainer) -> None:
    assert first_metrics(KTOModule(other_model, language_model, optimizer=sgd), trainer, size=1)["train/kl"] == 0
    assert mismatched_sequences(collate_sequences([([5], [6])], pad_id=0)) is None


def test_mismatched_rows_are_those_of_the_next_response() -> None:
    batch = collate_sequences([(row.prompt_ids, row.response_ids) for row in ROWS], pad_id=4)
    expected = collate_sequences(MISMATCHED, pad_id=0)
    found = mismatched_sequences(batch)
    assert found is not None
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_policy_alone_learns(language_model: str, trainer: MakeTrainer, precision: str) -> None:
    """Also under autocast, which keeps cast weights over passes with and without gradient."""
    module = KTOModule(language_model, optimizer=sgd)
    module.configure_model()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trainer(max_steps=1, precision=precision).fit(module, loader(5))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("reference."), name


def test_validation_is_of_the_whole_set(
    language_model: str, other_model: str, trainer: MakeTrainer, ratios: Any
) -> None:
    module = KTOModule(language_model, other_model)
    [metrics] = trainer().validate(module, loader(5), verbose=False)
    expected, z = expected_loss(ratios, 0.1, 1.0, 1.0, 0.5)
    own = ratios[0]
    rewards = 0.1 * (own[0] + own[3]) / 2, 0.1 * (own[1] + own[2] + own[4]) / 3
    found = [metrics[f"val/{name}"] for name in ("loss", "kl", "reward_desirable", "reward_undesirable", "margin")]
    assert found == pytest.approx([expected, z, *rewards, rewards[0] - rewards[1]], rel=1e-4, abs=1e-6)
    [uneven] = trainer().validate(module, loader(3), verbose=False)
    for name in ("reward_desirable", "reward_undesirable", "logprob_desirable", "logprob_undesirable"):
        assert uneven[f"val/{name}"] == pytest.approx(metrics[f"val/{name}"], rel=1e-5)
    assert trainer().test(module, loader(5), verbose=False) == [metrics]


def test_a_kind_that_does_not_come_is_not_logged(language_model: str, trainer: MakeTrainer) -> None:
    good = [ROWS[0], ROWS[3]]
    run = trainer(max_steps=1)
    run.fit(KTOModule(language_model, optimizer=sgd), loader(2, good), loader(2, good))
    logged = set(run.callback_metrics)
    assert {"train/reward_desirable", "val/reward_desirable"} <= logged
    assert not {"train/reward_undesirable", "val/reward_undesirable", "val/margin"} & logged


def test_a_kind_that_comes_no_more_is_not_a_number(language_model: str, trainer: MakeTrainer) -> None:
    """The mean of the batch before would be logged again."""
    run = trainer(max_steps=2)
    run.fit(KTOModule(language_model, optimizer=sgd), loader(2, [ROWS[0], ROWS[1], ROWS[0], ROWS[3]]))
    assert {row.label for row in (ROWS[0], ROWS[3])} == {1.0}
    assert ROWS[1].label == 0
    assert run.callback_metrics["train/reward_undesirable"].isnan()
    assert run.callback_metrics["train/reward_desirable"].isfinite()


@pytest.mark.parametrize(
    ("labels", "batch_size", "line"),
    [
        ([4, 5, 1], 2, r"all 3 labels lie above model.threshold 0.5, so all rows are good; .* Set model.threshold"),
        ([0, 0], 2, r"all 2 labels lie at or below model.threshold 0.5, so all rows are bad"),
        ([0, 1], 1, r"data.batch_size is 1; .* it must be at least 2"),
    ],
)
def test_data_that_teaches_nothing_is_refused(
    labels: list[int], batch_size: int, line: str, language_model: str, trainer: MakeTrainer, tmp_path: Path
) -> None:
    rows = [{"prompt": f"tea {label} {row}?", "response": "yes", "label": label} for row, label in enumerate(labels)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = UnpairedDataModule(str(tmp_path / "rows.jsonl"), batch_size=batch_size, max_length=64, max_prompt_length=48)
    with pytest.raises(UserError, match=line):
        trainer(max_steps=1).fit(KTOModule(language_model), datamodule=data)


def test_predict_gives_rewards_and_labels(
    language_model: str, other_model: str, trainer: MakeTrainer, ratios: Any
) -> None:
    predictions: Any = trainer().predict(KTOModule(language_model, other_model, beta=0.5), loader(2))
    rewards = torch.cat([part["reward"] for part in predictions]).tolist()
    assert rewards == pytest.approx([0.5 * r for r in ratios[0]], rel=1e-4)
    assert torch.cat([part["label"] for part in predictions]).tolist() == [1, 0, 0, 1, 0]


def test_it_learns_what_is_good(language_model: str, trainer: MakeTrainer) -> None:
    module = KTOModule(language_model, optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3))
    trainer(max_epochs=15).fit(module, loader(5))
    [metrics] = trainer().validate(module, loader(5), verbose=False)
    assert metrics["val/margin"] > 1
    assert metrics["val/loss"] < 0.4


def test_save_resume_and_export(language_model: str, trainer: MakeTrainer, weights: Weights, tmp_path: Path) -> None:
    """Split pairs of the demo; stopped within an epoch of 4 steps."""

    def make() -> tuple[KTOModule, UnpairedDataModule]:
        data = UnpairedDataModule("builtin:demo/train", limit=8, batch_size=4, max_length=96, max_prompt_length=48)
        return KTOModule(language_model, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3)), data

    whole, data = make()
    trainer(max_steps=6).fit(whole, datamodule=data)
    stopped, data = make()
    run = trainer(max_steps=3)
    run.fit(stopped, datamodule=data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    assert all(name.startswith("policy.") for name in torch.load(tmp_path / "run.ckpt")["state_dict"])
    resumed, data = make()
    run = trainer(max_steps=6)
    run.fit(resumed, datamodule=data, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())
    export_checkpoint(tmp_path / "end.ckpt", tmp_path / "model")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in whole.policy.state_dict().items())


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ({"beta": 0.0}, r"beta is 0.0; it must be above 0\."),
        ({"desirable_weight": -1.0}, r"desirable_weight is -1.0; it must be at least 0\."),
        ({"undesirable_weight": math.nan}, r"undesirable_weight is nan; it must be at least 0\."),
    ],
)
def test_wrong_settings_are_refused(language_model: str, setting: dict[str, float], line: str) -> None:
    with pytest.raises(UserError, match=line):
        KTOModule(language_model, **setting)  # type: ignore[arg-type]

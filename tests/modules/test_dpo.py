"""DPO: the loss against transformers row by row, what every option does, what is saved and exported."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from rlhf_lightning.algorithm.preference_losses import (
    HingeLoss,
    IPOLoss,
    Pairs,
    PreferenceLoss,
    RobustLoss,
    SigmoidLoss,
)
from rlhf_lightning.checkpoint_files import CHECKPOINT_KEY
from rlhf_lightning.data.collate import PairBatch, PairExample, collate_pairs
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.export import export_checkpoint
from rlhf_lightning.modules.dpo import DPOModule

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


def loader(size: int, examples: list[PairExample] = PAIRS) -> DataLoader[PairBatch]:
    """The rows in batches of ``size``, the last one shorter."""
    parts = [examples[start : start + size] for start in range(0, len(examples), size)]
    return DataLoader([collate_pairs(part, pad_id=4) for part in parts], batch_size=None)  # type: ignore[arg-type]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


@torch.no_grad()
def token_logprobs(folder: str | Path, prompt: Any, response: Any) -> list[float]:
    """Of one unpadded row, by transformers itself."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    logprobs = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
    return [logprobs[len(prompt) + place - 1, token].item() for place, token in enumerate(response)]


def logratios(policy: str, reference: str | None, pair: PairExample, alpha: float = 1.0) -> tuple[float, float]:
    """Of both sides, the tokens beyond the shorter side weighted by alpha."""
    prompt, *responses = pair
    shared = min(map(len, responses))

    def total(folder: str, response: Any) -> float:
        tokens = token_logprobs(folder, prompt, response)
        return sum(tokens[:shared]) + alpha * sum(tokens[shared:])

    chosen, rejected = (total(policy, r) - (total(reference, r) if reference else 0.0) for r in responses)
    return chosen, rejected


@pytest.fixture(scope="session")
def other_model(save_model: SaveModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another language model of the same tokenizer."""
    return save_model(tmp_path_factory.mktemp("other_model"), seed=5)


def first_metrics(module: DPOModule, trainer: MakeTrainer, **arguments: Any) -> dict[str, float]:
    run = trainer(max_steps=1, **arguments)
    run.fit(module, loader(5))
    return {name: value.item() for name, value in run.callback_metrics.items()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_before_the_first_step_nothing_is_preferred(language_model: str, trainer: MakeTrainer, precision: str) -> None:
    metrics = first_metrics(DPOModule(language_model, optimizer=sgd), trainer, precision=precision)
    assert metrics["train/loss"] == pytest.approx(math.log(2), rel=1e-7)
    for name in ("margin", "reward_chosen", "reward_rejected"):
        assert metrics[f"train/{name}"] == 0
    assert metrics["train/accuracy"] == 0.5  # ties count as half
    assert metrics["train/lr"] == pytest.approx(0.1)


def test_everything_logged_is_what_transformers_says(
    language_model: str, other_model: str, trainer: MakeTrainer
) -> None:
    module = DPOModule(language_model, reference=other_model, loss=SigmoidLoss(beta=0.3), optimizer=sgd)
    metrics = first_metrics(module, trainer)
    both = [logratios(language_model, other_model, pair) for pair in PAIRS]
    margins = [0.3 * (chosen - rejected) for chosen, rejected in both]
    right = sum(margin > 0 for margin in margins)
    assert 0 < right < 4
    expected = {
        "loss": sum(math.log1p(math.exp(-margin)) for margin in margins) / 5,
        "accuracy": (right + 0.5) / 5,
        "margin": sum(margins) / 5,
        "reward_chosen": sum(0.3 * chosen for chosen, _ in both) / 5,
        "reward_rejected": sum(0.3 * rejected for _, rejected in both) / 5,
        "logprob_chosen": sum(sum(token_logprobs(language_model, p, c)) for p, c, _ in PAIRS) / 5,
        "logprob_rejected": sum(sum(token_logprobs(language_model, p, r)) for p, _, r in PAIRS) / 5,
    }
    assert {name: metrics[f"train/{name}"] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_validation_is_over_all_pairs_whatever_the_batches(
    language_model: str, other_model: str, trainer: MakeTrainer, size: int
) -> None:
    module = DPOModule(language_model, reference=other_model)
    [metrics] = trainer().validate(module, loader(size), verbose=False)
    both = [logratios(language_model, other_model, pair) for pair in PAIRS]
    margins = [0.1 * (chosen - rejected) for chosen, rejected in both]
    expected = {
        "loss": sum(math.log1p(math.exp(-margin)) for margin in margins) / 5,
        "accuracy": (sum(margin > 0 for margin in margins) + 0.5) / 5,
        "ties": 0.2,
        "margin_mean": sum(margins) / 5,
        "margin_median": sorted(margins)[2],
        "reward_chosen": sum(0.1 * chosen for chosen, _ in both) / 5,
        "reward_rejected": sum(0.1 * rejected for _, rejected in both) / 5,
        "logprob_rejected": sum(sum(token_logprobs(language_model, p, r)) for p, _, r in PAIRS) / 5,
    }
    assert {name: metrics[f"val/{name}"] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_every_validation_starts_from_nothing(language_model: str, other_model: str, trainer: MakeTrainer) -> None:
    module = DPOModule(language_model, reference=other_model)
    first = trainer().validate(module, loader(2), verbose=False)
    trainer().validate(module, loader(2, PAIRS[:2]), verbose=False)
    assert trainer().test(module, loader(2), verbose=False) == first


def test_predict_gives_both_rewards(
    language_model: str, other_model: str, trainer: MakeTrainer, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    module = DPOModule(language_model, reference=other_model, loss=SigmoidLoss(beta=0.5))
    predictions: Any = trainer().predict(module, loader(2))
    for side, place in (("chosen", 0), ("rejected", 1)):
        rewards = torch.cat([part[f"{side}_reward"] for part in predictions]).tolist()
        expected = [0.5 * logratios(language_model, other_model, pair)[place] for pair in PAIRS]
        assert rewards == pytest.approx(expected, rel=1e-4, abs=1e-5)
        texts = [text for part in predictions for text in part[side]]
        assert texts == [demo_tokenizer.decode(list(pair[1 + place])) for pair in PAIRS]


@pytest.mark.parametrize(
    "loss", [SigmoidLoss(0.3, label_smoothing=0.2), RobustLoss(0.3), IPOLoss(0.3), IPOLoss(0.3, True), HingeLoss(0.3)]
)
def test_loss_changes_what_is_minimised(
    language_model: str, other_model: str, trainer: MakeTrainer, loss: PreferenceLoss
) -> None:
    module = DPOModule(language_model, reference=other_model, loss=loss, optimizer=sgd)
    both = torch.tensor([logratios(language_model, other_model, pair) for pair in PAIRS])
    lengths = torch.tensor([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in PAIRS])
    expected = loss.loss(Pairs(both[:, 0], both[:, 1], lengths[:, 0], lengths[:, 1])).mean()
    plain = first_metrics(DPOModule(language_model, reference=other_model, optimizer=sgd), trainer)
    found = first_metrics(module, trainer)["train/loss"]
    assert found == pytest.approx(expected.item(), rel=1e-4)
    assert abs(found - plain["train/loss"]) > 1e-3


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_ld_alpha_changes_the_weight_of_the_longer_response(
    language_model: str, other_model: str, trainer: MakeTrainer, alpha: float
) -> None:
    results = []
    for given in (alpha, 1.0):
        module = DPOModule(language_model, reference=other_model, ld_alpha=given, optimizer=sgd)
        results.append(first_metrics(module, trainer)["train/margin"])
        both = [logratios(language_model, other_model, pair, given) for pair in PAIRS]
        assert results[-1] == pytest.approx(sum(0.1 * (c - r) for c, r in both) / 5, rel=1e-4)
    assert abs(results[0] - results[1]) > 1e-3


def test_reference_free_changes_the_log_ratio_to_the_log_probability(language_model: str, trainer: MakeTrainer) -> None:
    module = DPOModule(language_model, reference_free=True, optimizer=sgd)
    metrics = first_metrics(module, trainer)
    both = [logratios(language_model, None, pair) for pair in PAIRS]
    assert metrics["train/margin"] == pytest.approx(sum(0.1 * (c - r) for c, r in both) / 5, rel=1e-4)
    assert abs(metrics["train/margin"]) > 1e-3
    assert not hasattr(module, "reference")


def test_the_gradient_is_that_of_finite_differences(language_model: str, other_model: str) -> None:
    """Along a random direction of the weights, in float64."""
    module = DPOModule(language_model, reference=other_model, loss=SigmoidLoss(beta=0.3), ld_alpha=0.5)
    module.configure_model()
    module.double()
    batch = collate_pairs(PAIRS, pad_id=4)
    module.evaluate(batch).losses.mean().backward()
    generator = torch.Generator().manual_seed(0)
    parameters = list(module.policy.parameters())
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum((p.grad * d).sum().item() for p, d in zip(parameters, direction, strict=True) if p.grad is not None)
    values = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            for parameter, way in zip(parameters, direction, strict=True):
                parameter += step * way
            values.append(module.evaluate(batch).losses.mean().item())
    # The loss itself is float32 by rule, hence the wide steps; the second difference bounds their error.
    assert abs(slope) > 0.1
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(slope, rel=2e-3)


def test_a_minibatch_in_two_cuts_gives_the_same_step(
    language_model: str, other_model: str, trainer: MakeTrainer, weights: Weights
) -> None:
    results = []
    for size, accumulated in ((4, 1), (2, 2), (1, 4)):
        module = DPOModule(language_model, reference=other_model, optimizer=sgd)
        run = trainer(max_steps=1, accumulate_grad_batches=accumulated)
        run.fit(module, loader(size, PAIRS[:4]))
        results.append(weights(module))
    for name, tensor in results[0].items():
        for other in results[1:]:
            torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)


def test_only_the_policy_learns_and_the_trainer_clips(language_model: str, trainer: MakeTrainer) -> None:
    moved = []
    for clip in (None, 1e-3):
        module = DPOModule(language_model, optimizer=sgd)
        module.configure_model()
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        trainer(max_steps=1, gradient_clip_val=clip).fit(module, loader(5))
        differences = {name: (tensor - before[name]).norm() for name, tensor in module.state_dict().items()}
        assert all(value == 0 for name, value in differences.items() if name.startswith("reference."))
        moved.append(torch.stack(list(differences.values())).norm().item())
    assert moved[1] == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert moved[0] > 10 * moved[1]


def test_it_learns_the_preferences(language_model: str, trainer: MakeTrainer) -> None:
    pairs = [PAIRS[number] for number in (0, 1, 3, 4)]
    module = DPOModule(language_model, optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3))
    run = trainer(max_epochs=15)
    run.fit(module, loader(4, pairs))
    [metrics] = trainer().validate(module, loader(5), verbose=False)
    assert metrics["val/accuracy"] == pytest.approx(0.9)  # all but the tie
    assert metrics["val/margin_q25"] > 1
    assert metrics["val/reward_chosen"] > metrics["val/reward_rejected"]


def data(**arguments: Any) -> PreferenceDataModule:
    sizes = {"limit": 10, "val_size": 2, "batch_size": 2, "max_length": 96, "max_prompt_length": 48}
    return PreferenceDataModule("builtin:demo/train", **{**sizes, **arguments})


def test_a_resumed_run_equals_one_never_stopped(
    language_model: str, trainer: MakeTrainer, weights: Weights, tmp_path: Path
) -> None:
    """Stopped within an epoch of 4 steps."""

    def make() -> tuple[DPOModule, PreferenceDataModule]:
        return DPOModule(language_model, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3)), data()

    whole, rows = make()
    trainer(max_steps=6).fit(whole, datamodule=rows)
    stopped, rows = make()
    run = trainer(max_steps=3)
    run.fit(stopped, datamodule=rows)
    run.save_checkpoint(tmp_path / "run.ckpt")
    resumed, rows = make()
    trainer(max_steps=6).fit(resumed, datamodule=rows, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert not all(torch.equal(tensor, weights(stopped)[name]) for name, tensor in weights(whole).items())
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())


def test_the_reference_stays_out_of_checkpoints(
    language_model: str, other_model: str, trainer: MakeTrainer, tmp_path: Path
) -> None:
    module, run = DPOModule(language_model, ld_alpha=0.5, optimizer=sgd), trainer(max_steps=1)
    run.fit(module, loader(5))
    run.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert all(name.startswith("policy.") for name in saved["state_dict"])
    assert list(saved[CHECKPOINT_KEY]["frozen"]) == ["reference"]
    loaded = DPOModule.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert loaded.ld_alpha == 0.5
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in module.state_dict().items())
    other = DPOModule(language_model, reference=other_model, optimizer=sgd)
    with pytest.raises(UserError, match="the reference is not the one that the checkpoint was trained with"):
        trainer(max_steps=2).fit(other, loader(5), ckpt_path=tmp_path / "run.ckpt", weights_only=True)


def test_the_policy_is_exported(language_model: str, trainer: MakeTrainer, tmp_path: Path) -> None:
    module, run = DPOModule(language_model, optimizer=sgd), trainer(max_steps=2)
    run.fit(module, loader(3))
    run.save_checkpoint(tmp_path / "run.ckpt")
    module.export_model(tmp_path / "model")
    export_checkpoint(tmp_path / "run.ckpt", tmp_path / "from_checkpoint")
    start = AutoModelForCausalLM.from_pretrained(language_model).state_dict()
    for folder in ("model", "from_checkpoint"):
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict()
        assert all(torch.equal(tensor, exported[name]) for name, tensor in module.policy.state_dict().items())
        assert not all(torch.equal(tensor, exported[name]) for name, tensor in start.items())


def test_wrong_settings_are_refused(language_model: str) -> None:
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(UserError, match=r"ld_alpha is .*; it must lie in \[0, 1\] \(1 is off\)"):
            DPOModule(language_model, ld_alpha=alpha)
    with pytest.raises(UserError, match="reference is 'other', but reference_free is true; leave one of them out"):
        DPOModule(language_model, reference="other", reference_free=True)


def test_a_reference_that_cannot_read_the_data_is_refused_before_weights_are_loaded(
    language_model: str,
    demo_tokenizer: PreTrainedTokenizerBase,
    save_model: SaveModel,
    trainer: MakeTrainer,
    tmp_path: Path,
) -> None:
    short = save_model(tmp_path / "short", max_position_embeddings=8, seed=0)
    module = DPOModule(language_model, reference=short)
    with pytest.raises(UserError, match=rf"model.reference {short!r} reads at most 8; lower data.max_length"):
        trainer(max_steps=1).fit(module, datamodule=data())
    assert not hasattr(module, "policy")
    foreign = save_model(tmp_path / "foreign", seed=0)
    demo_tokenizer.train_new_from_iterator(["I like tea."], vocab_size=300).save_pretrained(foreign)
    with pytest.raises(UserError, match=r"model.reference .* has another tokenizer than the policy \(such as for"):
        trainer(max_steps=1).fit(DPOModule(language_model, reference=foreign), datamodule=data())

"""Supervised fine-tuning: its loss by hand, what it learns and what it does not."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from rlhf_lightning.data.collate import collate_sequences
from rlhf_lightning.data.text import DemonstrationDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.models.loading import load_tokenizer
from rlhf_lightning.modules.sft import SFTModule

MakeTrainer = Callable[..., Trainer]
Weights = Callable[[LightningModule], dict[str, Tensor]]

# Prompts and responses of unequal lengths; 4 is the stop token and, as padding, must not count beyond a row's end.
ROWS = [([5, 6, 7], [20, 21, 4]), ([8, 9], [22, 4]), ([30], [31, 32, 33, 34, 4]), ([40, 41, 42, 43], [4]), ([50], [4])]


def batches(size: int) -> list[SequenceBatch]:
    return [collate_sequences(ROWS[start : start + size], pad_id=4) for start in range(0, len(ROWS), size)]


def loader(size: int, most: int | None = None) -> DataLoader[SequenceBatch]:
    """The rows in batches of ``size``, the last one shorter; the first ``most`` batches."""
    return DataLoader(batches(size)[:most], batch_size=None)  # type: ignore[arg-type]


@torch.no_grad()
def token_logprobs(folder: str, prompt: list[int], response: list[int]) -> list[float]:
    """Of each response token, one row at a time, without padding, by the definition."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    probabilities = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    return [math.log(probabilities[len(prompt) - 1 + number, token].item()) for number, token in enumerate(response)]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def test_the_loss_is_the_mean_over_response_tokens(language_model: str, trainer: MakeTrainer) -> None:
    run = trainer(max_steps=1)
    run.fit(SFTModule(language_model, optimizer=sgd), loader(3, most=1))
    logprobs = [value for row in ROWS[:3] for value in token_logprobs(language_model, *row)]
    assert len(logprobs) == 10
    assert run.callback_metrics["train/loss"].item() == pytest.approx(-sum(logprobs) / 10, rel=1e-5)
    assert run.callback_metrics["train/lr"].item() == pytest.approx(0.1)


def test_the_step_follows_the_gradient_of_that_loss(
    language_model: str, trainer: MakeTrainer, weights: Weights
) -> None:
    module = SFTModule(language_model, optimizer=sgd)
    trainer(max_steps=1).fit(module, loader(3, most=1))
    model = AutoModelForCausalLM.from_pretrained(language_model)
    total: Any = 0.0
    for prompt, response in ROWS[:3]:
        logprobs = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(dim=-1)
        for number, token in enumerate(response):
            total = total - logprobs[len(prompt) - 1 + number, token] / 10
    total.backward()
    for name, parameter in model.named_parameters():
        expected = parameter.detach() - 0.1 * parameter.grad
        torch.testing.assert_close(module.policy.get_parameter(name).detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_validation_is_over_all_tokens_whatever_the_batches(
    language_model: str, trainer: MakeTrainer, size: int
) -> None:
    [metrics] = trainer().validate(SFTModule(language_model), loader(size), verbose=False)
    logprobs = [value for row in ROWS for value in token_logprobs(language_model, *row)]
    assert len(logprobs) == 12
    assert metrics["val/loss"] == pytest.approx(-sum(logprobs) / 12, rel=1e-5)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(-sum(logprobs) / 12), rel=1e-5)


def test_test_reports_the_same_as_validate(language_model: str, trainer: MakeTrainer) -> None:
    module = SFTModule(language_model)
    assert trainer().test(module, loader(2), verbose=False) == trainer().validate(module, loader(2), verbose=False)


def test_predict_gives_the_mean_logprob_of_each_response(language_model: str, trainer: MakeTrainer) -> None:
    predictions: Any = trainer().predict(SFTModule(language_model), loader(2))
    expected = [sum(values) / len(values) for values in (token_logprobs(language_model, *row) for row in ROWS)]
    assert torch.cat([part["logprob"] for part in predictions]).tolist() == pytest.approx(expected, rel=1e-5)
    tokenizer = load_tokenizer(language_model)
    for name, place in (("prompt", 0), ("response", 1)):
        assert [text for part in predictions for text in part[name]] == [tokenizer.decode(row[place]) for row in ROWS]


def test_it_learns_the_responses(language_model: str, trainer: MakeTrainer) -> None:
    module = SFTModule(language_model, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
    before = trainer().validate(module, loader(5), verbose=False)[0]["val/loss"]
    trainer(max_epochs=30).fit(module, loader(5))
    assert before > 5
    assert trainer().validate(module, loader(5), verbose=False)[0]["val/loss"] < 0.1


@pytest.fixture
def data(tmp_path: Path) -> Callable[[], DemonstrationDataModule]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "what is {n}", "response": "it is a {n}"}}\n' for n in range(10)))
    return lambda: DemonstrationDataModule(str(path), val_size=2, batch_size=4, max_length=64, max_prompt_length=32)


@pytest.mark.parametrize("pretrained", [True, False])
def test_the_same_seed_gives_the_same_bits(
    language_model: str,
    trainer: MakeTrainer,
    weights: Weights,
    data: Callable[[], DemonstrationDataModule],
    pretrained: bool,
) -> None:
    results = []
    for seed in (1, 1, 2):
        seed_everything(seed, verbose=False)
        module = SFTModule(language_model, pretrained=pretrained)
        trainer(max_epochs=2).fit(module, datamodule=data())
        results.append(weights(module))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    assert not torch.equal(results[0]["policy.lm_head.weight"], results[2]["policy.lm_head.weight"])


def test_config_overrides_shape_the_model(language_model: str) -> None:
    module = SFTModule(language_model, pretrained=False, config_overrides={"num_hidden_layers": 1})
    module.configure_model()
    assert len(module.policy.model.layers) == 1
    module = SFTModule(language_model, config_overrides={"num_hidden_layers": 1})
    with pytest.raises(UserError, match="pretrained: false"):
        module.configure_model()


def test_weights_are_made_once(language_model: str) -> None:
    module = SFTModule(language_model, pretrained=False)
    module.configure_model()
    first = module.policy
    module.configure_model()
    assert module.policy is first


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_masters_are_float32(language_model: str, trainer: MakeTrainer, precision: str) -> None:
    module = SFTModule(language_model)
    trainer(max_steps=1, precision=precision).fit(module, loader(5))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}

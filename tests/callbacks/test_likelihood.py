"""The likelihood that a run logs is that of its model, and logging it changes nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from rlhf_lightning import DemonstrationDataModule, RewardModule, SFTModule
from rlhf_lightning.callbacks import EvaluateLikelihood
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.answer_sets import LikelihoodSet
from rlhf_lightning.evaluation.likelihood import evaluate_likelihood
from rlhf_lightning.loggers import JSONLLogger, read_metrics

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 2, "head_dim": 8}
SETS = {
    "good": LikelihoodSet("builtin:demo/eval", limit=5, max_length=128, max_prompt_length=64),
    "bad": LikelihoodSet("builtin:demo/eval", limit=5, max_length=128, max_prompt_length=64, answer="rejected"),
}


def module() -> SFTModule:
    torch.manual_seed(0)
    return SFTModule(
        "builtin:demo",
        pretrained=False,
        config_overrides=TINY,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
    )


def fit(folder: Path, steps: int, *callbacks: pl.Callback, ckpt_path: str | None = None) -> SFTModule:
    """Train so many steps, validate after every second one, and leave a checkpoint."""
    pl.seed_everything(3, verbose=False)
    trained = module()
    trainer = pl.Trainer(
        max_steps=steps,
        val_check_interval=2,
        limit_val_batches=1,
        accelerator="cpu",
        default_root_dir=folder,
        logger=JSONLLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks],
    )
    sizes: dict[str, Any] = {"limit": 40, "batch_size": 4, "max_length": 128, "max_prompt_length": 64}
    data = DemonstrationDataModule("builtin:demo/train", "builtin:demo/eval", **sizes)
    trainer.fit(trained, data, ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(folder / "end.ckpt")
    return trained


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [(row["step"], row[f"val/{name}"]) for row in rows if f"val/{name}" in row]


def test_it_logs_what_is_measured_of_the_model(tmp_path: Path) -> None:
    trained = fit(tmp_path, 2, EvaluateLikelihood(SETS, batch_size=2))
    found = evaluate_likelihood(trained.exported_model.eval(), trained.tokenizer, SETS)
    for name, summary in found.items():
        ((_, logprob),) = logged(tmp_path, f"logprob_{name}")  # not after the sanity check
        ((_, perplexity),) = logged(tmp_path, f"perplexity_{name}")
        assert logprob == pytest.approx(summary.per_answer.mean, rel=1e-5)
        assert perplexity == pytest.approx(summary.perplexity.mean, rel=1e-5)
    assert found["good"].per_answer.mean != found["bad"].per_answer.mean


def test_a_run_taken_up_measures_and_ends_as_one_never_stopped(tmp_path: Path) -> None:
    def values(run: str) -> list[float]:
        return [value for _, value in logged(tmp_path / run, "logprob_good")]

    whole = fit(tmp_path / "whole", 8, EvaluateLikelihood(SETS, every_n=2))
    assert [step for step, _ in logged(tmp_path / "whole", "logprob_good")] == [1, 5]  # validations 1 and 3 of 4
    fit(tmp_path / "cut", 2, EvaluateLikelihood(SETS, every_n=2))
    resumed = fit(
        tmp_path / "cut", 8, EvaluateLikelihood(SETS, every_n=2), ckpt_path=str(tmp_path / "cut" / "end.ckpt")
    )
    assert values("cut") == values("whole")
    without = fit(tmp_path / "without", 8)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name))
        assert torch.equal(parameter, without.get_parameter(name))


def test_the_seed_draws_the_rows(tmp_path: Path) -> None:
    values = []
    for seed in (0, 1):
        fit(tmp_path / str(seed), 2, EvaluateLikelihood(SETS, seed=seed))
        values.append(logged(tmp_path / str(seed), "logprob_good"))
    assert values[0] != values[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EvaluateLikelihood({}), "sets is empty"),
        (lambda: EvaluateLikelihood(SETS, every_n=0), "every_n is 0 and batch_size 32"),
        (lambda: EvaluateLikelihood(SETS, batch_size=0), "every_n is 1 and batch_size 0"),
        (lambda: EvaluateLikelihood({"a b": SETS["good"]}), "'a b' cannot be part of a log key"),
    ],
)
def test_wrong_arguments_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_what_cannot_be_measured_is_refused_before_training(tmp_path: Path) -> None:
    missing = EvaluateLikelihood({"x": LikelihoodSet("none.jsonl")})
    with pytest.raises(UserError, match=r"EvaluateLikelihood.sets.x: data file 'none.jsonl' does not exist"):
        fit(tmp_path, 1, missing)
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "' + "tea " * 400 + '"}')
    with pytest.raises(UserError, match="sequences of 400 tokens, but the model reads at most 256"):
        fit(tmp_path, 1, EvaluateLikelihood({"x": LikelihoodSet(str(path), max_length=400)}))
    with pytest.raises(UserError, match="RewardModule trains no language model"):
        EvaluateLikelihood(SETS).setup(pl.Trainer(logger=False), RewardModule("builtin:demo"), "fit")

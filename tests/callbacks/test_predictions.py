"""The file that ``predict`` writes, by the real command line on tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from rlhf_lightning.__main__ import main
from rlhf_lightning.callbacks import PredictionFile
from rlhf_lightning.callbacks.predictions import prediction_rows
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_causal_lm, load_sequence_classifier, load_tokenizer

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LENGTHS = ["--data.max_length=48", "--data.max_prompt_length=24", "--data.batch_size=4"]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--run_dir=run"]
SFT = ["--model=SFTModule", "--model.model=policy", "--data=DemonstrationDataModule", "--data.source=pairs.jsonl"]
REWARD = ["--model=RewardModule", "--model.model=scorer", "--data=PreferenceDataModule", "--data.source=pairs.jsonl"]
PPO = ["--model=PPOModule", "--model.policy=policy", "--model.reward=FunctionReward", "--model.minibatch_size=2"]
PPO += ["--model.reward.function=rewards.py:lengths", "--model.sampling.max_new_tokens=5", "--data=PromptDataModule"]
PPO += ["--data.source=pairs.jsonl", "--data.rollout_batch_size=4", "--data.max_prompt_length=24"]
ROWS = [{"prompt": f"Do you like {n}?", "chosen": f"I like {n}.", "rejected": "No."} for n in range(7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, a reward model, data and a reward function."""
    folder = tmp_path_factory.mktemp("inputs")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        overrides = {**TINY, "num_key_value_heads": 2, "initializer_range": 0.3}
        load_causal_lm("builtin:demo", pretrained=False, config_overrides=overrides).save_pretrained(folder / "policy")
        load_sequence_classifier(str(folder / "policy"), new_head=True).save_pretrained(folder / "scorer")
    for name in ("policy", "scorer"):
        load_tokenizer("builtin:demo").save_pretrained(folder / name)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "rewards.py").write_text(
        "def lengths(prompts, responses, **c): return [float(len(r)) for r in responses]"
    )
    return folder


@pytest.fixture(autouse=True)
def _run_beside_the_inputs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


def written(name: str = "predictions.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("run", name).read_text().splitlines()]


def predict(*arguments: str) -> list[dict[str, Any]]:
    assert main(["predict", *arguments, *QUIET]) == 0
    return written()


def test_ppo_writes_what_was_answered_and_its_score(capsys: pytest.CaptureFixture[str]) -> None:
    rows = predict(*PPO)
    assert [row["prompt"][0]["content"] for row in rows] == [row["prompt"] for row in ROWS]  # of two batches
    assert [row["score"] for row in rows] == [len(row["response"]) for row in rows]
    assert {tuple(row) for row in rows} == {("prompt", "response", "score", "kl", "length", "finished")}
    assert len({row["response"] for row in rows}) > 1
    assert capsys.readouterr().err.splitlines()[-1] == "7 predictions written to run/predictions.jsonl"


def test_a_reward_model_writes_both_scores() -> None:
    rows = predict(*REWARD, *LENGTHS)
    assert [row["chosen"] for row in rows] == [f"I like {n}.<|im_end|>" for n in range(7)]
    # A pair by itself has the same scores: those of its own row, not of a neighbour's.
    Path("one.jsonl").write_text(json.dumps(ROWS[5]))
    one = predict(*REWARD, *LENGTHS, "--data.source=one.jsonl")
    assert [row["chosen_score"] for row in one] == pytest.approx([rows[5]["chosen_score"]], abs=1e-6)
    assert [row["rejected_score"] for row in one] == pytest.approx([rows[5]["rejected_score"]], abs=1e-6)
    assert len({row["chosen_score"] for row in rows}) == 7


def test_sft_writes_the_mean_logprob_of_each_response() -> None:
    rows = predict(*SFT, *LENGTHS)
    assert [row["response"] for row in rows] == [f"I like {n}.<|im_end|>" for n in range(7)]
    tokenizer, model = load_tokenizer("policy"), load_causal_lm("policy")
    for row in rows:
        prompt, response = (tokenizer(row[side], add_special_tokens=False).input_ids for side in ("prompt", "response"))
        ids = torch.tensor([[*prompt, *response]])
        logprobs = model(ids).logits[0, :-1].log_softmax(dim=-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        assert row["logprob"] == pytest.approx(logprobs.mean().item(), abs=1e-5)


def test_earlier_predictions_in_the_same_folder_are_kept() -> None:
    first = predict(*SFT, *LENGTHS)
    assert len(predict(*SFT, *LENGTHS, "--data.limit=2")) == 2
    assert written("predictions.1.jsonl") == first
    assert [path.name for path in Path("run").iterdir() if path.name.startswith(".")] == []


def test_a_dry_run_writes_none() -> None:
    assert main(["predict", *SFT, *LENGTHS, *QUIET, "--trainer.fast_dev_run=true"]) == 0
    assert not Path("run").exists()


@pytest.mark.slow
def test_two_processes_write_one_file_in_the_order_of_the_data() -> None:
    alone = predict(*SFT, *LENGTHS)
    more = ["--trainer.devices=2", "--trainer.strategy=ddp", "--run_dir=run"]
    command = [sys.executable, "-m", "rlhf_lightning", "predict", *SFT, *LENGTHS, *QUIET, *more]
    subprocess.run(command, check=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    together = written()
    assert written("predictions.1.jsonl") == alone
    for name in ("prompt", "response"):
        assert [row[name] for row in together] == [row[name] for row in alone]
    assert [row["logprob"] for row in together] == pytest.approx([row["logprob"] for row in alone], abs=1e-5)
    assert [path.name for path in Path("run").iterdir() if path.name.startswith(".")] == []


class Echo(pl.LightningModule):
    """Predicts its batch, in the form that it is told."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.form = form

    def predict_step(self, batch: torch.Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if self.form == "fail" and batch_idx == 1:
            raise RuntimeError("a bug")
        return {"x": batch, "loader": [dataloader_idx] * len(batch)}


def run_echo(form: str, *sizes: int) -> None:
    loaders: list[Any] = [DataLoader(torch.arange(size), batch_size=2) for size in sizes]  # type: ignore[arg-type]
    callback = PredictionFile("sub/out.jsonl")
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[callback], default_root_dir="run"
    )
    trainer.predict(Echo(form), loaders, return_predictions=False)


def test_a_module_of_the_users_own_with_two_dataloaders() -> None:
    run_echo("", 3, 2)
    expected = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    assert [(row["x"], row["loader"]) for row in written("sub/out.jsonl")] == expected


def test_what_fails_leaves_no_file() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        run_echo("fail", 4)
    assert list(Path("run/sub").iterdir()) == []


@pytest.mark.parametrize(
    ("prediction", "rows"),
    [
        (None, []),
        ([{"a": 1}, {"b": torch.tensor([1, 2])}], [{"a": 1}, {"b": torch.tensor([1, 2])}]),
        ({"a": torch.tensor([[1, 2], [3, 4]]), "b": ["x", "y"]}, [{"a": [1, 2], "b": "x"}, {"a": [3, 4], "b": "y"}]),
        ({"mean": torch.tensor(0.5), "name": "x"}, [{"mean": torch.tensor(0.5), "name": "x"}]),
        (torch.tensor(0.5), [{"prediction": torch.tensor(0.5)}]),
        ("word", [{"prediction": "word"}]),
        (["p", "q"], [{"prediction": "p"}, {"prediction": "q"}]),
    ],
)
def test_rows_of_what_a_module_may_return(prediction: Any, rows: list[dict[str, Any]]) -> None:
    assert str(prediction_rows(prediction)) == str(rows)


def test_columns_of_unequal_lengths_are_refused() -> None:
    with pytest.raises(UserError, match=r"unequal lengths: \{'a': 2, 'b': 1\}"):
        prediction_rows({"a": torch.zeros(2), "b": ["x"]})

"""Reward models that TRL trained, and ours in TRL; run where TRL is installed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from rlhf_lightning.data.chat import ConversationEncoder
from rlhf_lightning.data.collate import collate_sequences
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.rollout.reward_model import RewardModel

from .conftest import TURNS, classifier, policys_batch, scores_by_transformers, write

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets")
MakeTokenizer = Callable[..., PreTrainedTokenizerBase]
REJECTED = ["As an AI, I do not hike.", "Because!", "As an AI, I have no weekends, but I can tell you about others'."]


def chats() -> Any:
    """Return pairs in TRL's conversational form."""
    return datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            for (prompt, chosen), rejected in zip(TURNS, REJECTED, strict=True)
        ]
    )


def texts(eos: str) -> Any:
    """Return pairs of plain text, which TRL ends with the end of text."""
    return datasets.Dataset.from_list(
        [
            {"prompt": prompt, "chosen": chosen + eos, "rejected": rejected + eos}
            for (prompt, chosen), rejected in zip(TURNS, REJECTED, strict=True)
        ]
    )


def trainer(model: Any, tokenizer: PreTrainedTokenizerBase, data: Any, folder: Path, **settings: Any) -> Any:
    """Return TRL's RewardTrainer on the processor."""
    plain = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
    arguments = trl.RewardConfig(
        output_dir=str(folder), per_device_train_batch_size=3, per_device_eval_batch_size=3, **plain, **settings
    )
    return trl.RewardTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )


@pytest.mark.parametrize("pad", ["<|pad|>", "<|im_end|>"])
@pytest.mark.parametrize("chat", [True, False])
def test_what_trl_trained_scores_alike_in_ours(
    make_tokenizer: MakeTokenizer, tmp_path: Path, pad: str, chat: bool
) -> None:
    tokenizer = make_tokenizer(pad_token=pad)
    data = chats() if chat else texts(tokenizer.eos_token)
    training = trainer(classifier(tokenizer), tokenizer, data, tmp_path / "trl", max_steps=3, learning_rate=1e-2)
    training.train()
    training.save_model(str(tmp_path / "trl"))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "trl").eval()
    own = AutoTokenizer.from_pretrained(tmp_path / "trl")
    source = RewardModel(str(tmp_path / "trl"))
    source.setup(make_tokenizer(pad_token=pad))
    ours = source.score(policys_batch(source.tokenizer, chat=chat)).total.tolist()
    for side in ("left", "right"):
        expected = scores_by_transformers(theirs, own, side=side, chat=chat)
        assert ours == pytest.approx(expected, abs=1e-5)
    mean = torch.cat([torch.tensor(ours), _rejected_scores(source, chat)]).mean().item()
    assert training.evaluate()["eval_mean_reward"] == pytest.approx(mean, abs=1e-5)  # as trained, by TRL's own account


def _rejected_scores(source: RewardModel, chat: bool) -> torch.Tensor:
    batch, encoder = policys_batch(source.tokenizer, chat=chat), ConversationEncoder(source.tokenizer, chat=chat)
    rows = [encoder.encode(prompt, answer) for prompt, answer in zip(batch.prompts, REJECTED, strict=True)]
    return source.score(
        batch._replace(sequences=collate_sequences(rows, pad_id=encoder.pad_id), responses=REJECTED)
    ).total


@pytest.mark.parametrize("pad", ["<|pad|>", "<|im_end|>"])
@pytest.mark.parametrize("rows", ["ids", "chats"])
def test_trl_evaluates_ours_as_we_do(make_tokenizer: MakeTokenizer, tmp_path: Path, pad: str, rows: str) -> None:
    tokenizer = make_tokenizer(pad_token=pad)
    RewardModule(write(tmp_path / "start", classifier(tokenizer), tokenizer)).export_model(tmp_path / "ours")
    source = RewardModel(str(tmp_path / "ours"))
    source.setup(tokenizer)
    chosen, rejected = source.score(policys_batch(tokenizer)).total, _rejected_scores(source, chat=True)
    encoder = ConversationEncoder(tokenizer)

    def ids(answers: list[str]) -> list[list[int]]:
        encoded = [encoder.encode(prompt, answer) for (prompt, _), answer in zip(TURNS, answers, strict=True)]
        return [prompt + response for prompt, response in encoded]

    columns = {"chosen_ids": ids([turn[1] for turn in TURNS]), "rejected_ids": ids(REJECTED)}
    data = chats() if rows == "chats" else datasets.Dataset.from_dict(columns)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    found = trainer(theirs, AutoTokenizer.from_pretrained(tmp_path / "ours"), data, tmp_path / "trl").evaluate()
    assert found["eval_mean_reward"] == pytest.approx(torch.cat([chosen, rejected]).mean().item(), abs=1e-5)
    assert found["eval_margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    assert found["eval_accuracy"] == pytest.approx((chosen > rejected).float().mean().item())

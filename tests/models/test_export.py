from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf_lightning.checkpoint_files import CHECKPOINT_KEY
from rlhf_lightning.data.chat import ConversationEncoder
from rlhf_lightning.data.collate import collate_sequences
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.export import export_checkpoint, pack_model, write_model_folder
from rlhf_lightning.models.loading import load_sequence_classifier
from rlhf_lightning.models.scalar_head import ScalarModel, ensure_distinct_pad

IDS = torch.tensor([[5, 6, 2, 7, 8, 2]])
CHAT = [{"role": "user", "content": "w5 w6"}]


def save_checkpoint(path: Path, prefix: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write what a module writes, beside another model's weights."""
    state = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    state |= {"critic.scalar.model.score.weight": torch.zeros(1, 16), "kl": torch.zeros(())}
    torch.save({"state_dict": state, CHECKPOINT_KEY: pack_model(prefix, model, tokenizer), "epoch": 3}, path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("family", ["tied_llama", "gemma2", "gpt2"])
def test_a_policy_reads_back_with_equal_logits(
    family: str, make_model: Callable[..., PreTrainedModel], word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make_model(family)
    model.generation_config.max_length = 33
    write_model_folder(tmp_path / "folder", model, word_tokenizer)
    checkpoint = save_checkpoint(tmp_path / "last.ckpt", "policy.", model, word_tokenizer)
    assert export_checkpoint(checkpoint, tmp_path / "exported") == tmp_path / "exported"
    for name in ("folder", "exported"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
        assert again.generation_config.max_length == 33
        assert again.dtype == torch.float32
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "<|user|> w5 w6 <|end|> "
        assert tokenizer("w5 <|end|> w6")["input_ids"] == [5, 2, 6]
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
        assert (tmp_path / name / "model.safetensors").is_file()


@torch.no_grad()
def test_a_reward_model_reads_back_with_equal_scores_where_pad_was_eos(
    make_model: Callable[..., PreTrainedModel], word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make_model("llama", scalar=True, pad_token_id=2)
    ensure_distinct_pad(model, word_tokenizer)
    model.config.scored_token_id = 2
    write_model_folder(tmp_path / "folder", model, word_tokenizer)
    export_checkpoint(
        save_checkpoint(tmp_path / "last.ckpt", "scalar.model.", model, word_tokenizer), tmp_path / "exported"
    )
    batch = collate_sequences([([1, 5, 2], [6, 7, 2]), ([1, 8, 2], [9, 2])], pad_id=0)
    scores = ScalarModel(model).scores(batch)
    texts = ["<|user|> w5 <|end|> w6 w7 <|end|>", "<|user|> w8 <|end|> w9 <|end|>"]
    for name in ("folder", "exported"):
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        assert again.config.num_labels == 1
        assert again.config.scored_token_id == 2
        inputs = AutoTokenizer.from_pretrained(tmp_path / name)(texts, padding=True, return_tensors="pt")
        theirs = again(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0]
        torch.testing.assert_close(theirs, scores, atol=1e-5, rtol=1e-5)
        assert torch.equal(ScalarModel(load_sequence_classifier(str(tmp_path / name))).scores(batch), scores)


@torch.no_grad()
def test_a_reward_model_with_the_tokenizer_of_smollm(
    make_model: Callable[..., PreTrainedModel], smollm_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm_tokenizer.name_or_path)  # one that may be changed
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    model = make_model("llama", scalar=True, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    ensure_distinct_pad(model, tokenizer)
    write_model_folder(tmp_path, model, tokenizer)
    answers = ["Hi there!", "It is a fine day, is it not?"]
    encoder = ConversationEncoder(smollm_tokenizer)
    chats = [[{"role": "user", "content": "Hello"}]] * 2
    batch = collate_sequences([encoder.encode(chat, text) for chat, text in zip(chats, answers, strict=True)], 0)
    scores = ScalarModel(model).scores(batch)
    # Another program: the exported tokenizer's own template and padding, transformers' own pooling.
    again, theirs = (
        AutoTokenizer.from_pretrained(tmp_path),
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
    )
    texts = [
        again.apply_chat_template([*chat, {"role": "assistant", "content": text}], tokenize=False).rstrip("\n")
        for chat, text in zip(chats, answers, strict=True)
    ]
    inputs = again(texts, padding=True, return_tensors="pt", padding_side="right")
    assert inputs["input_ids"].gather(1, batch.lengths[:, None] - 1).unique().tolist() == [tokenizer.eos_token_id]
    pooled = theirs(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0]
    torch.testing.assert_close(pooled, scores, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tied_weights_are_tied_again(
    make_model: Callable[..., PreTrainedModel], word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make_model("tied_llama")
    export_checkpoint(save_checkpoint(tmp_path / "last.ckpt", "policy.", model, word_tokenizer), tmp_path / "out")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_packed_model_is_plain_data(
    make_model: Callable[..., PreTrainedModel], word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    packed = pack_model("policy.", make_model("llama"), word_tokenizer)
    torch.save(packed, tmp_path / "packed.pt")
    assert torch.load(tmp_path / "packed.pt", weights_only=True) == packed
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= set(packed["files"])
    assert packed["prefix"] == "policy."
    assert not any("safetensors" in name for name in packed["files"])


class TestMistakes:
    @pytest.fixture
    def checkpoint(
        self, make_model: Callable[..., PreTrainedModel], word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> Path:
        return save_checkpoint(tmp_path / "last.ckpt", "policy.", make_model("llama"), word_tokenizer)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"none\.ckpt' does not exist"):
            export_checkpoint(tmp_path / "none.ckpt", tmp_path / "out")
        with pytest.raises(UserError, match=r"is a folder; give a \.ckpt file"):
            export_checkpoint(tmp_path, tmp_path / "out")

    def test_a_damaged_file(self, checkpoint: Path, tmp_path: Path) -> None:
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
        with pytest.raises(UserError, match="not a checkpoint, or a damaged one") as error:
            export_checkpoint(checkpoint, tmp_path / "out")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()

    def test_a_file_from_elsewhere(self, tmp_path: Path) -> None:
        torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
        with pytest.raises(UserError, match="was not written by rlhf_lightning"):
            export_checkpoint(tmp_path / "other.ckpt", tmp_path / "out")

    def test_a_file_of_a_later_version(self, checkpoint: Path, tmp_path: Path) -> None:
        state = torch.load(checkpoint, weights_only=True)
        state[CHECKPOINT_KEY]["format"] += 1
        torch.save(state, checkpoint)
        with pytest.raises(UserError, match="newer rlhf_lightning"):
            export_checkpoint(checkpoint, tmp_path / "out")

    def test_a_folder_that_holds_something(self, checkpoint: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("keep me")
        with pytest.raises(UserError, match="not an empty folder"):
            export_checkpoint(checkpoint, tmp_path / "out")
        with pytest.raises(UserError, match="not an empty folder"):
            export_checkpoint(checkpoint, tmp_path / "out" / "notes.txt")
        assert (tmp_path / "out" / "notes.txt").read_text() == "keep me"

    def test_an_empty_folder_will_do(self, checkpoint: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        assert (export_checkpoint(checkpoint, tmp_path / "out") / "config.json").is_file()


class WithBinaryFile(PreTrainedTokenizerFast):
    """Writes a file that is no text beside its own, as tokenizers of sentencepiece do."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        written = super().save_pretrained(save_directory, *args, **kwargs)
        Path(save_directory, "tokenizer.model").write_bytes(BINARY)
        Path(save_directory, "lines.txt").write_bytes(b"a\r\nb\n")
        return written


BINARY = b"\n\x0e\n\x05<unk>\x15\x00\x00\x80\xff\x00\r\n" + bytes(range(256))


def test_a_tokenizer_file_that_is_no_text_comes_back_byte_for_byte(
    make_model: Callable[..., PreTrainedModel], word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer = WithBinaryFile(tokenizer_object=word_tokenizer.backend_tokenizer)
    checkpoint = save_checkpoint(tmp_path / "last.ckpt", "policy.", make_model("llama"), tokenizer)
    packed = torch.load(checkpoint, weights_only=True)[CHECKPOINT_KEY]["files"]
    assert isinstance(packed["config.json"], str)
    folder = export_checkpoint(checkpoint, tmp_path / "exported")
    assert (folder / "tokenizer.model").read_bytes() == BINARY
    assert (folder / "lines.txt").read_bytes() == b"a\r\nb\n"

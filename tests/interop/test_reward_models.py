"""Reward models of the layout that TRL writes, made by transformers alone; test_trl.py has those that TRL trained."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf_lightning.data.chat import ConversationEncoder, end_chats_at_stop
from rlhf_lightning.models.loading import load_tokenizer
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.rollout.reward_model import RewardModel

from .conftest import TURNS, classifier, policys_batch, scores_by_transformers, write

MakeTokenizer = Callable[..., PreTrainedTokenizerBase]
#: Turns as another model family writes them: other tokens, and no line end behind the stop token.
OTHER_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["<|pad|>", "<|im_end|>"])  # the latter as SmolLM's: padding ends every turn too
@pytest.mark.parametrize("chat", [True, False])
def test_its_scores_are_those_of_transformers(
    make_tokenizer: MakeTokenizer, tmp_path: Path, side: str, pad: str, chat: bool
) -> None:
    tokenizer = make_tokenizer(pad_token=pad)
    model = classifier(tokenizer)
    theirs = scores_by_transformers(model, tokenizer, side=side, chat=chat)
    source = RewardModel(write(tmp_path, model, tokenizer))
    source.setup(tokenizer)
    ours = source.score(policys_batch(tokenizer, chat=chat)).total.tolist()
    assert ours == pytest.approx(theirs, abs=1e-5)
    source.as_transformers = False  # what it is there for: where a row ends, the response's last token is another
    at_the_end = source.score(policys_batch(tokenizer, chat=chat)).total.tolist()
    same_place = not chat and pad != "<|im_end|>"
    assert (at_the_end == pytest.approx(theirs, abs=1e-3)) == same_place


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "changes", [{"chat_template": OTHER_TEMPLATE}, {"chat_template": OTHER_TEMPLATE, "pad_token": "<|im_end|>"}]
)
def test_its_own_tokenizer_reads_the_text(
    make_tokenizer: MakeTokenizer, tmp_path: Path, side: str, changes: dict[str, str]
) -> None:
    policys, own = make_tokenizer(), make_tokenizer(**changes)
    model = classifier(own)
    theirs = scores_by_transformers(model, own, side=side)
    source = RewardModel(write(tmp_path, model, own))
    source.setup(policys)
    assert not source.same_tokens
    assert source.score(policys_batch(policys)).total.tolist() == pytest.approx(theirs, abs=1e-5)


def test_what_was_cut_off_is_read_at_its_last_token(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    source = RewardModel(write(tmp_path, classifier(tokenizer), tokenizer))
    source.setup(tokenizer)
    batch = policys_batch(tokenizer)
    sequences = batch.sequences._replace(response_lengths=batch.sequences.response_lengths - 1)
    cut = batch._replace(sequences=sequences, finished=~batch.finished)
    expected = ScalarModel(source.scalar.model).scores(sequences)
    torch.testing.assert_close(source.score(cut).total, expected)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["<|pad|>", "<|im_end|>"])
def test_ours_scores_alike_in_transformers(make_tokenizer: MakeTokenizer, tmp_path: Path, side: str, pad: str) -> None:
    tokenizer = make_tokenizer(pad_token=pad)
    module = RewardModule(write(tmp_path / "start", classifier(tokenizer), tokenizer))
    module.export_model(tmp_path / "ours")
    source = RewardModel(str(tmp_path / "ours"))
    source.setup(tokenizer)
    ours = source.score(policys_batch(tokenizer)).total
    assert not source.as_transformers  # the export says so, also where no token was noted in training

    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    rows = [prompt + response for prompt, response in (ConversationEncoder(tokenizer).encode(*turn) for turn in TURNS)]
    source.tokenizer.padding_side = side
    batch = source.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    logits = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    torch.testing.assert_close(logits, ours, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_chat_that_its_own_template_writes_is_read_where_ours_was_trained(
    make_tokenizer: MakeTokenizer, tmp_path: Path, side: str
) -> None:
    """ChatML writes a line end behind the stop token, which would be read elsewhere; the exported template does not."""
    tokenizer = make_tokenizer(pad_token="<|im_end|>")
    RewardModule(write(tmp_path / "start", classifier(tokenizer), tokenizer)).export_model(tmp_path / "ours")
    source = RewardModel(str(tmp_path / "ours"))
    source.setup(tokenizer)
    assert source.same_tokens
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    found = scores_by_transformers(theirs, load_tokenizer(str(tmp_path / "ours")), side=side)
    assert found == pytest.approx(source.score(policys_batch(tokenizer)).total.tolist(), abs=1e-5)


@pytest.mark.parametrize("template", [OTHER_TEMPLATE, "{{ raise_exception('no') }}", None])
def test_a_template_that_ends_there_or_cannot_be_tried_stays(
    make_tokenizer: MakeTokenizer, template: str | None
) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    end_chats_at_stop(tokenizer)
    assert tokenizer.chat_template == template


def test_a_trimmed_template_still_begins_a_reply_and_is_not_trimmed_twice(make_tokenizer: MakeTokenizer) -> None:
    plain, tokenizer = make_tokenizer(), make_tokenizer()
    end_chats_at_stop(tokenizer)
    once = tokenizer.chat_template
    end_chats_at_stop(tokenizer)
    assert tokenizer.chat_template == once != plain.chat_template
    asked = [{"role": "user", "content": "Why? "}]
    texts = [each.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) for each in (plain, tokenizer)]
    assert texts[0] == texts[1]
    assert ConversationEncoder(plain).encode("Why?", "So. ") == ConversationEncoder(tokenizer).encode("Why?", "So. ")

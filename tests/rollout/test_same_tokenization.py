"""When a reward model may read the policy's own tokens."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_lightning.models.loading import load_tokenizer
from rlhf_lightning.rollout.reward_model import same_tokenization


def words(*names: str, splitter: Any = None, template: str | None = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="a"))
    backend.pre_tokenizer = splitter or pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="a")
    tokenizer.chat_template = template
    return tokenizer


def test_of_equal_tokenizers() -> None:
    assert same_tokenization(words("a", "b"), words("a", "b"))


def test_one_may_have_a_special_token_more() -> None:
    policy, reward = words("a", "b"), words("a", "b")
    reward.add_special_tokens({"pad_token": "<|pad|>"})
    assert same_tokenization(policy, reward)
    assert not same_tokenization(reward, policy)  # its pad token would mean nothing


def test_what_makes_them_differ() -> None:
    one = words("a", "b")
    assert not same_tokenization(one, words("b", "a"))
    assert not same_tokenization(one, words("a", "b", splitter=pre_tokenizers.Punctuation()))
    assert not same_tokenization(one, words("a", "b", template="{{ messages }}"))
    assert same_tokenization(words("a", "b", template="x"), words("a", "b", template="x"))
    # A longer model would have taken "ab" where the policy took two tokens.
    assert not same_tokenization(one, words("a", "b", "ab"))


def test_of_real_tokenizers(shared_data: Path, smollm_tokenizer: PreTrainedTokenizerBase) -> None:
    folder = shared_data / "tokenizers"
    assert same_tokenization(smollm_tokenizer, load_tokenizer(str(folder / "smollm-135m-instruct")))
    # The same vocabulary, but another chat template.
    assert not same_tokenization(smollm_tokenizer, load_tokenizer(str(folder / "smollm2-135m-instruct")))
    assert not same_tokenization(smollm_tokenizer, load_tokenizer("builtin:demo"))

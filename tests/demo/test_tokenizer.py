"""The packaged tokenizer and model config: reproducible, loadable, and exact on all text of the grammar."""

import json
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.demo import builtin_rows
from rlhf_lightning.demo.tokenizer import BASE_FOLDER, SPECIAL_TOKENS, build_files, vocabulary

PRINTABLE = string.ascii_letters + string.digits + string.punctuation + " \n"
TOKENIZER = AutoTokenizer.from_pretrained(BASE_FOLDER)


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_building_anew_gives_the_packaged_files_byte_for_byte() -> None:
    files = build_files()
    assert {path.name for path in BASE_FOLDER.iterdir()} == set(files)
    for name, text in files.items():
        assert (BASE_FOLDER / name).read_bytes() == text.encode(), "run python -m rlhf_lightning.demo.tokenizer"


def test_command_writes_the_same_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlhf_lightning.demo.tokenizer", str(tmp_path / "base")]
    subprocess.run(command, check=True, capture_output=True)
    for path in BASE_FOLDER.iterdir():
        assert (tmp_path / "base" / path.name).read_bytes() == path.read_bytes()


def test_special_tokens_are_apart_from_one_another() -> None:
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert (TOKENIZER.unk_token, TOKENIZER.bos_token) == ("<|unk|>", "<|endoftext|>")
    assert (TOKENIZER.pad_token, TOKENIZER.eos_token) == ("<|pad|>", "<|im_end|>")
    assert len(TOKENIZER) == len(vocabulary()) <= 600


def test_grammar_text_survives_the_round_trip_in_whole_words() -> None:
    for row in builtin_rows("train") + builtin_rows("eval"):
        for text in row.values():
            ids = ids_of(text)
            assert TOKENIZER.decode(ids) == text
            tokens = TOKENIZER.convert_ids_to_tokens(ids)
            assert not {token for token in tokens if len(token) == 1 and token.isalpha()} - {"I"}, text


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=PRINTABLE, max_size=60))
def test_any_printable_text_survives_the_round_trip(text: str) -> None:
    assert TOKENIZER.decode(ids_of(text)) == text


def test_text_beyond_the_vocabulary_becomes_unknown() -> None:
    assert ids_of("é") == [0]


def test_chat_template_is_chatml_and_the_prompt_is_a_prefix_of_the_conversation() -> None:
    user, reply = {"role": "user", "content": "Do you like pizza?"}, {"role": "assistant", "content": "Oh, I do!"}
    prompt = TOKENIZER.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    whole = TOKENIZER.apply_chat_template([user, reply], tokenize=False)
    assert prompt == "<|im_start|>user\nDo you like pizza?<|im_end|>\n<|im_start|>assistant\n"
    assert whole == prompt + "Oh, I do!<|im_end|>\n"
    assert ids_of(whole)[: len(ids_of(prompt))] == ids_of(prompt)
    assert ids_of(prompt)[:3] == TOKENIZER.convert_tokens_to_ids(["<|im_start|>", "user", "\n"])


def test_length_of_answers_in_tokens() -> None:
    lengths = [len(ids_of(row[side])) for row in builtin_rows("eval") for side in ("chosen", "rejected")]
    assert min(lengths) >= 11
    assert max(lengths) <= 41
    assert 20 <= sum(lengths) / len(lengths) <= 26


@pytest.fixture(scope="module")
def config() -> Any:
    return AutoConfig.from_pretrained(BASE_FOLDER)


def test_config_is_a_llama_of_about_a_million_parameters_that_fits_the_tokenizer(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config)
    assert 0.8e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 1.2e6
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert config.vocab_size == len(TOKENIZER)
    assert (config.eos_token_id, config.pad_token_id) == (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id)
    assert config.bos_token_id == TOKENIZER.bos_token_id
    assert TOKENIZER.model_max_length == config.max_position_embeddings


def test_saved_tokenizer_loads_as_it_was(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nWhy do people enjoy jazz?<|im_end|>"
    assert again(text)["input_ids"] == ids_of(text)
    assert again.chat_template == TOKENIZER.chat_template
    assert again.pad_token_id == TOKENIZER.pad_token_id


def test_packaged_folder_holds_no_weights_and_no_path() -> None:
    for path in BASE_FOLDER.iterdir():
        assert path.suffix == ".json"
        assert json.loads(path.read_text())
        assert str(Path.home()) not in path.read_text()

"""Builds the demo's packaged model folder: tokenizer, chat template and the config of a small Llama, without weights.

``python -m rlhf_lightning.demo.tokenizer`` writes it anew, the same byte for byte.

The tokenizer is a unigram model over whole words (with the space before them) and single characters. A whole word
always outweighs its letters, so that each word of the grammar is one token, and any other ASCII text is spelt out: a
question that the grammar never asks still reaches the model, and ``decode(encode(text)) == text``.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from rlhf_lightning.demo.grammar import all_questions, choices
from rlhf_lightning.demo.phrases import PHRASES

BASE_FOLDER = Path(__file__).parent / "base"
SPECIAL_TOKENS = ("<|unk|>", "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
ROLES = ("system", "user", "assistant")
PIECE = r" ?[A-Za-z']+|[^A-Za-z']"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def vocabulary() -> list[tuple[str, float]]:
    """Return every token and its log-weight: the special tokens, the characters, the words of the grammar.

    Example:
        >>> len(vocabulary())
        491
    """
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    texts = [question.text for question in all_questions()]
    texts += [
        choice
        for question in all_questions()
        for voice in PHRASES
        for part in ("opener", "core", "detail", "closing")
        for choice in _both_places(choices(question, voice, part), part)
    ]
    words = {word for text in texts for word in re.findall(PIECE, text)} | set(ROLES)
    words -= set(characters)
    return [
        *((token, 0.0) for token in SPECIAL_TOKENS),
        *((character, -10.0) for character in characters),
        *((word, -5.0) for word in sorted(words)),
    ]


def build_files() -> dict[str, str]:
    """Return the text of each file of the packaged folder by its name."""
    return {
        "config.json": _as_json(model_config()),
        "tokenizer.json": _as_json(tokenizer_file()),
        "tokenizer_config.json": _as_json(tokenizer_config()),
    }


def tokenizer_file() -> dict[str, Any]:
    """Return the content of ``tokenizer.json``, as the tokenizers library writes it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.Unigram(vocabulary(), unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return json.loads(tokenizer.to_str())


def tokenizer_config() -> dict[str, Any]:
    """Return the content of ``tokenizer_config.json``: what each special token is for, and the ChatML template."""
    return {
        "bos_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": model_config()["max_position_embeddings"],
        "pad_token": "<|pad|>",
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<|unk|>",
    }


def model_config() -> dict[str, Any]:
    """Return the content of ``config.json``: a Llama of about a million parameters with tied embeddings."""
    ids = {token: index for index, (token, _) in enumerate(vocabulary())}
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.05,
        "intermediate_size": 384,
        "max_position_embeddings": 256,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "pad_token_id": ids["<|pad|>"],
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": len(ids),
    }


def main(arguments: list[str]) -> None:
    """Write the packaged folder, or the same files into the folder that is the one argument."""
    folder = Path(arguments[0]) if arguments else BASE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in build_files().items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
        print(folder / name)


def _both_places(texts: list[str], part: str) -> list[str]:
    """Return the texts as they stand at the start of an answer, where their part can stand there, and within one."""
    return [" " + text for text in texts] + (texts if part in ("opener", "core") else [])


def _as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=True, sort_keys=False) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])

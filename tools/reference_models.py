"""Tiny models whose weights follow from a formula: the same numbers wherever they are built."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

#: Padding, an unknown word, the end of a text, and what can be said.
WORDS = ["<pad>", "<unk>", "<eos>", *"abcdefghi"]


def written_model(seed: int, *, scalar: bool = False) -> Any:
    """Return a tiny Llama, far enough from uniform that different seeds disagree.

    Args:
        seed: Which numbers its weights have.
        scalar: True makes a sequence classifier with one label, a reward or value model.
    """
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        num_labels=1,
    )
    model = (LlamaForSequenceClassification if scalar else LlamaForCausalLM)(config).float()
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            places = torch.arange(parameter.numel(), dtype=torch.float64)
            scattered = (12.9898 * places + 78.233 * number + 37.719 * seed).sin() * 43758.5453
            uniform = (scattered - scattered.floor() - 0.5).view_as(parameter)  # in [-0.5, 0.5), by no generator
            parameter.copy_(uniform + 1 if parameter.ndim == 1 else uniform)
    return model

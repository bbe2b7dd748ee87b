"""What tells a model from others by its content, wherever it was loaded from."""

import json
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Entries of a config that say where the model came from or who wrote it, and change no number.
_OF_NO_EFFECT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def model_digest(model: "PreTrainedModel") -> str:
    """Return a digest of a model's weights, bit for bit, of their names, and of its config.

    A folder, a checkpoint and a hub name of one model have one digest. A gigabyte takes about a second.

    Example:
        >>> from rlhf_lightning.models.loading import load_causal_lm
        >>> small = {"hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
        >>> model = load_causal_lm("builtin:demo", pretrained=False, config_overrides=small)
        >>> before = model_digest(model)
        >>> before == model_digest(model), before == model_digest(model.double())
        (True, False)
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _OF_NO_EFFECT}
    digest = blake2b(json.dumps([type(model).__name__, config], sort_keys=True, default=str).encode(), digest_size=16)
    digest.update(tensors_digest(model.state_dict()).encode())
    return digest.hexdigest()


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """Return a digest of named tensors: names, types, shapes and every bit; their order does not count.

    Example:
        >>> one = {"a": torch.ones(2), "b": torch.zeros(2)}
        >>> tensors_digest(one) == tensors_digest({"b": torch.zeros(2), "a": torch.ones(2)})
        True
        >>> tensors_digest(one) == tensors_digest({**one, "a": -torch.ones(2)})
        False
    """
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

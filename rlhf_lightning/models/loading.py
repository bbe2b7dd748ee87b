"""Hugging Face folders and hub names in, models and tokenizers out; what is wrong with them is said in one line."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from rlhf_lightning.errors import UserError, did_you_mean
from rlhf_lightning.models.lora import adapted_layers, before_adapters

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

M = TypeVar("M", bound=nn.Module)

BUILTIN_MODELS = {"builtin:demo": Path(__file__).parent.parent / "demo" / "base"}
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")

#: What transformers raises where a folder holds something else than it expects.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError)


def resolve_model(name: str) -> str:
    """Return the folder or hub name behind ``name``.

    Args:
        name: A Hugging Face folder, a hub name such as ``HuggingFaceTB/SmolLM-135M-Instruct``, or ``builtin:demo``.

    Raises:
        UserError: If it can be neither.
    """
    if name.startswith("builtin:"):
        if name not in BUILTIN_MODELS:
            raise UserError(f"no built-in model {name!r}.{did_you_mean(name, BUILTIN_MODELS)}")
        return str(BUILTIN_MODELS[name])
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model folder {name!r} has no config.json; give a Hugging Face folder or a hub name.")
        return str(path)
    if path.exists():
        raise UserError(f"model {name!r} is a file; give the Hugging Face folder that holds config.json and weights.")
    parent = path.parent
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or ("/" in name and parent.is_dir()):
        if not parent.is_dir():
            raise UserError(f"model folder {name!r} does not exist. Its folder {str(parent)!r} does not exist either.")
        siblings = [entry.name for entry in parent.iterdir()]
        raise UserError(f"model folder {name!r} does not exist.{did_you_mean(path.name, siblings)}")
    return name


def load_config(name: str, overrides: dict[str, Any] | None = None) -> "PretrainedConfig":
    """Load the config of a model folder or hub name.

    Args:
        name: A Hugging Face folder, hub name or ``builtin:demo``.
        overrides: Entries to be changed.

    Raises:
        UserError: If there is none, it is of no architecture that transformers knows, or an override is no entry of it
            or of the wrong type.
    """
    from transformers import AutoConfig

    with _reading(name, "config"), quiet_transformers():
        config = AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=False)
    _refuse_downloaded_code(config, name)
    for key, value in (overrides or {}).items():
        _override(config, key, value, name)
    if overrides:
        _fit_heads(config, overrides)
    return config


def _refuse_downloaded_code(config: "PretrainedConfig", name: str) -> None:
    """Refuse a config that names its attention by a repository, whose code transformers would fetch and run."""
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        attention = getattr(part, "_attn_implementation", None)
        if isinstance(attention, str) and "/" in attention:
            raise UserError(
                f"the config of {name!r} asks for the code of {attention!r} to be run (attn_implementation), which is "
                "never done here; remove that entry."
            )


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model folder or hub name.

    Raises:
        UserError: If there is none.
    """
    from transformers import AutoTokenizer

    path = resolve_model(name)
    if Path(path).is_dir() and not any(
        (Path(path) / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        raise UserError(
            f"model folder {name!r} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json); copy the "
            "tokenizer files of the model it came from into it."
        )
    with _reading(name, "tokenizer"), quiet_transformers():
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def load_causal_lm(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    pretrained: bool = True,
    config_overrides: dict[str, Any] | None = None,
) -> "PreTrainedModel":
    """Load a causal language model, with dropout off.

    Args:
        name: A Hugging Face folder, hub name or ``builtin:demo``.
        dtype: Of the weights; float32 unless asked, whatever the files hold: bf16 weights cannot be trained.
        pretrained: False draws random weights for the config, from the global random state.
        config_overrides: Entries of the config to be changed, such as ``{"hidden_size": 128}``; only with random
            weights.

    Returns:
        The model in train mode.

    Raises:
        UserError: If the folder lacks files or weights, or an override is no entry of the config.
    """
    from transformers import AutoModelForCausalLM

    if config_overrides and pretrained:
        raise UserError("config_overrides changes the shape of the model and so needs pretrained: false.")
    config = load_config(name, config_overrides)
    if pretrained:
        refuse_other_than_causal_lm(config, name)
        model = _load_weights(AutoModelForCausalLM, name, config, dtype, may_miss=())
    else:
        with _reading(name, "model"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return disable_dropout(model).train()


def is_sequence_classifier(config: "PretrainedConfig") -> bool:
    """Tell whether the files that a config belongs to have a head for scores."""
    return any("SequenceClassification" in architecture for architecture in config.architectures or [])


def load_sequence_classifier(
    name: str, *, dtype: torch.dtype = torch.float32, new_head: bool = False
) -> "PreTrainedModel":
    """Load an ``AutoModelForSequenceClassification`` with one label, with dropout off.

    Args:
        name: A Hugging Face folder or hub name.
        dtype: Of the weights.
        new_head: True accepts a causal language model and draws a head for it, weights N(0, 1/(d + 1)) as in Stiennon
            et al. 2020; False insists on a head in the files.

    Raises:
        UserError: If the model has more than one label, or no head while ``new_head`` is False.
    """
    from transformers import AutoModelForSequenceClassification

    config = load_config(name)
    has_head = is_sequence_classifier(config)
    if has_head and config.num_labels != 1:
        raise UserError(
            f"model {name!r} has {config.num_labels} labels; a reward model has exactly 1 (one scalar score). "
            "Train one with RewardModule, or give another folder."
        )
    if not has_head and not new_head:
        raise UserError(
            f"model {name!r} is a {(config.architectures or ['model of unknown kind'])[0]}, not a reward model "
            "(AutoModelForSequenceClassification with one label); train one with RewardModule."
        )
    config.num_labels = 1
    model = _load_weights(
        AutoModelForSequenceClassification, name, config, dtype, may_miss=() if has_head else ("score.weight",)
    )
    if not has_head:
        nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    return disable_dropout(model).train()


def foreign_token(own: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> str | None:
    """Return a token of ``own`` that means something else to ``other``, which may have more; ``None`` if none does."""
    vocabulary = other.get_vocab()
    return next((token for token, number in own.get_vocab().items() if vocabulary.get(token) != number), None)


def refuse_foreign_tokens(own: "PreTrainedTokenizerBase", name: str, *, key: str) -> None:
    """Refuse a model to which the policy's tokens mean something else.

    Args:
        own: The policy's tokenizer.
        name: The model's folder or hub name.
        key: The setting that names it, for the message.

    Raises:
        UserError: Naming a token that differs.
    """
    token = foreign_token(own, load_tokenizer(name))
    if token is not None:
        raise UserError(
            f"{key} {name!r} has another tokenizer than the policy (such as for {token!r}); give a model that reads "
            "the policy's tokens."
        )


def load_reference(name: str | None, policy: "PreTrainedModel") -> "PreTrainedModel":
    """Load the frozen reference, in eval mode.

    Without a name it is a copy of the policy as it is now, or, of one with adapters, the policy without them: over the
    same weights, which are not trained.
    """
    if name:
        reference = load_causal_lm(name)
    else:
        reference = before_adapters(policy) if adapted_layers(policy) else copy.deepcopy(policy)
    return reference.eval().requires_grad_(False)


def disable_dropout(model: M) -> M:
    """Set every dropout probability of a model to 0, in place, and return it.

    PPO compares log-probabilities of two passes; with dropout the ratio is noise from the first minibatch on.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _zero_dropout_settings(module)
        _zero_dropout_settings(getattr(module, "config", None))
    return model


def _zero_dropout_settings(holder: object) -> None:
    """Set the numbers that families call attention_dropout, resid_pdrop, layerdrop, ... to 0."""
    for name, value in list(getattr(holder, "__dict__", {}).items()):
        if "drop" in name and isinstance(value, float):
            setattr(holder, name, 0.0)


def context_length(config: "PretrainedConfig") -> int | None:
    """Return how many tokens the model's positions reach, or ``None`` where the config does not say."""
    return getattr(config, "max_position_embeddings", None)


def _load_weights(
    factory: Any, name: str, config: "PretrainedConfig", dtype: torch.dtype, may_miss: tuple[str, ...]
) -> "PreTrainedModel":
    path = resolve_model(name)
    if Path(path).is_dir() and not any((Path(path) / file).is_file() for file in _WEIGHT_FILES):
        pickled = next(iter(sorted(Path(path).glob("*.bin"))), None)
        if pickled:
            raise UserError(
                f"model folder {name!r} has its weights in {pickled.name}, which could run code when loaded; convert "
                f"them to {_WEIGHT_FILES[0]}."
            )
        raise UserError(
            f"model folder {name!r} has no weights ({_WEIGHT_FILES[0]}); name one that was trained, or, to train from "
            "scratch by SFTModule, set pretrained: false."
        )
    with _reading(name, "model"), quiet_transformers():
        model, info = factory.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # it goes on and tells of them, which are refused below
        )
    missing = sorted(set(info["missing_keys"]) - set(may_miss))
    if missing or info["mismatched_keys"]:
        wrong = missing or sorted(str(key[0]) for key in info["mismatched_keys"])
        raise UserError(
            f"the weights of {name!r} do not fit its config: {len(wrong)} tensors missing or of another shape, such as "
            f"{wrong[0]!r}."
        )
    _align(model)
    return model


def _align(model: nn.Module) -> None:
    """Copy weights that do not begin at a multiple of 64 bytes, as those of a mapped file.

    How a matrix product rounds depends on it, and so the last bits of every run on the length of a file's header.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def _override(config: "PretrainedConfig", key: str, value: Any, name: str) -> None:
    if not hasattr(config, key):
        raise UserError(f"config_overrides: {name!r} has no entry {key!r}.{did_you_mean(key, config.to_dict())}")
    before = getattr(config, key)
    try:
        setattr(config, key, value)
    except Exception as error:  # transformers checks types by an exception of huggingface_hub's
        raise UserError(
            f"config_overrides: {key} is {value!r}, expected a value like {before!r}, which {name!r} has."
        ) from error


def _fit_heads(config: "PretrainedConfig", overrides: dict[str, Any]) -> None:
    """Derive the size of a head from what was overridden, and refuse heads that cannot share it out."""
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_key_value_heads", None)
    if heads and config.hidden_size % heads and "head_dim" not in overrides:
        raise UserError(f"config_overrides: hidden_size {config.hidden_size} is not divisible by {heads} heads.")
    if heads and shared and heads % shared:
        raise UserError(
            f"config_overrides: num_attention_heads {heads} is not divisible by num_key_value_heads {shared}; "
            "override both."
        )
    resized = "hidden_size" in overrides or "num_attention_heads" in overrides
    if resized and "head_dim" not in overrides and getattr(config, "head_dim", None):
        config.head_dim = config.hidden_size // config.num_attention_heads


def refuse_other_than_causal_lm(config: "PretrainedConfig", name: str) -> None:
    """Refuse a config that says that the weights beside it are of another head.

    Raises:
        UserError: Naming what they are.
    """
    kinds = config.architectures or []
    if kinds and not any("ForCausalLM" in kind or "LMHead" in kind for kind in kinds):
        raise UserError(f"model {name!r} is a {kinds[0]}; a language model (ForCausalLM) was expected here.")


@contextlib.contextmanager
def _reading(name: str, what: str) -> Iterator[None]:
    """Turn the many ways in which a folder can be unreadable into one line."""
    try:
        yield
    except UserError:
        raise
    except _UNREADABLE as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"the {what} of {name!r} asks for code of its own to be run (auto_map), which is never done here; give "
                "a model of an architecture that transformers knows."
            ) from error
        if Path(name).is_dir() or name in BUILTIN_MODELS:
            raise UserError(f"the {what} of {name!r} could not be loaded: {_reason(error)}") from error
        raise UserError(
            f"{name!r} is no folder here, and its {what} could not be loaded from the hub: "
            f"{_reason(error).split('. ')[0].rstrip('.')}."
            f"{did_you_mean(name, _model_folders())}"
        ) from error
    except Exception as error:
        packages = {"safetensors_rust", "safetensors", "huggingface_hub", "httpx"}
        if type(error).__module__.split(".")[0] not in packages and type(error) is not Exception:  # as of tokenizers
            raise
        raise UserError(f"the {what} of {name!r} could not be read; is a file damaged? {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = shorten(str(error), 200, placeholder=" ...")
    return text if text.endswith(" ...") else f"{text.rstrip('.')}."


def _model_folders() -> list[str]:
    return [entry.parent.name for entry in Path().glob("*/config.json")]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence loading bars and reports of transformers inside; what matters in them is raised by us."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

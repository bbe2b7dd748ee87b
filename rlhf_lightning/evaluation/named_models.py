"""The models of a comparison: folders, hub names, checkpoints of a run, or many checkpoints by one pattern."""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rlhf_lightning.errors import UserError, did_you_mean
from rlhf_lightning.models.export import PackedModel, building, load_packed, read_packed, unpacked_files
from rlhf_lightning.models.loading import (
    context_length,
    foreign_token,
    load_causal_lm,
    load_config,
    load_tokenizer,
    refuse_other_than_causal_lm,
    resolve_model,
)
from rlhf_lightning.rollout.sampler import SamplingConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class NamedModel:
    """A model by the name that the report calls it.

    Attributes:
        name: What it is called.
        path: Hugging Face folder, hub name, or checkpoint of a run.
        packed: What the checkpoint holds; ``None`` for a folder or hub name.
        line: Name of the run whose checkpoints stand together; ``None`` for a model that was named alone.
    """

    name: str
    path: str
    packed: PackedModel | None = None
    line: str | None = None

    @property
    def step(self) -> int | None:
        """Training steps behind it; ``None`` where it is no checkpoint."""
        return None if self.packed is None else self.packed.step

    @cached_property
    def config(self) -> "PretrainedConfig":
        """Its config."""
        if self.packed is None:
            return load_config(self.path)
        with unpacked_files(self.packed) as folder, building(self.packed):
            return load_config(str(folder))

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Its tokenizer, with the chat template."""
        if self.packed is None:
            return load_tokenizer(self.path)
        with unpacked_files(self.packed) as folder, building(self.packed):
            return load_tokenizer(str(folder))

    def load(self, device: torch.device) -> "PreTrainedModel":
        """Load it to be measured: frozen, in eval mode, float32.

        Raises:
            UserError: If it cannot be loaded, or its weights are not finite.
        """
        model = load_causal_lm(self.path) if self.packed is None else load_packed(self.packed)
        model = model.eval().requires_grad_(False).to(device)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
            raise UserError(
                f"the weights of {self.path!r} hold numbers that are not finite; its training has diverged."
            )
        return model


def named_models(models: Mapping[str, str]) -> list[NamedModel]:
    """Find what a comparison's models are; a pattern stands for the checkpoints that it matches, by their steps.

    Args:
        models: Folder, hub name, ``.ckpt`` file or pattern of such files, by name.

    Returns:
        The models in their order. A checkpoint of a pattern is called ``<name> step <n>``; of two files of one step,
        as ``last.ckpt`` and ``best.ckpt`` may be, one stands there.

    Raises:
        UserError: If there is none, or one is no language model that could be loaded.
    """
    if not models:
        raise UserError("models is empty; name at least one, such as --models.base FOLDER.")
    found = [model for name, path in models.items() for model in _models_of(name, path)]
    names = [model.name for model in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two models are called {name!r}; call one of them otherwise.")
    return found


def checked_base(models: Sequence[NamedModel], base: str | None) -> str:
    """Return the name of the model that the others are measured against, the first where none is named.

    Raises:
        UserError: If it is none of them.
    """
    names = [model.name for model in models]
    chosen = names[0] if base is None else base
    if chosen not in names:
        raise UserError(
            f"base is {chosen!r}, which is none of the models {', '.join(names)}.{did_you_mean(chosen, names)}"
        )
    return chosen


def refuse_other_vocabularies(models: Sequence[NamedModel], base: NamedModel) -> None:
    """Refuse a model to which a token of the base means something else; it may have further ones.

    Raises:
        UserError: Naming such a token.
    """
    for model in models:
        strange = foreign_token(base.tokenizer, model.tokenizer)
        if strange is not None:
            raise UserError(
                f"models {base.name!r} and {model.name!r} have different tokenizers (such as for {strange!r}); compare "
                "models of one tokenizer, as their answers are compared token by token."
            )


def refuse_short_contexts(models: Sequence[NamedModel], longest_prompt: int, sampling: SamplingConfig) -> None:
    """Refuse a model whose positions do not reach as far as prompts and answers.

    Args:
        models: The models.
        longest_prompt: Tokens of the longest prompt.
        sampling: What is sampled.

    Raises:
        UserError: Naming the model.
    """
    for model in models:
        reach = context_length(model.config)
        if reach is not None and longest_prompt + sampling.max_new_tokens > reach:
            raise UserError(
                f"models.{model.name}: prompts of up to {longest_prompt} tokens and {sampling.max_new_tokens} new ones "
                f"do not fit into its {reach} positions; lower max_prompt_length or sampling.max_new_tokens."
            )


def _models_of(name: str, path: str) -> list[NamedModel]:
    if glob.has_magic(path) and not Path(path).exists():
        return _checkpoints_of(name, path)
    if path.endswith(".ckpt"):
        return [_of_checkpoint(name, path)]
    folder = Path(resolve_model(path))
    if folder.is_dir():
        if not any(folder.glob("*.safetensors*")):
            raise UserError(f"models.{name}: the folder {path!r} has no weights (model.safetensors); train it first.")
        refuse_other_than_causal_lm(load_config(path), path)
    return [NamedModel(name, path)]


def _checkpoints_of(line: str, pattern: str) -> list[NamedModel]:
    """Return a model for each step of which the pattern matches a checkpoint, the earliest first."""
    paths = sorted(glob.glob(str(Path(pattern).expanduser())))
    if not paths:
        raise UserError(f"models.{line}: no file matches {pattern!r}; give a pattern of a run's checkpoints/*.ckpt.")
    by_step: dict[int, NamedModel] = {}
    for path in paths:
        if not path.endswith(".ckpt"):
            raise UserError(f"models.{line}: {pattern!r} matches {path!r}, which is no checkpoint; end it with *.ckpt.")
        model = _of_checkpoint(line, path, line=line)
        assert model.packed is not None
        by_step.setdefault(model.packed.step, model)
    return [
        NamedModel(f"{line} step {step}", model.path, model.packed, line) for step, model in sorted(by_step.items())
    ]


def _of_checkpoint(name: str, path: str, line: str | None = None) -> NamedModel:
    packed = read_packed(Path(path).expanduser())
    if packed.is_scalar:
        raise UserError(
            f"models.{name}: checkpoint {path!r} holds a {packed.class_name}; a language model (ForCausalLM) was "
            "expected here."
        )
    return NamedModel(name, path, packed, line)

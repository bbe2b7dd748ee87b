"""Models and checkpoints out to plain Hugging Face folders."""

import contextlib
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rlhf_lightning.checkpoint_files import CHECKPOINT_FORMAT, CHECKPOINT_KEY, check_file, refuse_newer_format
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import disable_dropout, quiet_transformers
from rlhf_lightning.models.lora import add_adapters, lora_of_settings, merged

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_model_folder(directory: str | Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Write weights (safetensors), config, generation config, tokenizer and chat template into a folder."""
    with quiet_transformers():
        merged(model).save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def pack_model(prefix: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Describe a model for a checkpoint, so that the checkpoint needs no other file to be exported.

    Args:
        prefix: What the keys of the model's weights start with in the checkpoint's state dict, such as ``"policy."``.
        model: The model; its weights are not packed, only its config.
        tokenizer: Its tokenizer, packed whole.

    Returns:
        Strings, numbers, lists, dicts and tensors alone, which ``torch.load(weights_only=True)`` accepts. A file is its
        text, or, where it is none (a ``tokenizer.model`` of sentencepiece), its bytes as a uint8 tensor.
    """
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
        files = {file.name: _packed_file(file.read_bytes()) for file in Path(folder).iterdir() if file.is_file()}
    return {"format": CHECKPOINT_FORMAT, "prefix": prefix, "class": type(model).__name__, "files": files}


def _packed_file(content: bytes) -> str | torch.Tensor:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return torch.tensor(list(content), dtype=torch.uint8)


def _unpacked_file(packed: str | torch.Tensor) -> bytes:
    return packed.encode("utf-8") if isinstance(packed, str) else bytes(packed.tolist())


class PackedModel(NamedTuple):
    """The trained model that a checkpoint carries.

    Attributes:
        path: The checkpoint.
        step: Training steps that led to it.
        class_name: Class of the model in transformers.
        files: Config, tokenizer and chat template by the name of their file.
        weights: Tensors by name, mapped from the checkpoint and read when they are asked for.
        adapters: Settings of its adapters by layer; empty without any.
    """

    path: Path
    step: int
    class_name: str
    files: dict[str, str | torch.Tensor]
    weights: dict[str, torch.Tensor]
    adapters: dict[str, list[float]]

    @property
    def is_scalar(self) -> bool:
        """Whether it gives scores, as a reward model does, and no text."""
        return self.class_name.endswith("ForSequenceClassification")

    def write_files(self, folder: Path) -> None:
        """Write all but the weights."""
        for name, content in self.files.items():
            (folder / name).write_bytes(_unpacked_file(content))


def read_packed(checkpoint: str | Path) -> PackedModel:
    """Read what a checkpoint says of its trained model; nothing but the checkpoint is read.

    Args:
        checkpoint: A ``.ckpt`` file written by one of this package's modules.

    Raises:
        UserError: If the file is missing, damaged or from elsewhere.
    """
    checkpoint = Path(checkpoint)
    check_file(checkpoint)
    state = _read_checkpoint(checkpoint)
    packed = state[CHECKPOINT_KEY]
    own, adapters = (_below(packed["prefix"], part) for part in (state["state_dict"], packed.get("adapters", {})))
    step = state.get("global_step")
    return PackedModel(
        checkpoint, step if isinstance(step, int) else 0, packed["class"], packed["files"], own, adapters
    )


def export_checkpoint(checkpoint: str | Path, output: str | Path) -> Path:
    """Write the trained model of a checkpoint as a Hugging Face folder; nothing but the checkpoint is read.

    Args:
        checkpoint: A ``.ckpt`` file written by one of this package's modules.
        output: Folder to be made; it must not hold files yet.

    Returns:
        The folder.

    Raises:
        UserError: If the file is missing, damaged or from elsewhere, or the folder is not empty.
    """
    packed, output = read_packed(checkpoint), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {str(output)!r} exists and is not an empty folder; give another or remove it.")
    output.mkdir(parents=True, exist_ok=True)
    packed.write_files(output)
    try:
        with building(packed):
            _rebuild(output, packed).save_pretrained(output)
    except UserError:
        for name in packed.files:
            (output / name).unlink(missing_ok=True)
        raise
    return output


def load_packed(packed: PackedModel) -> "PreTrainedModel":
    """Build the model of a checkpoint in memory, with adapters merged and dropout off; weights touch no disk.

    Raises:
        UserError: If it cannot be built.
    """
    with unpacked_files(packed) as folder, building(packed):
        return disable_dropout(_rebuild(folder, packed))


@contextlib.contextmanager
def unpacked_files(packed: PackedModel) -> Iterator[Path]:
    """Give a folder with config and tokenizer, as transformers reads them from files alone, for a moment."""
    with tempfile.TemporaryDirectory() as folder:
        packed.write_files(Path(folder))
        yield Path(folder)


@contextlib.contextmanager
def building(packed: PackedModel) -> Iterator[None]:
    """Turn what transformers and torch raise of files and weights that do not fit into one line."""
    try:
        with quiet_transformers():
            yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OSError) as error:
        reason = shorten(str(error), 150, placeholder=" ...")
        raise UserError(f"the model in checkpoint {str(packed.path)!r} cannot be built: {reason}") from error


def _below(prefix: str, entries: dict[str, Any]) -> dict[str, Any]:
    """Return the entries whose names begin with a prefix, without it."""
    return {name[len(prefix) :]: value for name, value in entries.items() if str(name).startswith(prefix)}


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {str(path)!r} holds Python objects, which could run code when loaded; none that this package "
            "writes does."
        ) from error
    except Exception as error:  # torch raises pickle, zip and runtime errors alike
        reason = str(error).strip().splitlines()
        raise UserError(
            f"checkpoint {str(path)!r} cannot be read ({reason[0][:120] if reason else 'damaged'})."
        ) from error
    if not isinstance(state, dict) or CHECKPOINT_KEY not in state:
        raise UserError(f"checkpoint {str(path)!r} was not written by rlhf_lightning; it names no model to export.")
    refuse_newer_format(state, path)
    if not _describes_a_model(state[CHECKPOINT_KEY]) or not isinstance(state.get("state_dict"), dict):
        raise UserError(f"checkpoint {str(path)!r} describes its model in a way that rlhf_lightning does not write.")
    return state


def _describes_a_model(packed: Any) -> bool:
    """Tell whether all is there that a model is built from; files have names, and no folders that lead elsewhere."""
    kinds = {"format": int, "prefix": str, "class": str, "files": dict}
    if not isinstance(packed, dict) or not all(isinstance(packed.get(key), kind) for key, kind in kinds.items()):
        return False
    if not isinstance(packed.get("adapters", {}), dict):
        return False
    return all(
        isinstance(name, str)
        and name.strip(".")
        and name == Path(name).name
        and isinstance(content, str | torch.Tensor)
        for name, content in packed["files"].items()
    )


def _rebuild(folder: Path, packed: PackedModel) -> "PreTrainedModel":
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    factory = AutoModelForSequenceClassification if packed.is_scalar else AutoModelForCausalLM
    model = factory.from_config(config, dtype=torch.float32, trust_remote_code=False)
    add_adapters(model, lora_of_settings(packed.adapters))
    model.load_state_dict(packed.weights, strict=True)
    model = merged(model)
    if (folder / "generation_config.json").is_file() and not packed.is_scalar:
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()

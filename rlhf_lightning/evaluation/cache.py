"""Results of a comparison, kept on disk by all that they follow from."""

import importlib.metadata
import json
import logging
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.digests import model_digest, tensors_digest
from rlhf_lightning.models.tensor_files import make_folder, read_tensors, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_SETTING = "cache"
_CHECKSUM = "checksum"
#: Where the code lies that results follow from; what renders and summarises them counts for nothing.
_CODE = (
    "functional",
    "models",
    "data",
    "rollout",
    "seeding.py",
    "evaluation/generations.py",
    "evaluation/pair_margins.py",
)
_LIBRARIES = ("torch", "transformers", "tokenizers")


class ResultCache:
    """What was sampled, scored or read before, found again by the content of all that it follows from.

    Args:
        folder: Where it is kept; made when something is to be kept. ``None`` keeps nothing.

    Raises:
        UserError: If the folder is a file.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UserError(f"cache '{folder}' is a file; give a folder, or null for none.")
        self.folder = folder
        self.found: list[str] = []
        """Kinds of the results that were found, in the order of asking."""
        self.made: list[str] = []
        """Kinds of those that were not."""
        self._digests: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()

    def get(
        self, kind: str, inputs: Callable[[], Sequence[str]], make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return a result: from the file of exactly these inputs, or made now, and then keep it.

        Args:
            kind: What it is, such as ``answers``; the first part of the file's name.
            inputs: Returns all that the result follows from, apart from code and libraries; not called without a
                folder, as digests take their time.
            make: Returns the result, tensors on any device.

        Returns:
            The result, on the CPU.

        Raises:
            UserError: If it cannot be written.
        """
        if self.folder is None:
            return make()
        path = self.folder / f"{kind}-{_digest([code_version(), *inputs()])}.safetensors"
        tensors = _read(path)
        (self.made if tensors is None else self.found).append(kind)
        if tensors is None:
            tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in make().items()}
            make_folder(self.folder, setting=_SETTING)
            checksum = torch.frombuffer(bytearray.fromhex(tensors_digest(tensors)), dtype=torch.uint8)
            write_tensors(path, {**tensors, _CHECKSUM: checksum}, setting=_SETTING)
        return tensors

    def model(self, model: "PreTrainedModel") -> str:
        """Return the digest of a model, computed once."""
        if model not in self._digests:
            self._digests[model] = model_digest(model)
        return self._digests[model]

    def log(self) -> None:
        """Say what was found, once all is measured."""
        if self.folder is not None:
            total = len(self.found) + len(self.made)
            logger.info("cache: %d of %d results were in '%s'", len(self.found), total, self.folder)


#: For those who keep nothing.
NOTHING_KEPT = ResultCache(None)


@cache
def code_version() -> str:
    """Return a digest of the code that results follow from, and of the versions of the libraries."""
    package = Path(__file__).parents[1]
    files = [file for part in _CODE for file in sorted((package / part).rglob("*.py")) or [package / part]]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES]
    return _digest([*versions, *(file.read_text(encoding="utf-8") for file in files)])


def as_input(*parts: object) -> str:
    """Return plain data as text that differs where the data does.

    Example:
        >>> as_input([1, 2], "a") == as_input([1], 2, "a")
        False
    """
    return json.dumps(parts, sort_keys=True, default=str)


def _read(path: Path) -> dict[str, Tensor] | None:
    """Return what a file holds; ``None`` where it is missing or damaged, which is told."""
    try:
        tensors = read_tensors(path, setting=_SETTING)
        checksum = bytes(tensors.pop(_CHECKSUM).tolist()).hex()
    except FileNotFoundError:
        return None
    except (UserError, OSError, KeyError, ValueError):
        checksum, tensors = "", {}
    if checksum == tensors_digest(tensors):
        return tensors
    logger.warning("cache: '%s' is damaged; its result is made anew", path)
    return None


def _digest(parts: Sequence[str]) -> str:
    """Return a digest of texts and of where each ends."""
    whole = blake2b(digest_size=16)
    for part in parts:
        content = part.encode("utf-8", "surrogatepass")
        whole.update(len(content).to_bytes(8, "little") + content)
    return whole.hexdigest()

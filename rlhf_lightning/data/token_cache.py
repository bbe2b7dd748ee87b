"""What a tokenizer makes of texts, kept on disk by the content of both."""

import tempfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from rlhf_lightning.models.loading import quiet_transformers
from rlhf_lightning.models.tensor_files import damaged, make_folder, read_tensors, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SETTING = "token_cache"
_FORMAT = 1  # of the files, and of how the tokenizer is called


class TokenCache:
    """The token ids of lists of texts, found again by the texts and the tokenizer.

    A text is what the tokenizer reads: a chat template has been applied to it, and lengths and stop tokens come after.
    So nothing but the tokenizer and the texts is part of the key, and other settings cannot make it wrong.

    Args:
        folder: Where it is kept; tokenizers lie in folders of their own there, named by their content.
        tokenizer: Whose ids they are.

    Raises:
        UserError: If the folder cannot be made.
    """

    def __init__(self, folder: str | Path, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.folder = Path(folder) / tokenizer_digest(tokenizer)
        make_folder(self.folder, setting=_SETTING)
        self.found = 0
        """Texts that were found so far."""
        self.asked = 0
        """Texts that were asked for so far."""

    def ids(self, texts: Sequence[str], tokenise: Callable[[Sequence[str]], list["array[int]"]]) -> list["array[int]"]:
        """Return the ids of each text: from the file of exactly this list, or from the tokenizer, and then keep them.

        Args:
            texts: Texts, at least one.
            tokenise: Returns the ids of each text.

        Raises:
            UserError: If the file is damaged, or one cannot be written.
        """
        self.asked += len(texts)
        path = self.folder / f"{_digest(text.encode('utf-8', 'surrogatepass') for text in texts)}.safetensors"
        if path.exists():
            self.found += len(texts)
            return self._read(path, len(texts))
        ids = tokenise(texts)
        tensors = {
            "lengths": torch.tensor([len(row) for row in ids], dtype=torch.int32),
            "ids": torch.from_numpy(np.array(_joined(ids), dtype=np.int32)),
        }
        write_tensors(path, tensors, setting=_SETTING)
        return ids

    def _read(self, path: Path, rows: int) -> list["array[int]"]:
        tensors = read_tensors(path, setting=_SETTING)
        lengths = tensors["lengths"].tolist()
        flat = array("i", tensors["ids"].numpy().tobytes())
        if len(lengths) != rows or sum(lengths) != len(flat):
            raise damaged(path, f"{len(flat)} ids of {rows} texts that are not as long", setting=_SETTING)
        return [flat[start:end] for start, end in pairwise(accumulate(lengths, initial=0))]


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a digest of what makes a tokenizer's ids: the files it saves, its class, the versions of the libraries.

    Where it was loaded from does not count.
    """
    import tokenizers
    import transformers

    kind = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__} {tokenizer.split_special_tokens}"
    versions = f"{_FORMAT} {transformers.__version__} {tokenizers.__version__}"
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        tokenizer.save_pretrained(folder)
        files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
        named = [part for file in files for part in (str(file.relative_to(folder)).encode(), file.read_bytes())]
    return _digest([versions.encode(), kind.encode(), *named])


def _digest(parts: Iterable[bytes]) -> str:
    """Return a digest of the parts and of where each ends.

    Example:
        >>> _digest([b"ab", b"c"]) == _digest([b"a", b"bc"])
        False
    """
    whole = blake2b(digest_size=16)
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()


def _joined(rows: Iterable["array[int]"]) -> "array[int]":
    flat = array("i")
    for row in rows:
        flat.extend(row)
    return flat

"""Log-probabilities under a frozen model, computed once and kept on disk by what they were computed from."""

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from rlhf_lightning.functional.sequences import SequenceBatch, length_mask
from rlhf_lightning.models.tensor_files import make_folder, read_tensors, write_tensors

_SETTING = "reference_cache"


class LogprobCache:
    """What one frozen model says of responses, found again by the token ids of prompt and response.

    Args:
        folder: Where it is kept; models and precisions lie in folders of their own there.
        model: What tells the model from others, such as a digest of its weights.
        precision: That of the passes, as it moves the numbers.

    Raises:
        UserError: If the folder cannot be made, or a file in it is damaged.
    """

    def __init__(self, folder: str | Path, *, model: str, precision: str) -> None:
        self.folder = Path(folder) / f"{blake2b(model.encode(), digest_size=8).hexdigest()}-{precision}"
        make_folder(self.folder, setting=_SETTING)
        self.model, self.precision = model, precision
        self._found: dict[bytes, Tensor] = {}
        self._new: dict[bytes, Tensor] = {}
        self.load()

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self._found)

    def load(self) -> None:
        """Read what is on disk, other processes' parts too."""
        for path in sorted(self.folder.glob("*.safetensors")):
            part = read_tensors(path, setting=_SETTING)
            keys = [key.numpy().tobytes() for key in part["keys"]]
            self._found.update(zip(keys, part["logprobs"].split(part["lengths"].tolist()), strict=True))

    def missing(self, batch: SequenceBatch) -> list[int]:
        """Return the numbers of the rows that it does not know."""
        return [row for row, key in enumerate(keys_of(batch)) if key not in self._found]

    def put(self, batch: SequenceBatch, logprobs: Tensor) -> None:
        """Take in all rows of a batch.

        Args:
            batch: Prompts and responses.
            logprobs: Of each response token, nats, shape (batch, response).
        """
        lengths = batch.response_lengths.tolist()
        for key, row, length in zip(keys_of(batch), logprobs.float().cpu(), lengths, strict=True):
            self._found[key] = self._new[key] = row[:length].clone()

    def get(self, batch: SequenceBatch) -> Tensor | None:
        """Return the log-probability of each response token, nats, shape (batch, response), zero where masked.

        ``None`` where there is a row that it does not know.
        """
        rows = [self._found.get(key) for key in keys_of(batch)]
        known = [row for row in rows if row is not None]
        if len(known) < len(rows):
            return None
        mask = length_mask(batch.response_lengths)
        flat = torch.cat(known).to(mask.device)
        return flat.new_zeros(mask.shape).masked_scatter(mask, flat)

    def save(self) -> None:
        """Write what was taken in since; whole files only, so that a kill leaves none half written."""
        if not self._new:
            return
        rows, keys = list(self._new.values()), b"".join(self._new)
        path = self.folder / f"{blake2b(keys, digest_size=8).hexdigest()}.safetensors"
        tensors = {
            "keys": torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(len(rows), -1),
            "lengths": torch.tensor([len(row) for row in rows]),
            "logprobs": torch.cat(rows),
        }
        write_tensors(path, tensors, setting=_SETTING)
        self._new.clear()


def keys_of(batch: SequenceBatch) -> Iterable[bytes]:
    """Yield a digest of each row: of its token ids, and of where the response begins.

    Example:
        >>> ids, two = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 9]]), torch.tensor([2, 2])
        >>> first, second = keys_of(SequenceBatch(ids, two, torch.tensor([1, 1])))
        >>> first == second, len(first)  # what lies behind the end does not count
        (True, 16)
    """
    ids: Sequence[Sequence[int]] = batch.input_ids.tolist()
    for row, prompt, length in zip(ids, batch.prompt_lengths.tolist(), batch.lengths.tolist(), strict=True):
        numbers = torch.tensor([prompt, *row[:length]], dtype=torch.int64)
        yield blake2b(numbers.numpy().tobytes(), digest_size=16).digest()

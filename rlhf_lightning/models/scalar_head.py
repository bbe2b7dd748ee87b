"""One scalar a token: the reward model reads it at the last token, the value model before every response token."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.models.loading import load_config
from rlhf_lightning.models.packed import hidden_states_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ScalarModel(nn.Module):
    """A sequence-classification model with one label, read where we say and not where a padding id is found.

    transformers takes the last token that is not the padding id; where that id also ends every text, it scores the
    token *before* the end. Here positions come from lengths.

    Args:
        model: An ``AutoModelForSequenceClassification`` with one label.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.model = model

    def outputs(self, batch: SequenceBatch, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the scalar at some positions, shape (positions,), float32.

        Args:
            batch: Prompts and responses.
            rows: Row of each position, shape (positions,), int64.
            columns: Its place among the real tokens of the row, shape (positions,), int64.
        """
        hidden = hidden_states_at(self.model.base_model, batch, rows, columns)
        head = self.model.score
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 scores would tie
            # Not as a matrix product, which rounds a row by where it stands: equal responses are to tie.
            outputs = (hidden.to(head.weight.dtype) * head.weight[0]).sum(dim=-1)
            return (outputs if head.bias is None else outputs + head.bias).float()

    def scores(self, batch: SequenceBatch) -> Tensor:
        """Return the score of each sequence, read at its last real token, shape (batch,), float32."""
        lengths = batch.lengths
        return self.outputs(batch, torch.arange(len(lengths), device=lengths.device), lengths - 1)

    def values(self, batch: SequenceBatch) -> Tensor:
        """Return the value before each response token, shape (batch, response), float32, zero where masked."""
        mask = batch.response_mask
        flat = self.outputs(batch, *batch.predicting_positions())
        return flat.new_zeros(mask.shape).index_put(mask.nonzero(as_tuple=True), flat)

    @torch.no_grad()
    def normalize(self, *, mean: float, std: float) -> None:
        """Change the head so that it gives (what it gave - ``mean``) / ``std``; the weights of the trunk stay.

        Args:
            mean: Taken from every score.
            std: Above 0.
        """
        old = self.model.score
        head = nn.utils.skip_init(nn.Linear, old.in_features, 1, device=old.weight.device, dtype=old.weight.dtype)
        head.weight.copy_(old.weight / std)
        head.bias.copy_(((0.0 if old.bias is None else old.bias) - mean) / std)
        self.model.score = head


def score_statistics(path: str, *, asked_by: str) -> tuple[float, float]:
    """Return mean and standard deviation of the scores that a reward model's folder holds.

    Args:
        path: Folder or hub name.
        asked_by: What wants to normalise by them, for the error.

    Raises:
        UserError: If it holds none.
    """
    config = load_config(path)
    mean, std = (getattr(config, name, None) for name in ("score_mean", "score_std"))
    if not isinstance(mean, int | float) or not isinstance(std, int | float) or not std > 0:
        raise UserError(
            f"{asked_by}: normalize is true, but the config.json of {path!r} has score_mean {mean} and score_std "
            f"{std}; train it with RewardModule(store_score_statistics=True), or set normalize: false."
        )
    return float(mean), float(std)


def ensure_distinct_pad(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Give tokenizer and model a padding token that stands for nothing else, in place.

    transformers' own pooling, and so every program that loads the exported reward model, looks for the last token
    that is not padding. A tokenizer whose padding ends texts (or that has none) gets a new token ``<|pad|>``; where
    the embedding has no room for it, it grows by a row.
    """
    others = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in others:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            with torch.random.fork_rng(devices=[]):
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id

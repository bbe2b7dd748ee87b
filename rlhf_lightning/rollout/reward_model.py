"""The reward that a model gives: any Hugging Face sequence classifier with one label, of whatever tokenizer."""

import json
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_lightning.data.rendering import plain_template
from rlhf_lightning.data.token_cache import tokenizer_digest
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.rewards import normalize_scores
from rlhf_lightning.functional.sequences import SequenceBatch, pad_sequences
from rlhf_lightning.models.digests import model_digest
from rlhf_lightning.models.loading import foreign_token, load_sequence_classifier, load_tokenizer
from rlhf_lightning.models.memory_limit import MemoryLimit
from rlhf_lightning.models.scalar_head import ScalarModel, score_statistics
from rlhf_lightning.rollout.reward_sources import RewardSource, Scores, ScoringBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_lightning.data.chat import ConversationEncoder

logger = logging.getLogger("rlhf_lightning")


class RewardModel(RewardSource):
    """A Hugging Face reward model: ``AutoModelForSequenceClassification`` with one label.

    Where its tokenizer is the policy's, it reads the very tokens the policy produced; where not, the conversation is
    put through its own chat template and tokenizer.

    Args:
        path: Folder or hub name.
        batch_size: Sequences in one forward pass; larger is faster and needs more memory.
        name: Under which its scores are logged.
        normalize: True subtracts ``score_mean`` and divides by ``score_std`` of the model's config.json, which
            ``RewardModule(store_score_statistics=True)`` writes there, so that the scores of the responses it was
            measured on have mean 0 and variance 1; False takes scores as they are.
        as_transformers: Where a response is read. True: where transformers pools and TRL's RewardTrainer trains, behind
            what the chat template writes after the stop token (ChatML a line end), at the last token that is not the
            model's padding. False: at the response's last token. ``None`` is False where the model's config.json has
            ``scored_token_id``, which ``RewardModule`` writes, else True.

    References:
        Stiennon et al. 2020, "Learning to summarize from human feedback", section 3.4, shift scores to mean 0.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 32,
        name: str = "reward_model",
        normalize: bool = False,
        as_transformers: bool | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"RewardModel: batch_size is {batch_size}; it must be at least 1.")
        self.path, self.batch_size, self.name, self.normalize = path, batch_size, name, normalize
        self.as_transformers = as_transformers
        self.score_mean, self.score_std = 0.0, 1.0
        self.scored_token_id: int | None = None
        self.same_tokens = True
        self.memory = MemoryLimit("reward.batch_size")

    def setup(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Load model and tokenizer, and find out whether its tokens are the policy's."""
        if hasattr(self, "scalar"):
            return
        if self.normalize:
            self.score_mean, self.score_std = score_statistics(self.path, asked_by="RewardModel")
        self.tokenizer = load_tokenizer(self.path)
        model = load_sequence_classifier(self.path).eval().requires_grad_(False)
        self.scalar = ScalarModel(model)
        self.scored_token_id = getattr(model.config, "scored_token_id", None)
        if self.as_transformers is None:
            self.as_transformers = not hasattr(model.config, "scored_token_id")
        if self.as_transformers:
            self.scored_token_id = None  # it is the template that decides where it is read
        self.same_tokens = same_tokenization(tokenizer, self.tokenizer)
        if not self.same_tokens:
            logger.info("reward model '%s' has other tokens than the policy; it reads the text by its own", self.path)

    def digest(self) -> str | None:
        """Return a digest of weights, tokenizer and statistics."""
        if type(self) is not RewardModel:  # what a class of the user's own makes of them is not known
            return None
        how = f"{self.as_transformers} {self.score_mean} {self.score_std} {self.same_tokens} {self.name}"
        return f"{model_digest(self.scalar.model)} {tokenizer_digest(self.tokenizer)} {how}"

    @torch.no_grad()
    def score(self, batch: ScoringBatch) -> Scores:
        """Score each response at its last token, or where transformers would read it."""
        if self.as_transformers:
            sequences = self._as_pooled(batch)
        else:
            sequences = batch.sequences if self.same_tokens else self._retokenized(batch)
        order = sequences.lengths.argsort(descending=True)
        scores = torch.empty(len(order), device=order.device)

        def read(rows: Tensor) -> None:
            scores[rows] = self.scalar.scores(sequences.select(rows))

        self.memory.each(order.split(self.batch_size), sequences.lengths, read)
        scores = normalize_scores(scores, mean=self.score_mean, std=self.score_std)
        return Scores(scores, {self.name: scores})

    def _retokenized(self, batch: ScoringBatch) -> SequenceBatch:
        from rlhf_lightning.data.chat import ConversationEncoder

        chat = isinstance(batch.prompts[0], list)
        encoder = ConversationEncoder(self.tokenizer, chat=chat)
        rows, prompt_lengths, response_lengths = [], [], []
        for prompt, response, finished in zip(batch.prompts, batch.responses, batch.finished.tolist(), strict=True):
            prompt_ids, response_ids = encoder.encode(prompt, response)
            response_ids = response_ids if finished else response_ids[:-1]
            rows.append(prompt_ids + response_ids)
            prompt_lengths.append(len(prompt_ids))
            response_lengths.append(len(response_ids))
        device = batch.sequences.input_ids.device
        ids, _ = pad_sequences(rows, pad_id=0)
        lengths = torch.tensor([prompt_lengths, response_lengths], device=device)
        return SequenceBatch(ids.to(device), lengths[0], lengths[1])

    def _as_pooled(self, batch: ScoringBatch) -> SequenceBatch:
        """Return rows that end where transformers pools: attention looks backwards, so what follows changes nothing."""
        from rlhf_lightning.data.chat import ConversationEncoder

        encoder = ConversationEncoder(self.tokenizer, chat=isinstance(batch.prompts[0], list))
        padding = self.scalar.model.config.pad_token_id
        rows = self._policys_rows(batch, encoder) if self.same_tokens else self._own_rows(batch, encoder)
        for row in rows:
            while len(row) > 1 and row[-1] == padding:
                row.pop()
        ids, lengths = (each.to(batch.finished.device) for each in pad_sequences(rows, pad_id=0))
        return SequenceBatch(ids, torch.zeros_like(lengths), lengths)

    def _policys_rows(self, batch: ScoringBatch, encoder: "ConversationEncoder") -> list[list[int]]:
        """Return the policy's tokens, and behind a finished reply what the template writes there."""
        whole = encoder.encode_whole("a", "a")
        behind = whole[encoder.after_stop(whole) :] if encoder.chat else []
        every = zip(batch.sequences.input_ids.tolist(), batch.sequences.lengths.tolist(), strict=True)
        rows = [ids[:length] for ids, length in every]
        return [row + behind if row[-1] == encoder.stop_id else row for row in rows]

    def _own_rows(self, batch: ScoringBatch, encoder: "ConversationEncoder") -> list[list[int]]:
        """Return tokens of its own, of the whole text; of a reply that was cut off without its end."""
        rows = []
        for prompt, response, finished in zip(batch.prompts, batch.responses, batch.finished.tolist(), strict=True):
            row = encoder.encode_whole(prompt, response)
            rows.append(row if finished else row[: encoder.after_stop(row) - 1])
        return rows


def same_tokenization(a: "PreTrainedTokenizerBase", b: "PreTrainedTokenizerBase") -> bool:
    """Tell whether tokens of ``a`` mean the same to ``b``, which may have more, and both template chats alike."""
    if foreign_token(a, b) is not None or _template(a) != _template(b):
        return False
    if a.is_fast and b.is_fast:
        parts = [json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (a, b)]
        return all(parts[0][key] == parts[1][key] for key in ("model", "normalizer", "pre_tokenizer"))
    return type(a) is type(b)


def _template(tokenizer: "PreTrainedTokenizerBase") -> object:
    """Return the chat template; that of a reward model of ours as it was before it was trimmed."""
    template = tokenizer.chat_template or ""
    return plain_template(template) if isinstance(template, str) else template

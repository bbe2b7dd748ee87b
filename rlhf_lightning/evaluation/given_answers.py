"""What a comparison measures on given answers, without sampling: likelihood, pairs, and rewards on pairs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.answer_sets import (
    EncodedAnswers,
    EncodedPairs,
    LikelihoodSet,
    PairSet,
    longest,
    read_answers,
    read_pairs,
)
from rlhf_lightning.evaluation.cache import ResultCache
from rlhf_lightning.evaluation.likelihood import Likelihoods
from rlhf_lightning.evaluation.pair_margins import PairMargins
from rlhf_lightning.evaluation.reward_pairs import RewardsOnPairs
from rlhf_lightning.evaluation.sections import Measurement
from rlhf_lightning.rollout.reward_sources import RewardSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class GivenAnswers:
    """Named data sets of answers and of pairs, as asked for and in tokens.

    Attributes:
        likelihood: Sets whose likelihood is measured.
        answers: The same in tokens.
        pair_sets: Sets of preference pairs.
        pairs: The same in tokens.
        seed: Fixed which rows were drawn.
    """

    likelihood: Mapping[str, LikelihoodSet]
    answers: Mapping[str, EncodedAnswers]
    pair_sets: Mapping[str, PairSet]
    pairs: Mapping[str, EncodedPairs]
    seed: int

    @classmethod
    def read(
        cls,
        likelihood: Mapping[str, LikelihoodSet],
        pair_sets: Mapping[str, PairSet],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        seed: int,
    ) -> "GivenAnswers":
        """Read, draw and tokenise all sets.

        Args:
            likelihood: Sets of answers by name.
            pair_sets: Sets of pairs by name.
            tokenizer: That of all models.
            seed: Fixes which rows are drawn, and all intervals.

        Raises:
            UserError: If a set cannot be read.
        """
        answers = {
            name: read_answers(wanted, tokenizer, seed=seed, where=f"likelihood.{name}")
            for name, wanted in likelihood.items()
        }
        pairs = {
            name: read_pairs(wanted, tokenizer, seed=seed, where=f"pairs.{name}") for name, wanted in pair_sets.items()
        }
        return cls(likelihood, answers, pair_sets, pairs, seed)

    def refuse_too_long(self, reaches: Mapping[str, int | None]) -> None:
        """Refuse sets that reach beyond the positions of a model.

        Args:
            reaches: Tokens that each model reads, by its name; ``None`` where its config does not say.

        Raises:
            UserError: If a sequence is longer.
        """
        lengths = {f"likelihood.{name}": longest([found.sequences]) for name, found in self.answers.items()}
        lengths |= {f"pairs.{name}": longest([found.chosen, found.rejected]) for name, found in self.pairs.items()}
        for model, reach in reaches.items():
            for name, length in lengths.items():
                if reach is not None and length > reach:
                    raise UserError(
                        f"{name} has sequences of {length} tokens, but models.{model} reads at most {reach}; lower "
                        f"{name}.max_length."
                    )

    def measures(
        self, rewards: Mapping[str, RewardSource], base: str, device: torch.device, batch_size: int, cache: ResultCache
    ) -> list[Measurement]:
        """Return what measures models and rewards on these sets.

        Args:
            rewards: By name, set up already.
            base: Name of the model that the others are measured from.
            device: Where models and rewards run.
            batch_size: Answers in one forward pass.
            cache: Where log-probabilities and scores are kept.
        """
        return [
            Likelihoods(self.likelihood, self.answers, base=base, batch_size=batch_size, seed=self.seed, cache=cache),
            PairMargins(self.pair_sets, self.pairs, base=base, batch_size=batch_size, seed=self.seed, cache=cache),
            RewardsOnPairs(self.pair_sets, self.pairs, rewards, device=device, seed=self.seed, cache=cache),
        ]

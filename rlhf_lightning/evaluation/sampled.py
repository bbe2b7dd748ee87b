"""What a comparison measures on sampled answers: scores, diversity, best-of-n, score against KL, questions."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_lightning.evaluation.best_of_n import best_of_n_section, measure_best_of_n
from rlhf_lightning.evaluation.diversity import diversity_section
from rlhf_lightning.evaluation.formatting import without_home
from rlhf_lightning.evaluation.frontier import frontier_section
from rlhf_lightning.evaluation.generations import Bench, Generations
from rlhf_lightning.evaluation.judged import judged_section
from rlhf_lightning.evaluation.named_models import NamedModel
from rlhf_lightning.evaluation.questions import Questions
from rlhf_lightning.evaluation.sections import Section
from rlhf_lightning.evaluation.summary import ModelSummary, summarize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class SampledAnswers:
    """Lets each model answer the prompts and the questions; a :class:`Measurement`.

    Args:
        bench: What is asked, and who scores.
        models: All models, in the order of the report.
        base: Name of the model that the others are measured against.
        base_model: That model, on the bench's device.
        questions: Questions of the user's own, which take up the answers.
        best_of: Each n of best-of-n.
        samples: Answers of the base to each prompt for that.
    """

    def __init__(
        self,
        bench: Bench,
        models: Sequence[NamedModel],
        *,
        base: str,
        base_model: "PreTrainedModel",
        questions: Questions,
        best_of: Sequence[int],
        samples: int,
    ) -> None:
        self.bench, self.models, self.base, self.base_model = bench, models, base, base_model
        self.questions, self.best_of, self.samples = questions, best_of, samples
        self.answers: dict[str, Generations] = {}

    def take(self, name: str, model: "PreTrainedModel") -> None:
        """Let a model answer, and measure its answers."""
        logger.info("%s answers %d prompts", name, len(self.bench.prompt_ids))
        path = next(one.path for one in self.models if one.name == name)
        self.answers[name] = self.bench.answer(name, without_home(path), model, self.base_model)
        self.questions.put(self.bench, name, model)

    def summaries(self) -> list[ModelSummary]:
        """Return the headline numbers of each model."""
        base = self.answers[self.base]
        return [summarize(self.answers[model.name], base, seed=self.bench.seed) for model in self.models]

    def sections(self, names: list[str]) -> list[Section]:
        """Return what was measured beside the headline numbers."""
        answers, seed = [self.answers[name] for name in names], self.bench.seed
        base = self.answers[self.base]
        best = measure_best_of_n(self.bench, self.base_model, base, best_of=self.best_of, samples=self.samples)
        found = [
            diversity_section(answers, self.base, seed=seed),
            judged_section(answers, self.base, seed=seed),
            best_of_n_section(best, self.base, samples=self.samples),
            frontier_section(self.models, self.summaries(), self.base, best),
        ]
        return [section for section in found if section is not None]

"""Questions of the user's own, answered by every model: once greedily and once sampled."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.generations import Bench
from rlhf_lightning.rollout.collect import decode_responses
from rlhf_lightning.seeding import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Question:
    """One question and what became of it.

    Attributes:
        prompt: The question.
        greedy: Each model's likeliest answer, token by token, by the name of the model.
        sampled: One answer of each model, drawn as the comparison draws them (at temperature 1 where that is greedy),
            with the same random numbers for all.
    """

    prompt: str
    greedy: dict[str, str] = field(default_factory=dict)
    sampled: dict[str, str] = field(default_factory=dict)


class Questions(NamedTuple):
    """All questions, and how they are put.

    Attributes:
        asked: The questions, which take up the answers.
        prompt_ids: The same in tokens.
    """

    asked: list[Question]
    prompt_ids: list[list[int]]

    def put(self, bench: Bench, name: str, model: "PreTrainedModel") -> None:
        """Put them to one model.

        Args:
            bench: How answers are drawn.
            name: What the model is called.
            model: The model, on the bench's device.
        """
        if not self.asked:
            return
        greedy = replace(bench.sampling, temperature=0.0, top_k=0, top_p=1.0)
        sampled = replace(bench.sampling, temperature=bench.sampling.temperature or 1.0)
        seed = derive_seed(bench.seed, "questions")
        for sampling, place in ((greedy, "greedy"), (sampled, "sampled")):
            sequences, _ = bench.sample(model, self.prompt_ids, sampling, seed)
            for question, text in zip(self.asked, decode_responses(bench.tokenizer, sequences), strict=True):
                getattr(question, place)[name] = text


def checked_questions(questions: Sequence[str] | None) -> list[str]:
    """Return the questions.

    Raises:
        UserError: If one says nothing or stands there twice.
    """
    for question in questions or []:
        if not question.strip():
            raise UserError("questions has an empty one; give each as text.")
        if list(questions or []).count(question) > 1:
            raise UserError(f"questions has {question!r} twice; ask it once.")
    return list(questions or [])

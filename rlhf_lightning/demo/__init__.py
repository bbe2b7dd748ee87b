"""The embedded default: data, tokenizer and model shape of a demo that needs no network.

``builtin:demo/<name>`` as the source of a data module reads :func:`builtin_rows`; ``builtin:demo`` as the name of a model
is the folder ``base`` beside this file: a tokenizer and the config of a Llama of a million parameters, without weights.
"""

import random

from rlhf_lightning.demo.grammar import Question, sample_answer, split_questions
from rlhf_lightning.errors import UserError, did_you_mean

TRAINING_PAIRS_PER_QUESTION = 3
_NAMES = ("train", "eval", "prompts", "eval_prompts")


def builtin_rows(name: str) -> list[dict[str, str]]:
    """Return the rows of one of the demo's data sets; the same ones every time.

    The two answers of a pair are drawn apart from one another. Length alone does not tell them apart: the longer answer
    is the chosen one in ... of the training pairs, ties counted as half.

    Args:
        name: "train" (5184 pairs with columns prompt, chosen and rejected), "eval" (240 pairs on held-out questions),
            "prompts" (the 1728 training questions, column prompt) or "eval_prompts" (the 240 held-out questions).

    Raises:
        UserError: If there is no data set of that name.

    Example:
        >>> builtin_rows("eval_prompts")[0]
        {}
    """
    if name not in _NAMES:
        raise UserError(
            f"builtin:demo/{name}: the demo has no data set '{name}', only {', '.join(_NAMES)}."
            f"{did_you_mean(name, _NAMES)}"
        )
    train, held_out = split_questions()
    match name:
        case "train":
            return _pairs(train * TRAINING_PAIRS_PER_QUESTION, seed=1)
        case "eval":
            return _pairs(held_out, seed=2)
        case "prompts":
            return [{"prompt": question.text} for question in train]
        case _:
            return [{"prompt": question.text} for question in held_out]


def _pairs(questions: tuple[Question, ...], *, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [
        {
            "prompt": question.text,
            "chosen": sample_answer(question, "human", rng),
            "rejected": sample_answer(question, "stiff", rng),
        }
        for question in questions
    ]

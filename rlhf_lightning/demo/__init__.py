"""The embedded default: data, tokenizer and model shape of a demo that needs no network.

``builtin:demo/<name>`` as the source of a data module reads :func:`builtin_rows`; ``builtin:demo`` as the name of a
model is the folder ``base`` beside this file: a tokenizer and the config of a Llama of about a million parameters,
without weights.
"""

import random

from rlhf_lightning.demo.grammar import Question, sample_answer, split_questions
from rlhf_lightning.errors import UserError, did_you_mean

TRAINING_PAIRS_PER_QUESTION = 4
EVALUATION_PAIRS_PER_QUESTION = 2
_NAMES = ("train", "eval", "prompts", "eval_prompts")


def builtin_rows(name: str) -> list[dict[str, str]]:
    """Return the rows of one of the demo's data sets; the same ones every time.

    The two answers of a pair are drawn independently. Their length in tokens does not tell them apart: the answer with
    more tokens is the chosen one in 0.52 of the training pairs and 0.55 of the held-out ones, ties counted as half, and
    the best threshold on the length of a single answer is right in 0.53. (In letters the stiff voice is longer.)

    Args:
        name: "train" (4416 pairs with columns prompt, chosen and rejected), "eval" (480 pairs on held-out questions),
            "prompts" (the 1104 training questions, column prompt) or "eval_prompts" (the 240 held-out questions).

    Returns:
        New dicts, of strings only.

    Raises:
        UserError: If there is no data set of that name.

    Example:
        >>> builtin_rows("eval_prompts")[0]
        {'prompt': 'Why do people enjoy noodle soup with kids?'}
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
            return _pairs(held_out * EVALUATION_PAIRS_PER_QUESTION, seed=2)
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

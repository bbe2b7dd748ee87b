"""Making prompts and responses fit into so many tokens, and counting what was cut off."""

from collections import Counter
from typing import Literal

from rlhf_lightning.data.chat import ConversationEncoder
from rlhf_lightning.errors import UserError


def cut_prompt(encoder: ConversationEncoder, prompt_ids: list[int], max_length: int, counts: Counter[str]) -> list[int]:
    """Truncate a prompt on the left to ``max_length`` tokens and count it where something was cut off."""
    counts["prompts_truncated"] += len(prompt_ids) > max_length
    return encoder.truncate_prompt(prompt_ids, max_length)


def cut_responses(
    prompt_ids: list[int],
    responses: list[list[int]],
    *,
    max_length: int,
    overlong: Literal["truncate", "drop"],
    counts: Counter[str],
) -> list[list[int]] | None:
    """Cut responses on the right so that each fits behind the prompt, or refuse them all.

    Args:
        prompt_ids: Ids of the prompt, fewer than ``max_length``.
        responses: Ids of each response to it.
        max_length: Tokens of prompt and response together.
        overlong: What to do where one is longer: ``"truncate"`` cuts its end off, stop token and all, ``"drop"``
            refuses.
        counts: Where ``responses_truncated`` or ``dropped_overlong`` is counted.

    Returns:
        The responses, or ``None`` where they are to be dropped.

    Example:
        >>> cut_responses([1], [[5, 2], [5, 6, 2]], max_length=3, overlong="truncate", counts=Counter())
        [[5, 2], [5, 6]]
    """
    room = max_length - len(prompt_ids)
    too_long = sum(len(response) > room for response in responses)
    if too_long and overlong == "drop":
        counts["dropped_overlong"] += 1
        return None
    counts["responses_truncated"] += too_long
    return [response[:room] for response in responses]


def check_lengths(max_length: int, max_prompt_length: int) -> None:
    """Refuse lengths that leave no room for a response.

    Raises:
        UserError: Unless 1 <= max_prompt_length < max_length.
    """
    if not 1 <= max_prompt_length < max_length:
        raise UserError(
            f"max_prompt_length is {max_prompt_length} and max_length {max_length}; expected 1 <= max_prompt_length < "
            "max_length, as the response needs room too."
        )

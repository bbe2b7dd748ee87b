"""Data in: files and hub data sets, the shapes they come in, token ids, batches, and the Lightning data modules.

Names are imported when they are first used, as the data modules pull in lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_lightning.data.chat import ConversationEncoder
    from rlhf_lightning.data.collate import (
        LabelledBatch,
        PairBatch,
        PromptBatch,
        collate_labelled,
        collate_pairs,
        collate_prompts,
        collate_sequences,
    )
    from rlhf_lightning.data.preferences import PreferenceDataModule
    from rlhf_lightning.data.prompts import PromptDataModule
    from rlhf_lightning.data.readers import read_rows
    from rlhf_lightning.data.shapes import Demonstration, Pair, parse_demonstration, parse_pair, parse_prompt
    from rlhf_lightning.data.stream import BatchStream, EvalBatches
    from rlhf_lightning.data.text import DemonstrationDataModule
    from rlhf_lightning.data.unpaired import UnpairedDataModule

_HOMES = {
    "BatchStream": "stream",
    "ConversationEncoder": "chat",
    "Demonstration": "shapes",
    "DemonstrationDataModule": "text",
    "EvalBatches": "stream",
    "LabelledBatch": "collate",
    "Pair": "shapes",
    "PairBatch": "collate",
    "PreferenceDataModule": "preferences",
    "PromptBatch": "collate",
    "PromptDataModule": "prompts",
    "UnpairedDataModule": "unpaired",
    "collate_labelled": "collate",
    "collate_pairs": "collate",
    "collate_prompts": "collate",
    "collate_sequences": "collate",
    "parse_demonstration": "shapes",
    "parse_pair": "shapes",
    "parse_prompt": "shapes",
    "read_rows": "readers",
}

__all__ = [
    "BatchStream",
    "ConversationEncoder",
    "Demonstration",
    "DemonstrationDataModule",
    "EvalBatches",
    "LabelledBatch",
    "Pair",
    "PairBatch",
    "PreferenceDataModule",
    "PromptBatch",
    "PromptDataModule",
    "UnpairedDataModule",
    "collate_labelled",
    "collate_pairs",
    "collate_prompts",
    "collate_sequences",
    "parse_demonstration",
    "parse_pair",
    "parse_prompt",
    "read_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

"""How to load the model: a few lines of transformers that run as they stand."""

from typing import Any

from rlhf_lightning.model_card.records import RunRecords

_TEXT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

path = {path}
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
{inputs}
output = model.generate(**inputs, {options})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_CHAT_INPUTS = """\
messages = [{"role": "user", "content": "How was your day?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
_PLAIN_INPUTS = """\
inputs = tokenizer("Once upon a time", return_tensors="pt")"""

_SCORE = """\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

path = {path}
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForSequenceClassification.from_pretrained(path)
{ids}
end = max(place for place, token in enumerate(ids) if token == model.config.scored_token_id)
with torch.no_grad():
    print(model(input_ids=torch.tensor([ids[: end + 1]])).logits[0, 0].item())  # higher is better
"""
_CHAT_IDS = """\
messages = [{"role": "user", "content": "How was your day?"}, {"role": "assistant", "content": "It was lovely!"}]
ids = tokenizer.apply_chat_template(messages, return_dict=False)"""
_PLAIN_IDS = """\
stop = tokenizer.convert_ids_to_tokens(model.config.scored_token_id)
ids = tokenizer("How was your day? " + "It was lovely!" + stop)["input_ids"]"""


def loading_code(records: RunRecords, repository: str | None = None) -> str:
    """Return Python code that loads the model and uses it once, as it was trained to be used.

    Args:
        records: Of the run.
        repository: Its name on the Hub; ``None`` loads it from the present folder.
    """
    path = repr(repository).replace("'", '"') if repository else '"."  # the folder of this file'
    chat = records.data_settings.get("chat") is not False
    if records.scores:
        return _SCORE.format(path=path, ids=_CHAT_IDS if chat else _PLAIN_IDS)
    options = ", ".join(f"{name}={value!r}" for name, value in _options(records).items())
    return _TEXT.format(path=path, inputs=_CHAT_INPUTS if chat else _PLAIN_INPUTS, options=options)


def _options(records: RunRecords) -> dict[str, Any]:
    """Return the arguments of ``generate`` that sample as the run did."""
    sampling = {name: records.setting("sampling", name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
    length = records.data_settings.get("max_length")
    limit = {"max_new_tokens": sampling.pop("max_new_tokens")}
    if limit["max_new_tokens"] is None:
        limit = {"max_length": length}
    draws = sampling["temperature"] != 0
    how: dict[str, Any] = {"do_sample": True, **sampling} if draws else {"do_sample": False}
    if how.get("top_k") is None and draws:
        how["top_k"] = 0  # transformers takes 50 by itself
    return {name: value for name, value in (limit | how | _stops(records)).items() if value is not None}


def _stops(records: RunRecords) -> dict[str, Any]:
    """Return what ends a response, where that is another token than the tokenizer's own."""
    named = records.setting("sampling", "stop_tokens") or records.data_settings.get("stop_token")
    return {} if not named else {"eos_token_id": _TokenIds([named] if isinstance(named, str) else list(named))}


class _TokenIds:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens

    def __repr__(self) -> str:
        return f"tokenizer.convert_tokens_to_ids({[str(token) for token in self.tokens]!r})"

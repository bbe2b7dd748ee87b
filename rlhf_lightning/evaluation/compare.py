"""``compare``: let several models answer the same prompts, measure the answers, and write a report."""

import json
import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import torch

from rlhf_lightning.earlier import set_aside
from rlhf_lightning.errors import UserError, did_you_mean
from rlhf_lightning.evaluation.answer_sets import LikelihoodSet, PairSet
from rlhf_lightning.evaluation.curves import Plot, read_curves, training_seconds
from rlhf_lightning.evaluation.formatting import text_table, without_home
from rlhf_lightning.evaluation.generations import Bench, Generations
from rlhf_lightning.evaluation.given_answers import GivenAnswers
from rlhf_lightning.evaluation.judges import Judges
from rlhf_lightning.evaluation.prompts import PromptSet, encode_prompts, read_prompts
from rlhf_lightning.evaluation.report import render
from rlhf_lightning.evaluation.sections import Measurement
from rlhf_lightning.evaluation.summary import Comparison, summarize
from rlhf_lightning.models.loading import (
    context_length,
    foreign_token,
    load_causal_lm,
    load_config,
    load_tokenizer,
    refuse_other_than_causal_lm,
    resolve_model,
)
from rlhf_lightning.rollout.reward_sources import RewardSource
from rlhf_lightning.rollout.sampler import SamplingConfig, resolve_stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_DEFAULT_SAMPLING = SamplingConfig()


def compare(
    models: dict[str, str],
    prompts: str,
    output: str,
    reward: RewardSource | None = None,
    base: str | None = None,
    text_metrics: dict[str, str] | None = None,
    sampling: SamplingConfig = _DEFAULT_SAMPLING,
    limit: int | None = 256,
    max_prompt_length: int = 256,
    chat: bool = True,
    text_words: int | None = None,
    curves: dict[str, str] | None = None,
    likelihood: dict[str, LikelihoodSet] | None = None,
    pairs: dict[str, PairSet] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, str]:
    """Let models answer the same prompts, and write a report of how they differ from a base.

    Written are ``report.html`` (one file, no network needed), ``report.json`` and ``samples.jsonl``. ``report.json``
    has the keys ``format`` ("rlhf_lightning.comparison/1"), ``created`` (UTC), ``base``, ``seed``, ``prompts``
    (``source``, ``count`` asked, ``available``), ``sampling`` (the arguments of SamplingConfig), ``reward`` (name or
    null), ``training_s`` (seconds by name, of the models whose curves were given under their name), ``curves`` (the
    argument), ``sections`` (what else was asked for, each with ``title``, ``note``, ``columns``, ``rows`` and ``data``)
    and ``models``, a list with the fields of
    :class:`~rlhf_lightning.evaluation.summary.ModelSummary`: ``name``, ``path``, ``score``, ``score_std``,
    ``score_quantiles``, ``score_parts``, ``score_difference``, ``win_rate``, ``metrics``, ``kl``, ``kl_per_token``,
    ``length``, ``finished``, ``distinct_2``. What has an interval is ``{"mean", "low", "high"}``; what does not apply
    is null. ``samples.jsonl`` has a line for each prompt and model: ``row``, ``model``, ``prompt``, ``response``,
    ``score``, ``kl``, ``length``, ``finished`` and each text metric.

    Reports are handed on: a path in the user's home folder is written with ``~``.

    Args:
        models: Hugging Face folder or hub name of each model, by the name that the report calls it. They must share one
            tokenizer and chat template.
        prompts: Data source of the prompts: a file, a hub name or ``builtin:demo/eval_prompts``.
        output: Folder to write into.
        reward: What scores the answers: RewardModel, FunctionReward, WeightedSum or your own.
        base: Name of the model that the others are measured against; ``null`` takes the first.
        text_metrics: Further numbers by name: import path of a function with a reward function's signature, such as
            ``rlhf_lightning.demo.voice:human_voice``.
        sampling: What to sample.
        limit: Prompts to draw, by the seed; ``null`` takes all.
        max_prompt_length: Tokens of a prompt that are kept, the last ones.
        chat: Apply the chat template; false takes prompts as plain text.
        text_words: Take this many words of a row of plain ``text`` as its prompt; ``null`` refuses such rows.
        curves: Path of the ``metrics.jsonl`` of a training run, by the name that the report calls it; under the name
            of a model it also tells how long that was trained.
        likelihood: Data sets by name, on whose answers the mean log-probability of each model is measured, such as
            ``{train: {source: pairs.jsonl}, unseen: {source: dolly.jsonl}}``.
        pairs: Data sets of preference pairs by name, on which models and reward are judged, such as
            ``{held_out: {source: pairs.jsonl}}``.
        batch_size: Prompts or given answers in one forward pass; changes the speed and the memory, not the answers.
        seed: Fixes which prompts are asked and shown, all draws and the intervals.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; ``auto`` takes a GPU where there is one.

    Returns:
        ``table`` (text to print), and the paths ``report``, ``json`` and ``samples``.

    Raises:
        UserError: If a model, the prompts, a reward, a metric, a curve or a number is not what it should be.
    """
    _check_numbers({"limit": limit, "max_prompt_length": max_prompt_length, "batch_size": batch_size})
    base_name = _checked_base(models, base)
    _check_output(Path(output))
    torch_device = _checked_device(device)
    judges = Judges.build(reward, _checked_metrics(text_metrics))
    plots = read_curves(curves or {})
    prompt_set = read_prompts(prompts, limit=limit, seed=seed, chat=chat, text_words=text_words)
    tokenizer, prompt_ids = _shared_tokens(models, base_name, prompt_set, max_prompt_length, chat=chat)
    _check_context(models, prompt_ids, sampling)
    stop_ids = resolve_stop_ids(tokenizer, sampling.stop_tokens)
    given = GivenAnswers.read(likelihood or {}, pairs or {}, tokenizer, seed=seed)
    given.refuse_too_long({name: context_length(load_config(path)) for name, path in models.items()})
    judges.setup(tokenizer, torch_device)
    measures = given.measures({} if reward is None else {reward.name: reward}, base_name, torch_device, batch_size)
    bench = Bench(prompt_set, prompt_ids, tokenizer, stop_ids, sampling, judges, torch_device, seed, batch_size)
    answers = _answer_all(bench, models, base_name, measures)
    of_base = next(answer for answer in answers if answer.name == base_name)
    comparison = Comparison(
        base=base_name,
        prompts=prompt_set._replace(source=without_home(prompt_set.source)),
        answers=answers,
        models=[summarize(answer, of_base, seed=seed) for answer in answers],
        sampling=sampling,
        reward=None if reward is None else reward.name,
        seed=seed,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        training_s=training_seconds(curves or {}),
        sections=[section for measure in measures for section in measure.sections(list(models))],
    )
    return _write(comparison, plots, curves or {}, Path(output))


def _answer_all(
    bench: Bench, models: Mapping[str, str], base_name: str, measures: Sequence[Measurement]
) -> list[Generations]:
    """Let each model answer, and measure it, each loaded once and only the base kept."""
    base = _load(models[base_name], bench.device)
    answers = {}
    for name, path in models.items():
        model = base if name == base_name else _load(path, bench.device)
        logger.info("%s answers %d prompts", name, len(bench.prompt_ids))
        answers[name] = bench.answer(name, without_home(path), model, base)
        for measure in measures:
            measure.take(name, model)
    return list(answers.values())


def _load(path: str, device: torch.device) -> "PreTrainedModel":
    model = load_causal_lm(path).eval().requires_grad_(False).to(device)
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise UserError(f"the weights of {path!r} hold numbers that are not finite; its training has diverged.")
    return model


def _write(
    comparison: Comparison, plots: Mapping[str, list[Plot]], curves: Mapping[str, str], output: Path
) -> dict[str, str]:
    from rlhf_lightning.loggers import to_json

    output.mkdir(parents=True, exist_ok=True)
    content = to_json({**comparison.as_dict(), "curves": {name: without_home(path) for name, path in curves.items()}})
    samples = [json.dumps(to_json(row), ensure_ascii=False, allow_nan=False) + "\n" for row in comparison.samples()]
    written = {
        "report": ("report.html", render(comparison, plots)),
        "json": ("report.json", json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"),
        "samples": ("samples.jsonl", "".join(samples)),
    }
    aside = set_aside(output, [output / name for name, _ in written.values()])
    if aside is not None:
        logger.info("the earlier report is now in %s", aside)
    for name, text in written.values():
        (output / name).write_text(text, encoding="utf-8")
    paths = {key: str(output / name) for key, (name, _) in written.items()}
    return {"table": text_table(comparison.table, comparison.names), **paths}


def _shared_tokens(
    models: Mapping[str, str], base: str, prompts: PromptSet, max_length: int, *, chat: bool
) -> tuple["PreTrainedTokenizerBase", list[list[int]]]:
    """Return the base's tokenizer and the prompts in tokens, which must be the same for every model."""
    from rlhf_lightning.data.chat import ConversationEncoder

    tokenizers = {name: load_tokenizer(path) for name, path in models.items()}
    own = tokenizers[base]
    for name, other in tokenizers.items():
        _check_vocabulary(name, base, other, own)
    prompt_ids = encode_prompts(ConversationEncoder(own, chat=chat), prompts.prompts, max_length)
    for name, other in tokenizers.items():
        encoder = ConversationEncoder(other, chat=chat)
        if name != base and encode_prompts(encoder, prompts.prompts, max_length) != prompt_ids:
            raise UserError(
                f"models {base!r} and {name!r} turn the same prompts into different tokens; give both the same chat "
                "template."
            )
    return own, prompt_ids


def _check_vocabulary(name: str, base: str, other: "PreTrainedTokenizerBase", own: "PreTrainedTokenizerBase") -> None:
    """Refuse a model to which a token of the base means something else; it may have further ones."""
    strange = foreign_token(own, other)
    if strange is not None:
        raise UserError(
            f"models {base!r} and {name!r} have different tokenizers (such as for {strange!r}); compare models of one "
            "tokenizer, as their answers are compared token by token."
        )


def _checked_base(models: Mapping[str, str], base: str | None) -> str:
    if not models:
        raise UserError("models is empty; name at least one, such as --models.base FOLDER.")
    for name, path in models.items():
        if not Path(resolve_model(path)).is_dir():
            continue
        if not any(Path(resolve_model(path)).glob("*.safetensors*")):
            raise UserError(f"models.{name}: the folder {path!r} has no weights (model.safetensors); train it first.")
        refuse_other_than_causal_lm(load_config(path), path)
    chosen = next(iter(models)) if base is None else base
    if chosen not in models:
        raise UserError(
            f"base is {chosen!r}, which is none of the models {', '.join(models)}.{did_you_mean(chosen, models)}"
        )
    return chosen


def _checked_metrics(text_metrics: Mapping[str, str] | None) -> dict[str, str]:
    taken = {"response", "score", "kl", "length", "finished", "row", "model", "prompt"}
    for name in text_metrics or {}:
        if name in taken:
            raise UserError(f"text_metrics: {name!r} is a name of the report's own; call it otherwise.")
    return dict(text_metrics or {})


def _check_numbers(numbers: Mapping[str, int | None]) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UserError(f"{name} is {number}; it must be at least 1.")


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"output {str(output)!r} is a file; give a folder to write the report into.")


def _check_context(models: Mapping[str, str], prompt_ids: list[list[int]], sampling: SamplingConfig) -> None:
    longest = max(len(ids) for ids in prompt_ids)
    for name, path in models.items():
        reach = context_length(load_config(path))
        if reach is not None and longest + sampling.max_new_tokens > reach:
            raise UserError(
                f"models.{name}: prompts of up to {longest} tokens and {sampling.max_new_tokens} new ones do not fit "
                f"into its {reach} positions; lower max_prompt_length or sampling.max_new_tokens."
            )


def _checked_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = shorten(str(error).strip().partition("\n")[0], 120, placeholder=" ...")
        raise UserError(
            f"device is {device!r}, which cannot be used here ({reason}); give auto, cpu or cuda."
        ) from error
    return chosen

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
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.answer_sets import LikelihoodSet, PairSet
from rlhf_lightning.evaluation.best_of_n import check_best_of
from rlhf_lightning.evaluation.cache import ResultCache
from rlhf_lightning.evaluation.curves import Plot, read_curves, training_seconds
from rlhf_lightning.evaluation.formatting import text_table, without_home
from rlhf_lightning.evaluation.generations import Bench
from rlhf_lightning.evaluation.given_answers import GivenAnswers
from rlhf_lightning.evaluation.judges import Judges
from rlhf_lightning.evaluation.named_models import (
    NamedModel,
    checked_base,
    named_models,
    refuse_other_vocabularies,
    refuse_short_contexts,
)
from rlhf_lightning.evaluation.prompts import encode_prompts, read_prompts
from rlhf_lightning.evaluation.questions import Question, Questions, checked_questions
from rlhf_lightning.evaluation.report import render
from rlhf_lightning.evaluation.report_markdown import render_markdown
from rlhf_lightning.evaluation.sampled import SampledAnswers
from rlhf_lightning.evaluation.sections import Measurement
from rlhf_lightning.evaluation.summary import Comparison
from rlhf_lightning.models.loading import context_length
from rlhf_lightning.rollout.reward_sources import Prompt, RewardSource
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
    judges: dict[str, RewardSource] | None = None,
    best_of: list[int] | None = None,
    best_of_samples: int = 64,
    questions: list[str] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: str = "auto",
    cache: str | None = "auto",
) -> dict[str, str]:
    """Let models answer the same prompts, and write a report of how they differ from a base.

    Written are ``report.html`` (one file, no network needed), ``report.md`` (the same in Markdown, without figures),
    ``report.json`` and ``samples.jsonl``. docs/report_schema.md lists the keys of ``report.json``. ``samples.jsonl``
    has a line for each prompt and model: ``row``, ``model``, ``prompt``, ``response``, ``score``, ``kl``, ``length``,
    ``finished``, each text metric, and, where there are further judges, ``judges`` (a score by judge).

    Reports are handed on: a path in the user's home folder is written with ``~``.

    Args:
        models: Hugging Face folder, hub name or ``.ckpt`` file of each model, by the name that the report calls it. A
            pattern such as ``runs/ppo/checkpoints/*.ckpt`` stands for a model of each step that it matches, called
            ``<name> step <n>``. They must share one tokenizer and chat template.
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
        judges: Further reward sources by name, which were not used in training; each scores the same answers.
        best_of: Numbers n for which to measure best-of-n sampling from the base, such as ``[4, 16]``; needs a reward.
        best_of_samples: Answers of the base to each prompt from which best-of-n is computed, over all subsets of n;
            more give narrower intervals and take longer. Counts with ``best_of`` only.
        questions: Prompts of your own that each model answers, once greedily and once sampled, side by side.
        batch_size: Prompts or given answers in one forward pass; changes the speed and the memory, not the answers.
        seed: Fixes which prompts are asked and shown, all draws and the intervals.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; ``auto`` takes a GPU where there is one.
        cache: Folder in which answers, log-probabilities and scores are kept by the content of all that they follow
            from, so that a comparison with one model more computes that one alone; ``auto`` is ``cache`` in
            ``output``, ``null`` keeps nothing. It may be deleted at any time.

    Returns:
        ``table`` (text to print), and the paths ``report``, ``markdown``, ``json`` and ``samples``.

    Raises:
        UserError: If a model, the prompts, a reward, a metric, a curve or a number is not what it should be.
    """
    _check_numbers({"limit": limit, "max_prompt_length": max_prompt_length, "batch_size": batch_size})
    check_best_of(best_of or [], best_of_samples, has_reward=reward is not None, temperature=sampling.temperature)
    candidates = named_models(models)
    base_name = checked_base(candidates, base)
    _check_output(Path(output))
    torch_device = _checked_device(device)
    results = ResultCache(Path(output) / "cache" if cache == "auto" else Path(cache) if cache else None)
    everyone = Judges.build(reward, _checked_metrics(text_metrics), judges, results)
    plots = read_curves(curves or {})
    prompt_set = read_prompts(prompts, limit=limit, seed=seed, chat=chat, text_words=text_words)
    texts = [*prompt_set.prompts, *checked_questions(questions)]
    tokenizer, ids = _shared_tokens(candidates, base_name, texts, max_prompt_length, chat=chat)
    refuse_short_contexts(candidates, max(map(len, ids)), sampling)
    stop_ids = resolve_stop_ids(tokenizer, sampling.stop_tokens)
    given = GivenAnswers.read(likelihood or {}, pairs or {}, tokenizer, seed=seed)
    given.refuse_too_long({model.name: context_length(model.config) for model in candidates})
    everyone.setup(tokenizer, torch_device)
    count = len(prompt_set.prompts)
    asked = Questions([Question(text) for text in questions or []], ids[count:])
    bench = Bench(
        prompt_set, ids[:count], tokenizer, stop_ids, sampling, everyone, torch_device, seed, batch_size, results
    )
    base_model = _of_name(candidates, base_name).load(torch_device)
    sampled = SampledAnswers(
        bench,
        candidates,
        base=base_name,
        base_model=base_model,
        questions=asked,
        best_of=best_of or [],
        samples=best_of_samples,
    )
    measures = [sampled, *given.measures(everyone.rewards, base_name, torch_device, batch_size, results)]
    _measure_all(candidates, base_name, base_model, measures)
    names = [candidate.name for candidate in candidates]
    sections = [section for measure in measures for section in measure.sections(names)]
    results.log()
    comparison = Comparison(
        base=base_name,
        prompts=prompt_set._replace(source=without_home(prompt_set.source)),
        answers=[sampled.answers[name] for name in names],
        models=sampled.summaries(),
        sampling=sampling,
        reward=None if reward is None else reward.name,
        seed=seed,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        training_s=training_seconds(curves or {}),
        sections=sections,
        questions=asked.asked,
    )
    return _write(comparison, plots, curves or {}, Path(output))


def _measure_all(
    candidates: Sequence[NamedModel], base_name: str, base: "PreTrainedModel", measures: Sequence[Measurement]
) -> None:
    """Measure each model, each loaded once and only the base kept."""
    for candidate in candidates:
        model = base if candidate.name == base_name else candidate.load(next(base.parameters()).device)
        for measure in measures:
            measure.take(candidate.name, model)
        del model  # before the next one is loaded


def _write(
    comparison: Comparison, plots: Mapping[str, list[Plot]], curves: Mapping[str, str], output: Path
) -> dict[str, str]:
    from rlhf_lightning.loggers import to_json

    output.mkdir(parents=True, exist_ok=True)
    content = to_json({**comparison.as_dict(), "curves": {name: without_home(path) for name, path in curves.items()}})
    samples = [json.dumps(to_json(row), ensure_ascii=False, allow_nan=False) + "\n" for row in comparison.samples()]
    written = {
        "report": ("report.html", render(comparison, plots)),
        "markdown": ("report.md", render_markdown(comparison)),
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
    candidates: Sequence[NamedModel], base_name: str, prompts: Sequence[Prompt], max_length: int, *, chat: bool
) -> tuple["PreTrainedTokenizerBase", list[list[int]]]:
    """Return the base's tokenizer and the prompts in tokens, which must be the same for every model."""
    from rlhf_lightning.data.chat import ConversationEncoder

    base = _of_name(candidates, base_name)
    refuse_other_vocabularies(candidates, base)
    prompt_ids = encode_prompts(ConversationEncoder(base.tokenizer, chat=chat), prompts, max_length)
    for model in candidates:
        encoder = ConversationEncoder(model.tokenizer, chat=chat)
        if model is not base and encode_prompts(encoder, prompts, max_length) != prompt_ids:
            raise UserError(
                f"models {base_name!r} and {model.name!r} turn the same prompts into different tokens; give both the "
                "same chat template."
            )
    return base.tokenizer, prompt_ids


def _of_name(candidates: Sequence[NamedModel], name: str) -> NamedModel:
    return next(candidate for candidate in candidates if candidate.name == name)


def _checked_metrics(text_metrics: Mapping[str, str] | None) -> dict[str, str]:
    taken = {"response", "score", "kl", "length", "finished", "row", "model", "prompt", "judges"}
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

"""Two tiny real models of one shape and different weights, and a run's metrics."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf_lightning.evaluation.formatting import TableRow
from rlhf_lightning.evaluation.generations import Generations
from rlhf_lightning.evaluation.judges import Judgement
from rlhf_lightning.evaluation.plots import Distribution
from rlhf_lightning.evaluation.prompts import PromptSet
from rlhf_lightning.evaluation.questions import Question
from rlhf_lightning.evaluation.sections import Section, distribution_figure
from rlhf_lightning.evaluation.statistics import Interval
from rlhf_lightning.evaluation.summary import Comparison, summarize
from rlhf_lightning.loggers import JSONLLogger
from rlhf_lightning.models.export import write_model_folder
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.rollout.reward_sources import Prompt
from rlhf_lightning.rollout.sampler import SamplingConfig

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of two models with the demo's tokenizer, called base and other."""
    folders = {}
    for seed, name in enumerate(("base", "other")):
        torch.manual_seed(seed)
        overrides = {**SHAPE, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2}
        model = load_causal_lm("builtin:demo", pretrained=False, config_overrides=overrides)
        folders[name] = str(tmp_path_factory.mktemp(name))
        write_model_folder(folders[name], model, load_tokenizer("builtin:demo"))
    return folders


@pytest.fixture
def metrics_file(tmp_path: Path) -> Path:
    """The metrics.jsonl of a run of 200 steps, validated every 50."""
    (tmp_path / "run").mkdir()
    logger = JSONLLogger(tmp_path / "run")
    for step in range(200):
        row = {"rollout/score": step / 100, "train/lr": 1e-4, "time/rollout_s": 1.0}
        logger.log_metrics({**row, **({"val/score": step / 100, "val/voice": 0.5} if step % 50 == 0 else {})}, step)
    return logger.path


def _answers(name: str, text: str, shift: float) -> Generations:
    """Twenty answers whose scores are 0, 0.1, ... 1.9 and the shift."""
    count = 20
    scores = torch.arange(count) / 10 + shift
    return Generations(
        name=name,
        path=f"runs/{text}",
        responses=[f"{text} {number}" for number in range(count)],
        lengths=torch.full((count,), 7),
        finished=torch.arange(count) % 2 == 0,
        kl=torch.full((count,), shift, dtype=torch.float64),
        judgement=Judgement(scores, {text: scores}, {f"metric {text}": scores}),
        repetition=torch.zeros(count),
    )


def _section(names: tuple[str, ...], text: str) -> Section:
    """A part of the report in which all that can be named is named ``text``."""
    means = [Interval(number / 10, number / 10 - 0.05, number / 10 + 0.05) for number in range(len(names))]
    rows = [
        Distribution(name, [0.0, 0.5, 1.0], mean, color)
        for color, (name, mean) in enumerate(zip(names, means, strict=True))
    ]
    figure = distribution_figure(rows, title=text, x_label=text)
    row = TableRow(text, text, "share", [*means])
    return Section("pairs", f"Pairs {text}", f"Note {text}", list(names), [row], [figure], {text: means})


@pytest.fixture(scope="session")
def make_comparison() -> Callable[..., Comparison]:
    """``make_comparison(names=("base", "ppo"), text="plain", base="base")``; ``more=True`` adds further parts."""

    def make(
        names: tuple[str, ...] = ("base", "ppo"), text: str = "plain", base: str = "base", *, more: bool = False
    ) -> Comparison:
        everything = [_answers(name, text, float(number)) for number, name in enumerate(names)]
        own = next(answer for answer in everything if answer.name == base)
        prompts: list[Prompt] = [text, [{"role": "system", "content": text}, {"role": text, "content": text}]] * 10
        said = {name: f"{text} {name}" for name in names}
        return Comparison(
            base=base,
            prompts=PromptSet(f"data/{text}", prompts, [{}] * 20, 40),
            answers=everything,
            models=[summarize(answer, own) for answer in everything],
            sampling=SamplingConfig(max_new_tokens=7),
            reward=text,
            seed=0,
            created="2026-01-01 00:00 UTC",
            sections=[_section(names, text)] if more else [],
            questions=[Question(text, said, dict(said))] if more else [],
        )

    return make

"""The comparison as one HTML file that needs no network and runs no script; all that models or data say is escaped."""

import html
from collections.abc import Mapping, Sequence
from importlib.resources import files

import torch

from rlhf_lightning.evaluation.curves import MAX_POINTS, Plot
from rlhf_lightning.evaluation.formatting import Kind, ends, plain, written
from rlhf_lightning.evaluation.generations import Generations
from rlhf_lightning.evaluation.plots import Distribution, histograms, interval_strip, line_chart
from rlhf_lightning.evaluation.sections import colors_of
from rlhf_lightning.evaluation.statistics import Interval
from rlhf_lightning.evaluation.summary import Comparison, ModelSummary, TableRow, headline
from rlhf_lightning.rollout.reward_sources import Prompt
from rlhf_lightning.rollout.sampler import SamplingConfig
from rlhf_lightning.seeding import derived_generator

SHOWN_SAMPLES = 12


def render(comparison: Comparison, curves: Mapping[str, Sequence[Plot]], *, shown: int = SHOWN_SAMPLES) -> str:
    """Return the report.

    Args:
        comparison: What was measured.
        curves: Plots of training runs by the name of the run.
        shown: How many prompts to show with every model's answer; drawn by the seed, not chosen.
    """
    sections = [
        _verdicts(comparison),
        _table(comparison),
        _distributions(comparison),
        _curves(curves),
        _samples(comparison, shown),
        _method(comparison),
    ]
    title = _title(comparison)
    style = files("rlhf_lightning.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{_escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{_escape(title)}</h1>
<p class="lede">{_escape(_lede(comparison))}</p>
{"".join(sections)}
<footer>Written by rlhf_lightning, {_escape(comparison.created)}. The numbers are in report.json, every answer in
samples.jsonl, beside this file.</footer>
</main>
</body>
</html>
"""


def color_of(comparison: Comparison, name: str) -> int:
    """Return the number of a model's colour: 0, grey, for the base, the others in turn."""
    return colors_of(comparison.names, comparison.base)[name]


def draw_samples(count: int, shown: int, seed: int) -> list[int]:
    """Return which prompts are shown: drawn without looking at them, in their order.

    Example:
        >>> draw_samples(3, 12, seed=0)
        [0, 1, 2]
    """
    return sorted(torch.randperm(count, generator=derived_generator(seed, "shown"))[:shown].tolist())


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


def _title(comparison: Comparison) -> str:
    others = [name for name in comparison.names if name != comparison.base]
    return f"{_listed(others)} against {comparison.base}" if others else f"{comparison.base} alone"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _lede(comparison: Comparison) -> str:
    prompts, sampling = comparison.prompts, comparison.sampling
    count = len(prompts.prompts)
    which = f"{count} prompts" if count == prompts.available else f"{count} of {prompts.available} prompts"
    score = f" Scores are from {comparison.reward}." if comparison.reward else ""
    return (
        f"{which} from {prompts.source}, answered once by each model with the same random numbers; "
        f"{_sampling(sampling)}.{score} Ranges are 95 % intervals."
    )


def _sampling(sampling: SamplingConfig) -> str:
    parts = ["greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"]
    if sampling.top_k:
        parts.append(f"top-k {sampling.top_k}")
    if sampling.top_p < 1:
        parts.append(f"top-p {sampling.top_p:g}")
    return ", ".join([*parts, f"at most {sampling.max_new_tokens} tokens"])


def _verdicts(comparison: Comparison) -> str:
    base = comparison.base_summary
    cards = []
    for model in comparison.models:
        if model.name != comparison.base:
            tiles = "".join(_tiles(model, base, comparison.table, comparison.names))
            cards.append(
                f'<section class="card verdict s{color_of(comparison, model.name)}">'
                f'<p>{_unbroken(_escape(headline(model, base)))}</p><dl class="tiles">{tiles}</dl></section>'
            )
    return "".join(cards)


def _tiles(model: ModelSummary, base: ModelSummary, table: Sequence[TableRow], names: Sequence[str]) -> list[str]:
    """Return the figures of a model that one looks at first: score, win rate, text metrics, KL."""
    own, bases = names.index(model.name), names.index(base.name)
    wanted = {"Score", "Win rate", "KL divergence", *model.metrics}
    return [
        _tile(row.label, row.cells[own], row.cells[bases], row.kind)
        for row in table
        if row.label in wanted and row.cells[own]
    ]


def _tile(label: str, value: Interval | float | None, before: Interval | float | None, kind: Kind) -> str:
    assert isinstance(value, Interval)
    was = ""
    if isinstance(before, Interval):
        was = f'<span class="from">{_minus(written(before.mean, kind).removesuffix(" %"))} → </span>'
    low, high = ends(value, kind)
    return (
        f'<div><dt>{_escape(label)}</dt><dd class="figure">{was}{_minus(written(value.mean, kind))}</dd>'
        f'<dd class="range">{_minus(low)} to {_minus(high)}</dd></div>'
    )


def _table(comparison: Comparison) -> str:
    colors = [color_of(comparison, name) for name in comparison.names]
    heads = "".join(
        f'<th scope="col" class="s{color}"><span class="dot"></span>{_escape(name)}</th>'
        for name, color in zip(comparison.names, colors, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row">{_escape(row.label)}<small>{_escape(row.note)}</small></th>'
        f"{''.join(_cell(cell, row.kind) for cell in row.cells)}{_strip(row, colors)}</tr>"
        for row in comparison.table
    )
    return (
        "<h2>Measured</h2>"
        '<p class="note">Means over the prompts; below each its 95 % interval, drawn beside it on a scale of its own.'
        "</p>"
        f'<div class="card scroll"><table><thead><tr><th></th>{heads}<th class="strip"></th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _strip(row: TableRow, colors: Sequence[int]) -> str:
    pairs = zip(row.cells, colors, strict=True)
    intervals = [(cell, color) for cell, color in pairs if isinstance(cell, Interval)]
    if len(intervals) < 2:
        return '<td class="strip"></td>'
    return f'<td class="strip">{interval_strip(intervals, title=f"Intervals of {row.label}")}</td>'


def _cell(value: Interval | float | None, kind: Kind) -> str:
    if value is None:
        return '<td class="none">–</td>'
    if not isinstance(value, Interval):
        return f"<td><b>{_minus(written(value, kind))}</b></td>"
    low, high = ends(value, kind)
    return f"<td><b>{_minus(written(value.mean, kind))}</b><small>{_minus(low)} to {_minus(high)}</small></td>"


def _minus(text: str) -> str:
    return _escape(text.replace("-", "−"))


def _unbroken(text: str) -> str:
    return text.replace(" %", "&nbsp;%")


def _distributions(comparison: Comparison) -> str:
    ordered = sorted(comparison.answers, key=lambda answer: answer.name != comparison.base)
    rows = [_distribution(comparison, answer) for answer in ordered if answer.scores is not None]
    if not rows:
        return ""
    title = "Distribution of the score of " + ", ".join(row.label for row in rows)
    wide = histograms(rows, title=title, x_label="score", width=1000)
    narrow = histograms(rows, title=title, x_label="score", width=340, row_height=104)
    others = f" The dashed outline repeats {comparison.base}." if len(rows) > 1 else ""
    note = f"Share of answers by score; the line is the mean, the shade its 95 % interval.{others}"
    return (
        "<h2>Scores</h2>"
        f'<p class="note">{_escape(note)}</p>'
        f'<figure class="card panel"><div class="wide">{wide}</div><div class="narrow">{narrow}</div></figure>'
    )


def _distribution(comparison: Comparison, answer: Generations) -> Distribution:
    summary = next(model for model in comparison.models if model.name == answer.name)
    assert answer.scores is not None
    assert summary.score is not None
    return Distribution(answer.name, answer.scores.tolist(), summary.score, color_of(comparison, answer.name))


def _curves(curves: Mapping[str, Sequence[Plot]]) -> str:
    if not curves:
        return ""
    runs = []
    for name, plots in curves.items():
        figures = [
            f'<figure class="card"><figcaption>{_escape(plot.title)}</figcaption>'
            f"{line_chart(plot.series, title=f'{name}: {plot.title}')}</figure>"
            for plot in plots
        ]
        runs.append(f'<h3>{_escape(name)}</h3><div class="grid">{"".join(figures)}</div>')
    note = (
        f"As logged. A curve of more than {MAX_POINTS} points is averaged over neighbours; the shade is one standard "
        "deviation among them to either side."
    )
    return f'<h2>Training</h2><p class="note">{note}</p>{"".join(runs)}'


def _samples(comparison: Comparison, shown: int) -> str:
    numbers = draw_samples(len(comparison.prompts.prompts), shown, comparison.seed)
    columns = _columns(len(comparison.answers))
    cards = []
    for number in numbers:
        answers = "".join(_answer(comparison, answer, number) for answer in comparison.answers)
        prompt = _prompt(comparison.prompts.prompts[number])
        cards.append(
            f'<article class="card sample"><div class="prompt">{prompt}</div>'
            f'<div class="answers" style="--columns: {columns}">{answers}</div></article>'
        )
    note = f"{len(numbers)} prompts, drawn by the seed and not chosen. All answers are in samples.jsonl."
    return f'<h2>Answers side by side</h2><p class="note">{note}</p>{"".join(cards)}'


def _columns(count: int) -> int:
    """Return in how many columns answers stand: up to three, four as two by two."""
    return count if count <= 3 else 2 if count == 4 else 3


def _prompt(prompt: Prompt) -> str:
    if isinstance(prompt, str) or len(prompt) == 1:
        return _text(prompt if isinstance(prompt, str) else prompt[0]["content"])
    return "".join(f'<span class="role">{_escape(turn["role"])}</span>{_text(turn["content"])}' for turn in prompt)


def _text(text: str) -> str:
    return f'<div class="text" dir="auto">{_escape(text)}</div>'


def _answer(comparison: Comparison, answer: Generations, number: int) -> str:
    facts = [f"{int(answer.lengths[number])} tokens"]
    if answer.scores is not None:
        facts.insert(0, f"score {_minus(plain(float(answer.scores[number])))}")
    text = answer.responses[number]
    body = _escape(text) if text.strip() else '<span class="empty">(empty)</span>'
    cut = "" if bool(answer.finished[number]) else ' <span class="cut">… cut off</span>'
    return (
        f'<section class="answer s{color_of(comparison, answer.name)}"><header>'
        f'<b><span class="dot"></span>{_escape(answer.name)}</b><span>{" · ".join(facts)}</span></header>'
        f'<div class="text" dir="auto">{body}{cut}</div></section>'
    )


def _method(comparison: Comparison) -> str:
    explained = {
        "Interval": "Of 95 %. A bootstrap over prompts (2,000 resamples, percentiles); for shares, and the win rate, "
        "Wilson's interval. It covers the draw of prompts and answers, not that of training runs.",
        "Difference, win rate": "Both compare the answers of two models to the same prompt.",
        "KL divergence": "Mean over answers of the log-probability by the model minus that by "
        f"{comparison.base}, summed over the tokens, at the temperature of sampling (at 1 for greedy answers). Top-k "
        "and top-p are not counted in, so with them it is no longer a divergence.",
        "Distinct-2": "Different pairs of neighbouring words over all of them, in all answers of a model. More text "
        "lowers it.",
        "Finished": "The answer ended with a stop token before the limit of tokens.",
        "Seed": str(comparison.seed),
    }
    models = [(f"Model {model.name}", f"<code>{_escape(model.path)}</code>") for model in comparison.models]
    entries = [*((name, _escape(text)) for name, text in explained.items()), *models]
    listed = "".join(f"<dt>{_escape(name)}</dt><dd>{text}</dd>" for name, text in entries)
    return f'<h2>How it was measured</h2><div class="card method"><dl>{listed}</dl></div>'

"""Draw J = score - kl_coef · KL of training runs by episode, beside the lines of base and best-of-n, as an SVG.

    python tools/plot_gain.py --table best_of_n.json --runs "1,024 episodes=runs/a1,runs/a2" ... --output FILE.svg

The runs after one name are its seeds: the line is their mean, the shade their standard deviation. Each point is the
mean over the rollouts of ``--window`` episodes, on training prompts, before the update. ``--table`` is what
tools/best_of_n.py wrote.
"""

import argparse
import json
import statistics
from pathlib import Path

from rlhf_lightning.evaluation.plots import Series, line_chart

_STYLE = """<style>
svg { font: 12px system-ui, sans-serif; background: #ffffff; }
.s0 { --c: #6d7686; } .s1 { --c: #0068a8; } .s2 { --c: #c95200; } .s3 { --c: #00805c; } .s4 { --c: #a8467f; }
.s5 { --c: #8a6500; }
.line { fill: none; stroke: var(--c); stroke-width: 2; } .band { fill: var(--c); opacity: 0.15; }
.dot { fill: var(--c); } .hover { fill: transparent; } .tick, .label { fill: #555d6b; font-size: 11px; }
.grid { stroke: #e2e5ea; } .axis { stroke: #8a93a2; }
</style>"""


def gains(run: str, kl_coef: float, window: int) -> dict[float, float]:
    """Return J by episode of the run in a folder, averaged over windows of episodes."""
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    by_window: dict[float, list[float]] = {}
    for row in rows:
        if "rollout/score" in row:
            place = window * -(-int(row["progress/episodes"]) // window)
            by_window.setdefault(place, []).append(row["rollout/score"] - kl_coef * row["rollout/kl"])
    return {place: statistics.fmean(values) for place, values in by_window.items()}


def drawn(name: str, runs: list[str], color: int, options: argparse.Namespace) -> Series:
    """Return the line of some seeds."""
    curves = [gains(run, options.kl_coef, options.window) for run in runs]
    places = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = [[curve[place] for curve in curves] for place in places]
    means = [statistics.fmean(each) for each in values]
    spread = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
    return Series(name, places, means, spread, color)


def write_chart(chart: str, path: str) -> None:
    """Write a chart of ``rlhf_lightning.evaluation.plots`` as a file of its own, with the style that a page gives."""
    start, mark, rest = chart.partition(">")
    Path(path).write_text(start + mark + _STYLE + rest + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True)
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=FOLDER,FOLDER")
    parser.add_argument("--kl_coef", type=float, default=0.05)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    table = json.loads(Path(options.table).read_text(encoding="utf-8"))
    named = [run.partition("=") for run in options.runs]
    lines = [drawn(name, folders.split(","), color, options) for color, (name, _, folders) in enumerate(named, start=1)]
    ends = (0.0, max(max(line.xs) for line in lines))
    levels = [name for name in table if name.startswith("best-of-")]
    lines += [
        Series(name, ends, [table[name]["J"][0]] * 2, color=color)
        for color, name in zip((0, 4, 5), levels, strict=False)
    ]
    chart = line_chart(lines, title="J by episode", x_label="episodes", width=760, height=360)
    write_chart(chart, options.output)


if __name__ == "__main__":
    main()

"""Measure how PPO's cost grows: with the batch, the length of responses, the size of the model, or the iterations.

    python tools/benchmark_growth.py --shape FOLDER --axis batch --values 8 16 32 64 128 256 --plot batch.svg
    python tools/benchmark_growth.py --shape FOLDER --axis response --values 32 64 128 256 512
    python tools/benchmark_growth.py --shape FOLDER --axis model --values 64 128 192 256 384
    python tools/benchmark_growth.py --shape FOLDER --axis iterations --values 4 40 400 4000

FOLDER holds a config.json of a Llama and a tokenizer, as of ``tools/benchmark.py``, whose clock, models and prompts
these are. A model of ``--values`` W is W wide, with heads of 32 and inner layers of 8/3 W. The values take turns within
one process, an iteration each, the first of each counting for nothing; iterations are those of a single run, of which
each value takes the ten that end there. Cost is the seconds of an iteration for a thousand tokens, prompts included;
of models it is divided by their parameters in millions too. Memory: each value once more in a process of its own.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOKENS_OF_A_PASS = 2048
WINDOW = 10  # iterations that a value of the axis of iterations stands for


def parse() -> argparse.Namespace:
    """Read the command line; what ``tools/benchmark.py`` asks for beside it is set here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, help="folder with config.json and tokenizer")
    parser.add_argument("--change", nargs="*", default=[], help="entries of the config to change, name=number")
    parser.add_argument("--axis", choices=["batch", "response", "model", "iterations"], required=True)
    parser.add_argument("--values", type=int, nargs="+", required=True, help="places on the axis, ascending")
    parser.add_argument("--batch", type=int, default=8, help="responses of an iteration")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=64, help="tokens of a response")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--plot", help="SVG file to draw cost and memory into")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)  # a value in a process of its own, for memory
    parser.set_defaults(work="ppo", critic="separate", minibatches=1, epochs=4, mean_length=None)
    return parser.parse_args()


def main() -> None:
    options = parse()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before torch, for the threads of the sides too
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory() as folder:
        if options.alone is not None:
            measure_alone(options, Path(folder))
            return
        measure = of_iterations if options.axis == "iterations" else in_turns
        rows = measure(options, Path(folder))
    report(options, rows)


def prepared(options: argparse.Namespace, value: int, folder: Path) -> tuple[argparse.Namespace, Path, int]:
    """Return the options of one value, the folder of its models, and their parameters."""
    from benchmark import write_models  # type: ignore[import-not-found]

    own, models = copy.copy(options), folder
    if options.axis == "model":
        shape = {"hidden_size": value, "num_attention_heads": value // 32, "num_key_value_heads": value // 32}
        shape |= {"head_dim": 32, "intermediate_size": 8 * value // 3}
        own.change = [*options.change, *(f"{name}={number}" for name, number in shape.items())]
        models = folder / str(value)
    elif options.axis != "iterations":
        setattr(own, options.axis, value)
    if (models / "policy").exists():
        return own, models, 0
    return own, models, write_models(own, models)


def build(options: argparse.Namespace, models: Path) -> Any:
    """Return our side, up to its first iteration."""
    import torch
    from benchmark import draw_prompts, read_clock
    from benchmark_sides import Ours  # type: ignore[import-not-found]

    torch.set_num_threads(options.threads)
    rows = max(1, TOKENS_OF_A_PASS // (options.prompt + options.response))
    side = Ours(options, rows, models, draw_prompts(options, models), read_clock(options))
    side.start()
    return side


def tokens_of(options: argparse.Namespace) -> int:
    """Return the tokens of an iteration, prompts included."""
    return int(options.batch * (options.prompt + options.response))


def in_turns(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Let all values take turns; return for each its cost, its smallest and largest, and its memory."""
    sides, sizes, parameters = {}, {}, 0
    for value in options.values:
        own, models, written = prepared(options, value, folder)
        parameters = written or parameters
        sizes[value] = tokens_of(own) / 1000 * (parameters / 1e6 if options.axis == "model" else 1.0)
        sides[value] = build(own, models)
    seconds: dict[int, list[float]] = {value: [] for value in sides}
    for number in range(options.rounds + 1):
        for value, side in sides.items():
            taken = side.iterate()["iteration"] / sizes[value]
            if number:
                seconds[value].append(taken)
                print(f"{options.axis} {value}: {taken:.4f}", file=sys.stderr, flush=True)
    return [row(value, seconds[value], peak_alone(value)) for value in options.values]


def of_iterations(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Make one long run; return the cost and the memory at each of its places."""
    from benchmark import resident_memory

    options = copy.copy(options)
    options.rounds = max(options.values)  # a batch of prompts each, and one that counts for nothing
    own, models, _ = prepared(options, 0, folder)
    side = build(own, models)
    side.iterate()
    rows, taken = [], list[float]()
    for number in range(1, options.rounds + 1):
        taken.append(side.iterate()["iteration"] / tokens_of(own) * 1000)
        if number in options.values:
            rows.append(row(number, taken[-WINDOW:], resident_memory(options)))
            print(f"{number}: {rows[-1]}", file=sys.stderr, flush=True)
    return rows


def row(value: int, seconds: list[float], memory: float) -> dict[str, Any]:
    """Return what is known of one place on the axis."""
    return {
        "value": value,
        "seconds": statistics.median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "mib": memory,
    }


def peak_alone(value: int) -> float:
    """Return the peak memory of two iterations of one value in a process of its own, in MiB."""
    program = [sys.executable, __file__, *sys.argv[1:], "--rounds", "1", "--alone", str(value)]
    printed = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    return float(json.loads(printed.strip().splitlines()[-1])["peak"])


def measure_alone(options: argparse.Namespace, folder: Path) -> None:
    """Print the peak of one value as JSON."""
    from benchmark import peak_memory

    own, models, _ = prepared(options, options.alone, folder)
    side = build(own, models)
    for _ in range(options.rounds + 1):
        side.iterate()
    print(json.dumps({"peak": peak_memory(own)}))


def report(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Print a table, and write and draw the same where asked for."""
    unit = "seconds a thousand tokens" + (" and million parameters" if options.axis == "model" else "")
    print(f"{options.axis:>12}  {unit + ' (range)':<44}{'to the first':>14}{'MiB':>10}")
    for each in rows:
        cost = f"{each['seconds']:.4f} ({each['least']:.4f} to {each['most']:.4f})"
        print(f"{each['value']:>12}  {cost:<44}{each['seconds'] / rows[0]['seconds']:>14.2f}{each['mib']:>10.0f}")
    if options.output:
        result = {"options": vars(options), "rows": rows, "day": time.strftime("%Y-%m-%d")}
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        draw(options, rows)


def draw(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Draw cost and memory, each as a multiple of the first place's."""
    from plot_gain import write_chart  # type: ignore[import-not-found]

    from rlhf_lightning.evaluation.plots import Series, line_chart

    xs = [float(each["value"]) for each in rows]
    lines = [
        Series(name, xs, [each[key] / rows[0][key] for each in rows], color=color)
        for color, (name, key) in enumerate({"seconds a token": "seconds", "memory": "mib"}.items(), start=1)
    ]
    labels = {"batch": "responses of an iteration", "response": "tokens of a response", "model": "width of the model"}
    x_label = labels.get(options.axis, options.axis)
    chart = line_chart(lines, title=f"cost by {x_label}", x_label=x_label, width=480, height=260)
    write_chart(chart, options.plot)


if __name__ == "__main__":
    main()

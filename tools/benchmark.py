"""Measure PPO, DPO and the reward model against TRL: same weights, data, lengths and optimizer steps.

PPO against TRL 1.12, the last release that has it, the others against 1.16, each in an environment of its own:

    python3.11 -m venv bench && bench/bin/pip install torch && bench/bin/pip install -e '.[bench]'
    bench/bin/python tools/benchmark.py --shape FOLDER --sides trl:2 trl:8 ours:8
    bench/bin/pip install trl==1.16.0
    bench/bin/python tools/benchmark.py --work dpo --shape FOLDER --pairs FILE --sides trl_default:8 trl:8 ours:8
    bench/bin/python tools/benchmark.py --shape FOLDER --mean_length 48 --response 128
    bench/bin/python tools/benchmark.py --shape FOLDER --change hidden_size=192 num_hidden_layers=8 --critic trunk
    bench/bin/python tools/benchmark.py --shape FOLDER --sides ours:8 lora:8

FOLDER holds a config.json of a Llama and a tokenizer; weights are random and so are prompts. Responses that stop do so
at lengths drawn beforehand, the same on all sides, all rounds with the same ones in another order. A side is a name
and the rows of a micro-batch in its update, ours as many tokens as so many rows of full length have. Sides take turns
within one process, iteration by iteration, the first of each counting for nothing; ratios are those of the first
side's seconds over another's in the same round. Clock: CPU seconds of the process on a processor, which other jobs on
the machine disturb least (``--clock wall`` for wall time, which is what a GPU gets). Floor: what the bare matrix
products of scoring and update take, of the same sizes and in the same rounds; a side's ratio to it says how much is
left to be gained. Memory: each side once more, alone in a process of its own, as the largest resident size, or on a
GPU the most that its allocator held.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

PHASES = ("iteration", "generation", "scoring", "update")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, help="folder with config.json and tokenizer")
    parser.add_argument("--change", nargs="*", default=[], help="entries of the config to change, name=number")
    parser.add_argument("--work", choices=["ppo", "reward", "dpo"], default="ppo")
    parser.add_argument("--sides", nargs="+", default=["trl:2", "trl:8", "ours:8"], help="name:rows of a micro-batch")
    parser.add_argument("--pairs", help="file of preference pairs, for reward and dpo")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a pair's sequence, at most")
    parser.add_argument("--critic", choices=["separate", "trunk"], default="separate", help="ours; TRL has no other")
    parser.add_argument("--batch", type=int, default=8, help="responses of an iteration")
    parser.add_argument("--minibatches", type=int, default=1, help="optimizer steps of an epoch")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=64, help="tokens of a response, at most")
    parser.add_argument("--mean_length", type=int, help="mean length of responses, which stop as planned; else never")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32", help="bf16: ours bf16-mixed")
    parser.add_argument("--peer_weights", choices=["float32", "bf16"], default="float32", help="what TRL loads them as")
    parser.add_argument("--no_memory", action="store_true", help="leave the runs for memory out")
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--models", help=argparse.SUPPRESS)  # of a run for memory: where the models lie
    return parser.parse_args()


def main() -> None:
    options = parse()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before torch, for the threads of the sides too
    os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false")
    if options.models:
        run_turns(options, Path(options.models))
        print(json.dumps({"peak": peak_memory(options)}))
        return
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        parameters = write_models(options, models)
        # First, while this process holds no side: all of them and one more may be too much.
        peaks = {} if options.no_memory else {side: measure_memory(side, models) for side in options.sides}
        seconds, lengths = run_turns(options, models)
        floors = seconds.pop("floor", [])
    report(options, parameters, seconds, lengths, peaks, floors)


def write_models(options: argparse.Namespace, models: Path) -> int:
    """Write the folders ``policy`` and ``reward`` and return the parameters of the policy."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.shape)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # another than its end, which TRL would mistake for it
    config = AutoConfig.from_pretrained(options.shape)
    config.update({name: int(value) for name, value in (change.split("=") for change in options.change)})
    config.update({"pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "dtype": "float32"})
    policy = AutoModelForCausalLM.from_config(config)
    config.num_labels = 1
    reward = AutoModelForSequenceClassification.from_config(config)
    for name, model in {"policy": policy, "reward": reward}.items():
        model.save_pretrained(models / name)
        tokenizer.save_pretrained(models / name)
    return sum(parameter.numel() for parameter in policy.parameters())


def run_turns(options: argparse.Namespace, models: Path) -> tuple[dict[str, list[dict[str, float]]], dict[str, float]]:
    """Train all sides in turns; return the seconds of each round's phases, and the mean length of responses.

    Beside the sides stands ``floor``, where there is one.
    """
    import torch
    from benchmark_floor import Floor  # type: ignore[import-not-found]

    torch.set_num_threads(options.threads)
    if options.work == "ppo":
        from benchmark_sides import PPO_SIDES as KINDS  # type: ignore[import-not-found]

        data: object = draw_prompts(options, models)
    else:
        from benchmark_pairs import PAIR_SIDES as KINDS  # type: ignore[import-not-found]
        from benchmark_pairs import read_pairs

        data = read_pairs(options, models)
    sides = {}
    for named in options.sides:
        name, _, rows = named.partition(":")
        sides[named] = KINDS[name](options, int(rows or options.batch), models, data, read_clock(options))
        sides[named].start()
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    floor = Floor(models, options, read_clock(options)) if options.work == "ppo" and not options.models else None
    if floor is not None:
        seconds["floor"] = []
    for number in range(options.rounds + 1):
        for name, side in sides.items():
            phases = side.iterate()
            if number:
                seconds[name].append(phases)
                print(name, {phase: round(value, 2) for phase, value in phases.items()}, file=sys.stderr, flush=True)
        if number and floor is not None:
            seconds["floor"].append(floor.measure(next(float(side.lengths[-1]) for side in sides.values())))
    return seconds, {name: statistics.mean(map(float, side.lengths)) for name, side in sides.items() if side.lengths}


def draw_prompts(options: argparse.Namespace, models: Path) -> object:
    """Return random tokens, shape (rounds, batch, prompt)."""
    import torch

    vocabulary = json.loads((models / "policy" / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    shape = (options.rounds + 1, options.batch, options.prompt)
    return torch.randint(10, vocabulary - 10, shape, generator=generator)


def read_clock(options: argparse.Namespace) -> Callable[[], float]:
    """Return the function that tells the time."""
    import torch

    if options.device == "cuda":

        def when_the_device_is_done() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return when_the_device_is_done
    return time.process_time if options.clock == "cpu" else time.perf_counter


def measure_memory(side: str, models: Path) -> float:
    """Run one side alone for two iterations in a process of its own and return its peak in MiB."""
    given = [argument for argument in sys.argv[1:] if argument != "--no_memory"]
    arguments = [*given, "--models", str(models), "--sides", side, "--rounds", "1"]
    program = [sys.executable, __file__, *arguments]
    printed = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    return float(json.loads(printed.strip().splitlines()[-1])["peak"])


def peak_memory(options: argparse.Namespace) -> float:
    """Return the largest memory of this process so far, in MiB."""
    import torch

    if options.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return _of_status("VmHWM")  # not getrusage, whose maximum a child process takes over from the one that started it


def resident_memory(options: argparse.Namespace) -> float:
    """Return the memory of this process now, in MiB."""
    import torch

    return torch.cuda.memory_allocated() / 2**20 if options.device == "cuda" else _of_status("VmRSS")


def _of_status(entry: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith(entry)).split()[1]) / 2**10


def report(
    options: argparse.Namespace,
    parameters: int,
    seconds: dict[str, list[dict[str, float]]],
    lengths: dict[str, float],
    peaks: dict[str, float],
    floors: list[dict[str, float]],
) -> None:
    """Print a table, and write the same as JSON."""
    phases = PHASES if options.work == "ppo" else ("iteration",)
    tokens = f"{options.prompt} + {options.response}" if options.work == "ppo" else f"at most {options.max_length}"
    print(f"{options.work}: {parameters:,} parameters, batch {options.batch}, {tokens} tokens, seconds: ratio (range)")
    print(f"{'':14}" + "".join(f"{each:>30}" for each in phases) + f"{'mean length':>14}{'tokens/s':>10}{'MiB':>8}")
    rows: dict[str, dict[str, Any]] = {}
    for name, rounds in seconds.items():
        row = rows[name] = {"rounds": rounds, "mean_length": lengths.get(name), "peak_mib": peaks.get(name)}
        row |= {phase: ratios(seconds[options.sides[0]], rounds, phase) for phase in phases}
        if name in lengths:
            row["response_tokens_per_second"] = options.batch * lengths[name] / row["iteration"]["median"]
        print(f"{name:14}" + "".join(cell_of(row[phase]) for phase in phases), end="")
        figures = (("mean_length", 14, 1), ("response_tokens_per_second", 10, 1), ("peak_mib", 8, 0))
        known = ((row.get(key), width, digits) for key, width, digits in figures)
        print("".join(f"{'-' if value is None else f'{value:.{digits}f}':>{width}}" for value, width, digits in known))
    for phase in floors[0] if floors else ():
        over = {name: ratios(rounds, floors, phase)["ratio"] for name, rounds in seconds.items()}
        for name, ratio in over.items():
            rows[name][f"{phase}_over_floor"] = ratio
        told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in over.items())
        print(f"floor of {phase}: {statistics.median(each[phase] for each in floors):.2f} s; times that: {told}")
    if options.output:
        versions = {name: version(name) for name in ("torch", "transformers", "lightning", "trl")}
        machine = {"processor": platform.processor() or platform.machine(), "versions": versions}
        result = {"options": vars(options), "parameters": parameters, **machine, "floor": floors, "sides": rows}
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def ratios(first: list[dict[str, float]], rounds: list[dict[str, float]], phase: str) -> dict[str, float]:
    """Return the median seconds of a phase, and median, least and most of what the first side took over it."""
    found = [base[phase] / taken[phase] for base, taken in zip(first, rounds, strict=True)]
    median = statistics.median(taken[phase] for taken in rounds)
    return {"median": median, "ratio": statistics.median(found), "least": min(found), "most": max(found)}


def cell_of(figures: dict[str, float]) -> str:
    """Return the figures of a phase as a cell of the table."""
    return f"{'{median:.2f}: {ratio:.2f} ({least:.2f} to {most:.2f})'.format(**figures):>30}"


if __name__ == "__main__":
    main()

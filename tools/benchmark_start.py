"""Measure what passes before the first step: tokenising pairs, and starting a process.

    python tools/benchmark_start.py tokenise --source FILE --tokenizer FOLDER --rows 10000 --rounds 5
    python tools/benchmark_start.py start --rounds 5 -- fit --config configs/demo/ppo.yaml

``tokenise`` reads FILE, a ``.jsonl`` of pairs, as often as makes up the rows, the texts of each reading differing from
those before. Its forms take turns within one process: a text a call, as long as that was all there was; together;
together, while ids are kept on disk; and ids from the disk. Seconds are those of ``setup``, the reading included.
``start`` runs ``--help``, and the command behind ``--`` up to its first step, in processes of their own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

BEGAN = "BENCHMARK_BEGAN"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    tokenise = commands.add_parser("tokenise")
    tokenise.add_argument(
        "--source", required=True, help="a .jsonl of pairs (also .gz), prompt, chosen and rejected as text"
    )
    tokenise.add_argument("--tokenizer", required=True, help="model folder or hub name")
    tokenise.add_argument("--rows", type=int, default=10_000)
    tokenise.add_argument("--plain", action="store_true", help="without a chat template")
    start = commands.add_parser("start")
    start.add_argument("arguments", nargs="+", help="a fit, behind --")
    for command in (tokenise, start):
        command.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        measure = measure_tokenising if options.command == "tokenise" else measure_start
        measure(options, Path(folder))


def measure_tokenising(options: argparse.Namespace, folder: Path) -> None:
    """Print seconds of each form."""
    from rlhf_lightning.data.chat import ConversationEncoder, EncodedConversation
    from rlhf_lightning.data.preferences import PreferenceDataModule
    from rlhf_lightning.models.loading import load_tokenizer

    tokenizer, source = load_tokenizer(options.tokenizer), folder / "pairs.jsonl"
    write_pairs(options.source, options.rows, source)
    chat = not options.plain

    class OneByOne(ConversationEncoder):
        """Asks the tokenizer for each text of each response."""

        def encode_many(self, conversations: Sequence[Any], cache: Any = None) -> Iterator[Any]:
            for prompt, responses in conversations:
                sides = [self.encode(prompt, text) for text in responses]
                yield EncodedConversation(sides[0][0], [ids for _, ids in sides])

    def setup(encoder: type[ConversationEncoder], cache: Path | None) -> list[Any]:
        data = PreferenceDataModule(str(source), chat=chat, token_cache=None if cache is None else str(cache))
        data._encoder = encoder(tokenizer, chat=chat)
        data.setup("fit")
        return data.train_examples

    seconds: dict[str, list[tuple[float, float]]] = {}
    for number in range(options.rounds):
        cache = folder / f"cache-{number}"
        forms: dict[str, Callable[[], list[Any]]] = {
            "a text a call": partial(setup, OneByOne, None),
            "together": partial(setup, ConversationEncoder, None),
            "together, ids kept": partial(setup, ConversationEncoder, cache),
            "ids from the disk": partial(setup, ConversationEncoder, cache),
        }
        found = []
        for name, form in forms.items():
            wall, cpu = time.perf_counter(), time.process_time()
            found.append(form())
            seconds.setdefault(name, []).append((time.perf_counter() - wall, time.process_time() - cpu))
        if any(examples != found[0] for examples in found):
            raise SystemExit("the forms differ")
    for name, both in seconds.items():
        report(f"{name:<20}", {"wall": [wall for wall, _ in both], "CPU": [cpu for _, cpu in both]})


def write_pairs(source: str, rows: int, path: Path) -> None:
    """Write so many pairs, all of different texts."""
    from rlhf_lightning.data.readers import read_rows

    pairs = read_rows(source)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            mark = f" ({number // len(pairs)})" if number >= len(pairs) else ""
            row = pairs[number % len(pairs)]
            changed = {name: row[name] + mark for name in ("prompt", "chosen", "rejected") if name in row}
            file.write(json.dumps(changed) + "\n")


def measure_start(options: argparse.Namespace, folder: Path) -> None:
    """Print seconds from the start of a process to the end of its help, and to its first step."""
    package = [sys.executable, "-m", "rlhf_lightning"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    stop = ["--trainer.callbacks+=benchmark_start.FirstStep"]
    helps: list[float] = []
    steps: list[dict[str, float]] = []
    for number in range(options.rounds):
        began = time.monotonic()
        subprocess.run([*package, "--help"], check=True, capture_output=True)
        helps.append(time.monotonic() - began)
        command = [*package, *options.arguments, *stop, "--run_dir", str(folder / str(number))]
        environment = os.environ | {"PYTHONPATH": path, BEGAN: str(time.monotonic())}
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        steps.append(json.loads(told.splitlines()[-1]))
    report("--help    ", {"wall": helps})
    report("first step", {name: [step[name] for step in steps] for name in ("wall", "CPU")})


def report(name: str, seconds: dict[str, list[float]]) -> None:
    """Print medians, and the least and the most."""
    told = [
        f"{kind} {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"
        for kind, values in seconds.items()
    ]
    print(name, ", ".join(told), flush=True)


if __name__ == "__main__":
    main()
else:  # in the process that is measured
    from lightning.pytorch import Callback

    class FirstStep(Callback):
        """Tells when the first step begins, and ends the process."""

        def on_train_batch_start(self, *_: Any) -> None:
            """Print seconds since the process began."""
            print(
                json.dumps({"wall": time.monotonic() - float(os.environ[BEGAN]), "CPU": time.process_time()}),
                flush=True,
            )
            os._exit(0)

"""Measure generation: our decode loop with each of its levers against ``generate`` of transformers, in one process.

    python tools/benchmark_generation.py --shape FOLDER --batch 8
    python tools/benchmark_generation.py --shape FOLDER --change hidden_size=192 num_hidden_layers=8
    python tools/benchmark_generation.py --shape FOLDER --batch 32 --decode_batch 8 --mean_length 24 --group 4

FOLDER holds a config.json; weights are random and so are prompts. Forms take turns, the first round counts for nothing,
and ratios are taken within a round. Clock: CPU seconds of the process, which other jobs on the machine disturb least.

Forms: ``generate`` draws by softmax and multinomial and keeps all scores, as TRL's PPO asks for; ``reference`` is
``TransformersSampler``; ``plain`` is ``CachedSampler(pack_weights=False)``; ``packed`` is ``CachedSampler()``, its time
with the packing; ``groups`` is the same with one decode batch after the other, as without refill; ``apart`` is
``packed`` with equal prompts never in a row, so that each is read anew.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from rlhf_lightning.rollout.decoding import CachedSampler, TransformersSampler
from rlhf_lightning.rollout.sampler import Sampler, SamplingConfig


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, help="folder with config.json")
    parser.add_argument("--change", nargs="*", default=[], help="entries of the config to change, name=number")
    parser.add_argument("--batch", type=int, default=8, help="responses")
    parser.add_argument("--decode_batch", type=int, help="rows decoded together; all unless given")
    parser.add_argument("--group", type=int, default=1, help="responses to each prompt")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=64, help="tokens of a response, at most")
    parser.add_argument("--mean_length", type=int, help="responses stop by chance at about this length; else never")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--forms", nargs="+", default=["generate", "reference", "plain", "packed"])
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    model = build_model(options)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (options.batch // options.group, options.prompt)).repeat_interleave(
        options.group, 0
    )
    stops = list(range(vocabulary // options.mean_length)) if options.mean_length else []
    forms = {name: build_form(name, model, ids, stops, options) for name in options.forms}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    tokens: dict[str, Tensor] = {}
    for number in range(options.rounds + 1):
        for name, form in forms.items():
            start = time.process_time()
            tokens[name] = form(number)
            if number:
                seconds[name].append(time.process_time() - start)
    report(seconds, tokens, options, sum(parameter.numel() for parameter in model.parameters()))


def build_model(options: argparse.Namespace) -> PreTrainedModel:
    """Draw a model of the asked shape."""
    torch.manual_seed(0)
    changes = {name: int(value) for name, value in (change.split("=") for change in options.change)}
    config = AutoConfig.from_pretrained(options.shape)
    config.update(changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def build_form(
    name: str, model: PreTrainedModel, ids: Tensor, stops: list[int], options: argparse.Namespace
) -> Callable[[int], Tensor]:
    """Return a function of the seed that returns responses."""
    if name == "generate":
        return lambda seed: generate(model, ids, stops, options.response)
    samplers: dict[str, Callable[[], Sampler]] = {
        "reference": TransformersSampler,
        "plain": lambda: CachedSampler(options.decode_batch, pack_weights=False),
        "packed": lambda: CachedSampler(options.decode_batch),
        "groups": CachedSampler,
        "apart": lambda: CachedSampler(options.decode_batch),
    }
    sampler, config = samplers[name](), SamplingConfig(max_new_tokens=options.response)
    sampler.setup(model)
    size = options.decode_batch if name == "groups" else options.batch
    order = torch.arange(options.batch)
    if name == "apart":
        order = order.view(-1, options.group).t().reshape(-1)

    def sample(seed: int) -> Tensor:
        sampler.sync(model.named_parameters(), seed)
        parts = [
            sampler.sample(
                ids[part],
                torch.ones_like(ids[part]).bool(),
                config=config,
                stop_ids=stops,
                seed=seed,
                row_ids=part.tolist(),
            ).tokens
            for part in order.split(size)
        ]
        sampler.release()
        padded = [torch.nn.functional.pad(part, (0, options.response - part.shape[1])) for part in parts]
        return torch.cat(padded)[order.argsort()]

    return sample


@torch.no_grad()
def generate(model: PreTrainedModel, ids: Tensor, stops: list[int], length: int) -> Tensor:
    """Generate as TRL's trainers ask for it."""
    config = GenerationConfig(
        max_new_tokens=length,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
        eos_token_id=stops or None,
        return_dict_in_generate=True,
        output_scores=True,
    )
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    torch.stack(output.scores, 1)
    return output.sequences[:, ids.shape[1] :]


def report(seconds: dict[str, list[float]], tokens: dict[str, Tensor], options: argparse.Namespace, size: int) -> None:
    """Print a table and the same as JSON."""
    first = next(iter(seconds))
    ours = [name for name in tokens if name != "generate"]
    shares = [float((tokens[name] == tokens[ours[0]]).all(dim=1).float().mean()) for name in ours]
    print(f"{size:,} parameters, batch {options.batch}, {options.prompt} + {options.response} tokens")
    print(f"share of responses equal to those of {ours[0]}: {dict(zip(ours, shares, strict=True))}")
    rows = []
    for name, values in seconds.items():
        ratios = [base / value for base, value in zip(seconds[first], values, strict=True)]
        median, ratio = statistics.median(values), statistics.median(ratios)
        print(
            f"{name:>10} {median:8.3f} s ({min(values):.3f} to {max(values):.3f}), "
            f"ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
        rows.append({"form": name, "seconds": values, "median": median, "ratio": ratio})
    print(json.dumps({"options": vars(options), "parameters": size, "torch": torch.__version__, "forms": rows}))


if __name__ == "__main__":
    main()

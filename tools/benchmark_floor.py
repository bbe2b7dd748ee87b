"""What the matrix products of an iteration take by themselves, on this machine in this minute: the floor of a side."""

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


class Floor:
    """The products of a model's linear layers at the sizes that a pass has, run bare.

    Args:
        models: Folder with the folder ``policy``.
        options: Of the command line of ``tools/benchmark.py``.
        clock: Returns seconds.
    """

    def __init__(self, models: Path, options: argparse.Namespace, clock: Callable[[], float]) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(models / "policy"))
        layers = [each for each in model.base_model.modules() if isinstance(each, nn.Linear)]
        self.body = Counter((layer.out_features, layer.in_features) for layer in layers)
        self.head = Counter([tuple(model.get_output_embeddings().weight.shape)])
        self.options, self.clock = options, clock
        self.dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32

    def measure(self, response_length: float) -> dict[str, float]:
        """Return the seconds of scoring and update of PPO where responses have that length in the mean.

        Scoring: a forward pass of policy, reference, critic and reward model, the head in the first two. Update:
        forward and both backward products of policy and critic, each epoch. All else counts for nothing.
        """
        options = self.options
        responses = round(options.batch * response_length)
        tokens = options.batch * options.prompt + responses
        trunk = options.critic == "trunk"
        forward, both = self._seconds(self.body, tokens)
        head_forward, head_both = self._seconds(self.head, responses)
        networks = 1 if trunk else 2
        return {
            "scoring": (networks + 2) * forward + 2 * head_forward,
            "update": options.epochs * (networks * both + head_both),
        }

    def _seconds(self, shapes: "Counter[tuple[int, int]]", tokens: int) -> tuple[float, float]:
        """Return the seconds of the forward products, and of those and both backward ones; the better of two runs."""
        forward = both = 0.0
        for (rows, columns), count in shapes.items():
            x, slopes = (torch.randn(tokens, n, device=self.options.device, dtype=self.dtype) for n in (columns, rows))
            weight = torch.randn(rows, columns, device=self.options.device, dtype=self.dtype)
            runs = []
            for _ in range(2):
                start = self.clock()
                x @ weight.T
                middle = self.clock()
                slopes @ weight
                slopes.T @ x
                runs.append((middle - start, self.clock() - start))
            forward += count * min(run[0] for run in runs)
            both += count * min(run[1] for run in runs)
        return forward, both

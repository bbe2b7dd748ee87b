"""Write a model folder of a true shape with random weights, to try configs whose real weights are out of reach.

    python tools/random_checkpoint.py --shape FOLDER --output FOLDER

FOLDER must hold config.json and a tokenizer; weights are float32, drawn from seed 0.
"""

import argparse

import torch

from rlhf_lightning.models.export import write_model_folder
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, help="folder with config.json and tokenizer")
    parser.add_argument("--output", required=True, help="folder to write")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = load_causal_lm(options.shape, pretrained=False)
    write_model_folder(options.output, model, load_tokenizer(options.shape))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters written to {options.output}")


if __name__ == "__main__":
    main()

"""Record small checkpoints of SFT and PPO, for later releases to be tested against.

    python tools/record_checkpoint.py [FOLDER]

It writes ``sft.ckpt.gz`` and ``ppo.ckpt.gz`` into the folder (``tests/checkpoints/format-<n>``, n being the format that
this code writes), each of a run on the built-in demo that ``tests/test_checkpoint_formats.py`` goes on with. The random
weights hardly compress; the models are as small as they can be. To be run once for each format, before it changes.
"""

import gzip
import sys
import tempfile
from pathlib import Path

from rlhf_lightning.__main__ import main as run
from rlhf_lightning.checkpoint_files import CHECKPOINT_FORMAT

TINY = (
    "{hidden_size: 4, intermediate_size: 4, num_attention_heads: 1, num_key_value_heads: 1, num_hidden_layers: 1, "
    "tie_word_embeddings: true}"
)
COMMON = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--model.optimizer.lr=0.01"]
ROWS = ["--data.limit=16", "--data.val_size=4"]
SFT = ["--model=SFTModule", "--model.model=builtin:demo", "--model.pretrained=false", *COMMON]
SFT += [f"--model.config_overrides={TINY}", "--data=DemonstrationDataModule", "--data.source=builtin:demo/train"]
SFT += [*ROWS, "--data.batch_size=4"]
#: Steps of an epoch: three; each run was stopped in its second.
STEPS = 4


def ppo(model: Path, reward: Path) -> list[str]:
    """Return the arguments of a PPO run from a model folder, rewarded by the function ``score`` of a file."""
    own = ["--model=PPOModule", f"--model.policy={model}", "--model.critic=SeparateCritic", "--model.kl=AdaptiveKL"]
    own += ["--model.reward=FunctionReward", f"--model.reward.function={reward}:score", "--model.minibatch_size=2"]
    own += ["--model.sampling.max_new_tokens=4", "--data=PromptDataModule", "--data.source=builtin:demo/prompts"]
    return [*own, "--data.rollout_batch_size=4", "--data.max_prompt_length=64", *ROWS, *COMMON]


def write_reward(folder: Path) -> Path:
    """Write a reward function and return its file."""
    path = folder / "score.py"
    path.write_text("def score(prompts, responses):\n    return [float(len(set(r))) for r in responses]\n")
    return path


def main() -> int:
    default = Path(__file__).parents[1] / "tests" / "checkpoints" / f"format-{CHECKPOINT_FORMAT}"
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        runs = {"sft": SFT, "ppo": ppo(folder / "sft" / "model", write_reward(folder))}
        for name, arguments in runs.items():
            status = run(["fit", *arguments, f"--trainer.max_steps={STEPS}", f"--run_dir={folder / name}"])
            if status:
                return status
            content = (folder / name / "checkpoints" / "last.ckpt").read_bytes()
            (target / f"{name}.ckpt.gz").write_bytes(gzip.compress(content, mtime=0))
    return 0


if __name__ == "__main__":
    sys.exit(main())

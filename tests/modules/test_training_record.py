import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from huggingface_hub import ModelCard

from rlhf_lightning import DemonstrationDataModule, SFTModule, __version__
from rlhf_lightning.callbacks import ExportModel
from rlhf_lightning.models.export import write_model_folder
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.training_record import training_record
from rlhf_lightning.rollout.reward_sources import FunctionReward
from rlhf_lightning.schedules import LinearDecay

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose card names a model of the Hub."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = load_causal_lm("builtin:demo", pretrained=False, config_overrides=TINY)
    write_model_folder(folder, model, load_tokenizer("builtin:demo"))
    (folder / "README.md").write_text("---\nbase_model: someone/small\n---\n\n# base\n")
    return folder


def record_of(base: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Train for a step, from Python, without a config."""
    pl.seed_everything(1)
    module = SFTModule(
        **{"model": str(base), "lr_scheduler": lambda optimizer: LinearDecay(optimizer), **changes},
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.125, momentum=0.5),
    )
    data = DemonstrationDataModule(
        "builtin:demo/train", limit=12, val_size=4, batch_size=8, max_length=96, max_prompt_length=32
    )
    trainer = pl.Trainer(
        max_steps=1,
        default_root_dir=folder,
        callbacks=[ExportModel()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data)
    return training_record(module)


def test_a_run_from_python_tells_what_it_was(base: Path, tmp_path: Path) -> None:
    record = record_of(base, tmp_path)
    assert json.loads(json.dumps(record)) == record  # plain data, which a weights-only load accepts
    assert record["start"] == {"name": str(base), "hub": "someone/small"}
    assert record["versions"]["rlhf_lightning"] == __version__
    assert record["versions"]["torch"] == torch.__version__
    assert record["hardware"].startswith("1 × processor (")
    assert record["precision"] == "32-true"
    assert record["parameters"]["trained"] == record["parameters"]["exported"] > 1000
    assert record["data"]["counts"] == {"train_rows": 12, "train_kept": 8, "val_kept": 4}
    assert len(record["data"]["digest"]) == 64
    optimizer = record["parts"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.sgd.SGD"
    assert (optimizer["init_args"]["lr"], optimizer["init_args"]["momentum"]) == (0.125, 0.5)
    assert record["parts"]["lr_scheduler"]["class_path"] == "rlhf_lightning.schedules.LinearDecay"
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.get("base_model") == "someone/small"
    assert "| `model.optimizer.lr` | `0.125` |" in card.text
    assert "which goes back to `someone/small`" in card.text


def test_random_weights_go_back_to_no_model(base: Path, tmp_path: Path) -> None:
    assert record_of(base, tmp_path, pretrained=False)["start"]["hub"] is None


@pytest.mark.parametrize(
    "card",
    ["no card", "---\n[\n---\n", "---\nbase_model: [a/b]\n---\n", "---\nbase_model: a/b/c\n---\n", "---\n- a\n---\n"],
)
def test_a_card_that_names_no_single_model_is_passed_over(card: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    for path in base.iterdir():
        if path.name != "README.md":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    module = SFTModule(model=str(tmp_path))
    assert module.training_record() == {}  # without a Trainer
    module.trainer = pl.Trainer(logger=False, accelerator="cpu")
    module.configure_model()
    assert training_record(module)["start"] == {"name": str(tmp_path), "hub": None}


def test_parts_are_those_that_the_module_made_by_default(base: Path) -> None:
    module = PPOModule(policy=str(base), reward=FunctionReward(function="rlhf_lightning.demo.voice:human_voice"))
    module.trainer = pl.Trainer(logger=False, accelerator="cpu")
    module.configure_model()
    parts = training_record(module)["parts"]
    assert parts["kl"] == {
        "class_path": "rlhf_lightning.algorithm.kl.FixedKL",
        "init_args": {"coef": 0.05, "estimator": "k1", "place": "reward"},
    }
    assert parts["advantages"]["init_args"]["gae_lambda"] == 0.95
    assert parts["sampling"]["init_args"]["temperature"] == 1.0
    assert "reference" not in parts

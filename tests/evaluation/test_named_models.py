from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from rlhf_lightning.checkpoint_files import CHECKPOINT_KEY
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.named_models import checked_base, named_models
from rlhf_lightning.models.export import pack_model
from rlhf_lightning.models.loading import load_causal_lm, load_sequence_classifier, load_tokenizer
from rlhf_lightning.models.lora import LoRA, adapter_settings, add_adapters, merged

IDS = torch.tensor([[5, 6, 7, 8]])
CPU = torch.device("cpu")


def save(path: Path, model: PreTrainedModel, step: int, tokenizer: str) -> Path:
    """Write what a module of the package writes, as far as it is read here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {f"policy.{key}": value for key, value in model.state_dict().items()}
    packed = pack_model("policy.", model, load_tokenizer(tokenizer))
    settings = {f"policy.{name}": value for name, value in adapter_settings(model).items()}
    packed["adapters"] = settings
    torch.save({"state_dict": weights, CHECKPOINT_KEY: packed, "global_step": step}, path)
    return path


@pytest.fixture(scope="module")
def run(tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run: steps 2 and 10, the latter as the last and the best, too."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    model = load_causal_lm(tiny_models["base"])
    for step, name in ((2, "step-2"), (10, "last"), (10, "best")):
        model.get_input_embeddings().weight.data[5, 0] = step
        save(folder / f"{name}.ckpt", model, step, tiny_models["base"])
    return folder


@torch.no_grad()
def test_a_checkpoint_is_the_model_that_was_saved(run: Path, tiny_models: dict[str, str]) -> None:
    (found,) = named_models({"ppo": str(run / "step-2.ckpt")})
    saved = load_causal_lm(tiny_models["base"]).eval()
    saved.get_input_embeddings().weight.data[5, 0] = 2
    model = found.load(CPU)
    assert torch.equal(model(input_ids=IDS).logits, saved(input_ids=IDS).logits)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (found.name, found.step, found.line) == ("ppo", 2, None)
    assert found.config.hidden_size == 32
    assert found.tokenizer.chat_template == load_tokenizer(tiny_models["base"]).chat_template


@torch.no_grad()
def test_the_adapters_of_a_checkpoint_are_merged(tiny_models: dict[str, str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = add_adapters(load_causal_lm(tiny_models["base"]), LoRA(rank=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    (found,) = named_models({"ppo": str(save(tmp_path / "last.ckpt", model, 3, tiny_models["base"]))})
    logits = found.load(CPU)(input_ids=IDS).logits
    assert torch.equal(logits, merged(model).eval()(input_ids=IDS).logits)
    assert not torch.equal(logits, load_causal_lm(tiny_models["base"])(input_ids=IDS).logits)


def test_a_pattern_is_a_model_for_each_step_in_their_order(run: Path, tiny_models: dict[str, str]) -> None:
    found = named_models({"base": tiny_models["base"], "ppo": f"{run}/*.ckpt"})
    assert [model.name for model in found] == ["base", "ppo step 2", "ppo step 10"]
    assert [model.step for model in found] == [None, 2, 10]
    assert [model.line for model in found] == [None, "ppo", "ppo"]
    assert found[2].path in {f"{run}/best.ckpt", f"{run}/last.ckpt"}  # of two files of one step, one


def test_the_base_is_the_first_one_or_the_named_one(run: Path, tiny_models: dict[str, str]) -> None:
    found = named_models({"ppo": f"{run}/*.ckpt", "sft": tiny_models["base"]})
    assert checked_base(found, None) == "ppo step 2"
    assert checked_base(found, "sft") == "sft"
    with pytest.raises(UserError, match=r"base is 'ppo step 1', which is none of .* Did you mean 'ppo step 10'\?"):
        checked_base(found, "ppo step 1")


def test_what_is_no_checkpoint_of_a_language_model_ends_in_one_line(
    run: Path, tiny_models: dict[str, str], tmp_path: Path
) -> None:
    scorer = load_sequence_classifier(tiny_models["base"], new_head=True)
    save(tmp_path / "reward.ckpt", scorer, 1, tiny_models["base"])
    (tmp_path / "cut.ckpt").write_bytes((run / "last.ckpt").read_bytes()[:-1000])
    (tmp_path / "folder").mkdir()
    for path, message in {
        "reward.ckpt": "models.a: checkpoint '.*reward.ckpt' holds a LlamaForSequenceClassification; a language model",
        "cut.ckpt": "'.*cut.ckpt' is not a checkpoint, or a damaged one",
        "none.ckpt": "checkpoint '.*none.ckpt' does not exist",
        "none*.ckpt": r"models.a: no file matches '.*none\*.ckpt'; give a pattern of a run's checkpoints",
        "f*": r"models.a: '.*' matches '.*folder', which is no checkpoint; end it with \*.ckpt",
    }.items():
        with pytest.raises(UserError, match=message) as refusal:
            named_models({"a": str(tmp_path / path)})
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="two models are called 'ppo step 2'"):
        named_models({"ppo step 2": tiny_models["base"], "ppo": f"{run}/step-*.ckpt"})


def test_a_checkpoint_whose_weights_are_not_finite_is_refused(tiny_models: dict[str, str], tmp_path: Path) -> None:
    model = load_causal_lm(tiny_models["base"])
    torch.nn.init.constant_(model.get_input_embeddings().weight, torch.nan)
    (found,) = named_models({"a": str(save(tmp_path / "last.ckpt", model, 1, tiny_models["base"]))})
    with pytest.raises(UserError, match=r"the weights of '.*last.ckpt' hold numbers that are not finite"):
        found.load(CPU)

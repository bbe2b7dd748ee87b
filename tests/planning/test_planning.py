"""What ``plan`` tells, against what a run does."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel

from rlhf_lightning.__main__ import main
from rlhf_lightning.algorithm.critics import SeparateCritic, TrunkCritic
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_tokenizer
from rlhf_lightning.models.lora import LoRA, add_adapters
from rlhf_lightning.models.packed import Layout, _packed, checkpoint_activations
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.planning.estimate import Phase, Setting, estimate
from rlhf_lightning.planning.machine import Machine, gpu, this_processor
from rlhf_lightning.planning.tracing import optimizer_bytes, trace
from rlhf_lightning.rollout.reward_model import RewardModel
from rlhf_lightning.rollout.sampler import SamplingConfig

MACHINE = Machine("test", flops=1e9, bandwidth=1e9, process=1000)
ALONE = Setting(MACHINE, mixed=False, processes=1)


@pytest.fixture
def folders(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> tuple[str, str]:
    """A language model and a reward model, of sizes at which the parts differ."""
    sizes = {"vocab_size": 500, "hidden_size": 256, "intermediate_size": 384}
    made = []
    for name in ("policy", "scorer"):
        model = make_model("llama", scalar=name == "scorer", **sizes)
        model.save_pretrained(tmp_path / name)
        load_tokenizer("builtin:demo").save_pretrained(tmp_path / name)
        made.append(str(tmp_path / name))
    return made[0], made[1]


def kept_by_a_real_pass(model: Any, rows: int, length: int) -> int:
    """Bytes that the backbone keeps for its backward pass, with real tensors."""
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _packed(model.base_model, torch.zeros(rows, length, dtype=torch.int64), Layout.of_sequences([length] * rows))
    for parameter in model.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt2", "gpt_neox"])
def test_a_trace_is_what_a_real_pass_keeps(name: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(name).train()
    found = trace(model.config, scalar=False, rows=3, length=20, mixed=False)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.kept == pytest.approx(kept_by_a_real_pass(model, 3, 20), rel=0.01)
    assert found.flops > 2 * 60 * 16 * 16
    checkpoint_activations(model)
    layers = model.config.num_hidden_layers
    fewer = trace(model.config, scalar=False, rows=3, length=20, mixed=False, checkpointed=True)
    assert fewer.kept == pytest.approx(kept_by_a_real_pass(model, 3, 20) + found.kept / layers, rel=0.02)
    assert fewer.kept < found.kept


def test_what_cannot_be_packed_is_traced_too(make_model: Callable[..., PreTrainedModel]) -> None:
    config = make_model("gemma2", attn_implementation="eager").config
    assert config._attn_implementation == "eager"
    assert trace(config, scalar=False, rows=3, length=20, mixed=False).kept > 0


def test_a_trace_grows_with_the_tokens_and_shrinks_in_bf16() -> None:
    config = LlamaConfig(vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=3)
    one, two = (trace(config, scalar=True, rows=rows, length=20, mixed=False) for rows in (20, 40))
    assert two.flops == 2 * one.flops
    assert two.kept == pytest.approx(2 * one.kept, rel=0.02)
    assert trace(config, scalar=True, rows=20, length=20, mixed=True).kept < one.kept
    assert (one.layers, one.hidden, one.embedding) == (3, 64, 500 * 64)


def test_optimizer_bytes() -> None:
    assert optimizer_bytes(lambda weights: torch.optim.SGD(weights, lr=0.1)) == 0
    assert optimizer_bytes(lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9)) == 4
    assert optimizer_bytes(lambda weights: torch.optim.AdamW(weights, lr=0.1, fused=True)) == 8


def ppo(folders: tuple[str, str], **options: Any) -> PPOModule:
    policy, scorer = folders
    given = {"sampling": SamplingConfig(max_new_tokens=32), "minibatch_size": 8, "ppo_epochs": 2, **options}
    return PPOModule(policy, RewardModel(scorer), **given)


def prompts(rows: int = 16) -> PromptDataModule:
    return PromptDataModule("unread.jsonl", rollout_batch_size=rows, max_prompt_length=32)


def weights(folders: tuple[str, str]) -> tuple[int, int]:
    policy, scorer = (
        trace(LlamaConfig.from_pretrained(f), scalar=s, rows=1, length=4, mixed=False)
        for f, s in zip(folders, (False, True), strict=True)
    )
    return policy.parameters, scorer.parameters


def test_an_iteration_by_hand(folders: tuple[str, str]) -> None:
    rollout, score, update = estimate(ppo(folders, critic=SeparateCritic(folders[1])), prompts(), ALONE)
    policy, scorer = weights(folders)
    for phase in (rollout, score, update):
        assert phase.parts["trained weights"] == 4 * (policy + scorer)
        assert phase.parts["optimizer state"] == 8 * (policy + scorer)
        assert phase.parts["frozen weights"] == 4 * (policy + scorer)  # reference and reward
        assert phase.parts["process"] == 1000
    assert rollout.parts["keys and values"] == 4 * 16 * 64 * 2 * 2 * 128  # rows, tokens, layers, both, numbers
    assert "gradients" not in rollout.parts
    assert update.parts["gradients"] == 4 * (policy + scorer)
    kept = trace(LlamaConfig.from_pretrained(folders[0]), scalar=False, rows=8, length=64, mixed=False).kept
    assert update.parts["activations"] == pytest.approx(kept)  # of one network at a time
    assert update.seconds > score.seconds > 0 < rollout.seconds


def activations(folders: tuple[str, str], setting: Setting = ALONE, **options: Any) -> float:
    return estimate(ppo(folders, **options), prompts(), setting)[-1].parts["activations"]


def test_what_settings_change(folders: tuple[str, str]) -> None:
    whole = activations(folders)
    assert activations(folders, max_tokens_per_microbatch=256) == pytest.approx(whole / 2, rel=0.02)
    assert activations(folders, critic=TrunkCritic()) == pytest.approx(whole, rel=0.01)
    two = Setting(MACHINE, mixed=False, processes=2)
    # Half the rows, but policy and critic together.
    assert activations(folders, two) == pytest.approx(whole, rel=0.02)
    alone, shared = (estimate(ppo(folders), prompts(), setting) for setting in (ALONE, two))
    assert shared[0].parts["keys and values"] == alone[0].parts["keys and values"] / 2
    assert shared[2].parts["gradients"] > alone[2].parts["gradients"]
    mixed = estimate(ppo(folders), prompts(), Setting(MACHINE, mixed=True, processes=1))
    assert mixed[2].parts["activations"] < whole
    assert mixed[0].parts["copy for sampling"] == 2 * weights(folders)[0]
    epochs = [estimate(ppo(folders, ppo_epochs=n), prompts(), ALONE)[2].seconds for n in (1, 3)]
    assert epochs[1] == pytest.approx(3 * epochs[0])


def pairs(batch_size: int = 4) -> PreferenceDataModule:
    return PreferenceDataModule("unread.jsonl", batch_size=batch_size, max_length=64, max_prompt_length=32)


def test_steps_on_pairs(folders: tuple[str, str]) -> None:
    policy, _ = weights(folders)
    (dpo,) = estimate(DPOModule(folders[0]), pairs(), ALONE)
    (cached,) = estimate(DPOModule(folders[0], reference_cache="somewhere"), pairs(), ALONE)
    assert dpo.parts["frozen weights"] == 4 * policy
    assert cached.parts["frozen weights"] == 0
    assert cached.seconds < dpo.seconds
    (reward,) = estimate(RewardModule(folders[0]), pairs(), ALONE)
    assert reward.parts["vocabulary head"] == 0 < dpo.parts["vocabulary head"]
    assert reward.parts["frozen weights"] == 0
    kept = trace(LlamaConfig.from_pretrained(folders[0]), scalar=False, rows=8, length=64, mixed=False).kept
    assert dpo.parts["activations"] == kept  # both sides of four pairs
    (longer,) = estimate(DPOModule(folders[0], max_tokens_per_microbatch=512), pairs(8), ALONE)
    assert longer.seconds > 1.8 * dpo.seconds  # of more passes, each with its head
    (cut,) = estimate(DPOModule(folders[0], max_tokens_per_microbatch=256), pairs(), ALONE)
    assert cut.parts["activations"] == pytest.approx(kept / 2, rel=0.02)


def test_what_it_does_not_know_is_refused(folders: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="plan does not know PPOModule with PreferenceDataModule"):
        estimate(ppo(folders), pairs(), ALONE)


def test_machines() -> None:
    assert gpu("H200", mixed=True).flops == pytest.approx(16 * gpu("h200", mixed=False).flops)
    with pytest.raises(UserError, match=r"--gpu 'h20' is not known. Did you mean 'h200'\?"):
        gpu("h20", mixed=True)
    processor = this_processor()
    assert processor.flops > 1e8
    assert processor.bandwidth > 1e8


def test_the_command(folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy, scorer = folders
    rows = tmp_path / "prompts.jsonl"
    rows.write_text(json.dumps({"prompt": "tea"}) + "\n")
    arguments = ["--model=PPOModule", f"--model.policy={policy}", "--model.reward=RewardModel"]
    arguments += [f"--model.reward.path={scorer}", "--data=PromptDataModule", f"--data.source={rows}"]
    assert main(["plan", *arguments, "--gpu", "a10", "--gpus", "2", "--trainer.precision=bf16-mixed"]) == 0
    told = capsys.readouterr().out
    assert "rollout       score      update" in told
    assert "a10: at most" in told
    assert "MiB for each of 2 processes" in told
    assert "It fits into 22,888 MiB." in told
    assert main(["plan", *arguments]) == 0
    assert "processor, " in capsys.readouterr().out
    assert main(["plan", "--help"]) == 0
    assert "--gpu NAME" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu=h20"], "--gpu 'h20' is not known. Did you mean 'h200'?"),
        (["--gpus=0"], "--gpus is '0'; expected a number of at least 1."),
        (["--trainer.precision=16-mixed"], "plan knows trainer.precision 32-true and bf16-mixed, not 16-mixed."),
        (["--model.ppo_epoch=2"], "ppo_epochs"),
    ],
)
def test_mistakes_end_in_one_line(
    folders: tuple[str, str], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    policy, scorer = folders
    given = ["--model=PPOModule", f"--model.policy={policy}", "--model.reward=RewardModel"]
    given += [f"--model.reward.path={scorer}", "--data=PromptDataModule", "--data.source=x.jsonl", *arguments]
    assert main(["plan", *given]) == 2
    assert message in capsys.readouterr().err


def test_a_phase_adds_up() -> None:
    assert Phase("update", {"a": 1.0, "b": 2.5}).total == 3.5


def adapted(folder: str, *, scalar: bool = False, rank: int = 4) -> tuple[int, int]:
    """Return how many numbers adapters leave frozen, and how many they, and a scalar head, have."""
    model: Any = (AutoModelForSequenceClassification if scalar else AutoModelForCausalLM).from_pretrained(folder)
    add_adapters(model, LoRA(rank))
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad == trained) for trained in (False, True)]
    return counts[0], counts[1]


@pytest.mark.skipif(not find_spec("peft"), reason="adapters need peft, which is not installed")
def test_adapters_leave_one_set_of_weights(folders: tuple[str, str]) -> None:
    """Policy and reference are one, critic and reward another; without, there are four."""
    policy, scorer = folders
    critic = SeparateCritic(scorer, lora=LoRA(4))
    (frozen, trained), (of_critic, by_critic) = adapted(policy), adapted(scorer, scalar=True)
    rollout, score, update = estimate(ppo(folders, lora=LoRA(4), critic=critic), prompts(), ALONE)
    full = estimate(ppo(folders, critic=SeparateCritic(scorer)), prompts(), ALONE)
    for phase in (rollout, score, update):
        assert phase.parts["trained weights"] == 4 * (trained + by_critic)
        assert phase.parts["optimizer state"] == 8 * (trained + by_critic)
        assert phase.parts["frozen weights"] == pytest.approx(4 * (frozen + of_critic), rel=1e-3)  # a head more
    assert update.parts["gradients"] == 4 * (trained + by_critic)
    assert rollout.parts["copy for sampling"] == full[0].parts["copy for sampling"]  # merged
    assert update.seconds < full[2].seconds
    (alone,) = estimate(DPOModule(policy, lora=LoRA(4)), pairs(), ALONE)
    assert alone.parts["frozen weights"] == 4 * weights(folders)[0]
    (named,) = estimate(DPOModule(policy, lora=LoRA(4), reference=scorer), pairs(), ALONE)
    assert named.parts["frozen weights"] == 4 * (frozen + weights(folders)[0])


@pytest.mark.skipif(not find_spec("peft"), reason="adapters need peft, which is not installed")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_trace_with_adapters_is_what_a_real_pass_keeps(name: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model = add_adapters(make_model(name).train(), LoRA(4))
    found = trace(model.config, scalar=False, rows=3, length=20, mixed=False, lora=LoRA(4))
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert found.kept == pytest.approx(kept_by_a_real_pass(model, 3, 20), rel=0.01)

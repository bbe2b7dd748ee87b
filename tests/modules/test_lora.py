"""Training by adapters, of every module: what changes, what the reference is, what is saved, exported and resumed."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lightning.algorithm.critics import SeparateCritic, TrunkCritic
from rlhf_lightning.data.collate import (
    LabelledExample,
    PairExample,
    SequenceExample,
    collate_labelled,
    collate_pairs,
    collate_sequences,
)
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.stream import BatchStream
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.models.causal_lm import response_logprobs
from rlhf_lightning.models.export import export_checkpoint
from rlhf_lightning.models.lora import LoRA, adapted_layers
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.modules import rollout_module
from rlhf_lightning.modules.base import ModelModule
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.kto import KTOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.rating import RatingModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.rollout import linear
from rlhf_lightning.rollout.decoding import CachedSampler, TransformersSampler
from rlhf_lightning.rollout.reward_model import RewardModel
from rlhf_lightning.rollout.sampler import Sampler

pytest.importorskip("peft", reason="adapters need peft, which is not installed")

MakePPO = Callable[..., PPOModule]
MakePrompts = Callable[..., PromptDataModule]
MakeTrainer = Callable[..., Trainer]
MakeRun = Callable[..., tuple[ModelModule, dict[str, Any]]]
Weights = Callable[[LightningModule], dict[str, Tensor]]

#: Pairs of unequal lengths; the demo's stop token has id 4 and is the padding here too.
PAIRS = [
    PairExample([5, 6 + number], [20 + number] * (1 + number % 3) + [4], [30 + number] * (1 + number % 2) + [4])
    for number in range(6)
]
ROWS = [LabelledExample(p, c, float(number % 2)) for number, (p, c, _) in enumerate(PAIRS)]
TEXTS = [SequenceExample(p, c) for p, c, _ in PAIRS]
PLAIN: dict[str, tuple[type[ModelModule], Any, Any]] = {
    "sft": (SFTModule, TEXTS, collate_sequences),
    "reward": (RewardModule, PAIRS, collate_pairs),
    "rating": (RatingModule, ROWS, collate_labelled),
    "dpo": (DPOModule, PAIRS, collate_pairs),
    "kto": (KTOModule, ROWS, collate_labelled),
}
KINDS = [*PLAIN, "ppo"]
REFERRING = ["dpo", "kto", "ppo"]


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def rows(kind: str) -> BatchStream:
    """Two batches an epoch, which can be stopped between them."""
    _, examples, collate = PLAIN[kind]
    return BatchStream(examples, 3, functools.partial(collate, pad_id=4), seed=0, shuffle=True)


@pytest.fixture
def make(language_model: str, ppo: MakePPO, prompts: MakePrompts) -> MakeRun:
    """``make(kind, **options)`` is a module with adapters of rank 2, and what to fit it on."""

    def make(kind: str, **options: Any) -> tuple[ModelModule, dict[str, Any]]:
        seed_everything(0, verbose=False)
        given = {"lora": LoRA(rank=2), "optimizer": adamw, **options}
        if kind == "ppo":
            given = {"critic": SeparateCritic(lora=LoRA(rank=3)), **given}
            return ppo(**given), {"datamodule": prompts(22, shuffle=True)}
        return PLAIN[kind][0](given.pop("start", language_model), **given), {"train_dataloaders": rows(kind)}

    return make


@pytest.fixture
def base(language_model: str) -> Any:
    """The model that all start from, untouched."""
    return AutoModelForCausalLM.from_pretrained(language_model)


def sequences() -> SequenceBatch:
    return collate_sequences(TEXTS, pad_id=4)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_before_the_first_step_ppo_is_at_its_reference(
    make: MakeRun, trainer: MakeTrainer, recorder: Any, precision: str
) -> None:
    module, data = make("ppo")
    trainer(max_steps=1, logger=recorder, log_every_n_steps=1, precision=precision).fit(module, **data)
    found = {name: recorder.values[f"check/{name}"] for name in ("max_ratio_error", "approx_kl", "max_ref_kl")}
    assert found == {"max_ratio_error": [0.0], "approx_kl": [0.0], "max_ref_kl": [0.0]}
    assert recorder.values["rollout/kl"] == [0.0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_before_the_first_step_nothing_is_preferred(make: MakeRun, trainer: MakeTrainer, precision: str) -> None:
    module, data = make("dpo")
    run = trainer(max_steps=1, precision=precision)
    run.fit(module, **data)
    assert run.callback_metrics["train/loss"].item() == pytest.approx(math.log(2), rel=1e-7)
    assert run.callback_metrics["train/margin"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_and_heads_alone_are_trained(make: MakeRun, trainer: MakeTrainer, weights: Weights, kind: str) -> None:
    module, data = make(kind)
    module.configure_model()
    before, run = weights(module), trainer(max_steps=3)
    run.fit(module, **data)
    changed = {name for name, tensor in weights(module).items() if not torch.equal(tensor, before[name])}
    own = {name for name in before if ".lora_" in name or name.endswith("score.weight")}
    assert changed == own
    optimized = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(parameter) for name, parameter in module.named_parameters() if name in own}
    assert len(run.optimizers[0].state) == len(own)


@pytest.mark.parametrize("kind", REFERRING)
def test_after_training_the_reference_is_the_untouched_model(
    make: MakeRun, trainer: MakeTrainer, base: Any, kind: str
) -> None:
    module: Any
    module, data = make(kind)
    trainer(max_steps=3).fit(module, **data)
    untouched = response_logprobs(base, sequences())
    assert torch.equal(response_logprobs(module.reference, sequences()), untouched)
    assert not torch.allclose(response_logprobs(module.policy, sequences()), untouched, atol=1e-2)


@pytest.mark.parametrize("kind", REFERRING)
def test_policy_and_reference_are_one_set_of_weights(make: MakeRun, base: Any, kind: str) -> None:
    """What the module holds is the model once, the adapters, and of PPO the head of a critic on the policy's trunk."""
    module, _ = make(kind, **({"critic": TrunkCritic()} if kind == "ppo" else {}))
    module.configure_model()
    held, trained = bytes_held(module)
    assert held == sum(p.nbytes for p in base.parameters()) + trained
    other, _ = make(kind, reference=module.model_name, **({"critic": TrunkCritic()} if kind == "ppo" else {}))
    other.configure_model()
    assert bytes_held(other)[0] > held


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_export_is_a_plain_model(make: MakeRun, trainer: MakeTrainer, tmp_path: Path, kind: str) -> None:
    """It says what the module says, and a checkpoint alone gives the same files."""
    module: Any
    module, data = make(kind)
    run = trainer(max_steps=2)
    run.fit(module, **data)
    module.export_model(tmp_path / "model")
    run.save_checkpoint(tmp_path / "run.ckpt")
    export_checkpoint(tmp_path / "run.ckpt", tmp_path / "again")
    scalar = kind in ("reward", "rating")
    loaded = (AutoModelForSequenceClassification if scalar else AutoModelForCausalLM).from_pretrained(
        tmp_path / "model"
    )
    assert not [name for name in loaded.state_dict() if "lora" in name or "base_layer" in name]
    assert not list((tmp_path / "model").glob("adapter*"))
    if scalar:
        found, expected = ScalarModel(loaded).scores(sequences()), module.scalar.scores(sequences())
    else:
        found, expected = response_logprobs(loaded, sequences()), response_logprobs(module.policy, sequences())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for file in (tmp_path / "model").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_ppo_starts_from_the_export(make: MakeRun, trainer: MakeTrainer, recorder: Any, tmp_path: Path) -> None:
    module, data = make("dpo")
    trainer(max_steps=2).fit(module, **data)
    module.export_model(tmp_path / "model")
    for lora in (None, LoRA(rank=1)):
        started, data = make("ppo", policy=str(tmp_path / "model"), lora=lora)
        trainer(max_steps=1, logger=recorder, log_every_n_steps=1).fit(started, **data)
    assert recorder.values["check/max_ref_kl"] == [0.0, 0.0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_one_never_stopped(
    make: MakeRun, trainer: MakeTrainer, weights: Weights, tmp_path: Path, kind: str, precision: str
) -> None:
    whole, data = make(kind)
    trainer(max_steps=4, precision=precision).fit(whole, **data)
    stopped, data = make(kind)
    run = trainer(max_steps=1, precision=precision)
    run.fit(stopped, **data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    resumed, data = make(kind)
    run = trainer(max_steps=4, precision=precision)
    run.fit(resumed, **data, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert equal(weights(resumed), weights(whole))
    assert not equal(weights(stopped), weights(whole))


def test_a_checkpoint_of_other_adapters_is_refused(make: MakeRun, trainer: MakeTrainer, tmp_path: Path) -> None:
    module, data = make("dpo")
    run = trainer(max_steps=1)
    run.fit(module, **data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    trained = "the checkpoint was trained with adapters of rank 2 and alpha 32 on 14 layers, but this DPOModule has"
    for lora, own in (
        (None, "no adapters"),
        (LoRA(rank=2, alpha=16.0), "adapters of rank 2 and alpha 16 on 14 layers"),
        (LoRA(rank=1), "adapters of rank 1 and alpha 32 on 14 layers"),
        (LoRA(rank=2, target_modules=["q_proj"]), "adapters of rank 2 and alpha 32 on 2 layers"),
    ):
        other, data = make("dpo", lora=lora)
        with pytest.raises(UserError, match=f"{trained} {own}; give it the same lora"):
            trainer(max_steps=2).fit(other, **data, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    with pytest.raises(UserError, match=f"{trained} no adapters"):
        DPOModule.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    loaded = DPOModule.load_from_checkpoint(tmp_path / "run.ckpt", lora=LoRA(rank=2), weights_only=True)
    assert equal(loaded.state_dict(), module.state_dict())


def test_another_base_is_refused(
    make: MakeRun, trainer: MakeTrainer, save_model: Callable[..., str], tmp_path: Path
) -> None:
    """The weights beside the adapters are the reference too, and so cannot be both the checkpoint's and others."""
    module, data = make("dpo")
    run = trainer(max_steps=1)
    run.fit(module, **data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    other, data = make("dpo", start=save_model(tmp_path / "other", seed=5))
    with pytest.raises(UserError, match="the reference is not the one that the checkpoint was trained with"):
        trainer(max_steps=2).fit(other, **data, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    with pytest.raises(UserError, match=r"policy\..* and reference\..* share weights here, but differ in the ch"):
        trainer().validate(other, rows("dpo"), ckpt_path=tmp_path / "run.ckpt", weights_only=True, verbose=False)


def bytes_held(module: LightningModule) -> tuple[int, int]:
    """Return the bytes of all weights, those of one storage once, and of those that are trained."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}
    return sum(storages.values()), sum(p.nbytes for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("from_reward", [False, True])
def test_a_critic_shares_the_weights_that_it_starts_from(
    make: MakeRun, trainer: MakeTrainer, weights: Weights, reward_model: str, base: Any, from_reward: bool
) -> None:
    """And learns what it learns with weights of its own."""
    scorer = AutoModelForSequenceClassification.from_pretrained(reward_model)
    critic = functools.partial(SeparateCritic, init_from=reward_model if from_reward else None, lora=LoRA(rank=3))
    module, data = make("ppo", critic=critic(), reward=RewardModel(reward_model))
    module.configure_model()
    held, trained = bytes_held(module)
    of_reward = sum(parameter.nbytes for parameter in scorer.parameters() if parameter.dim() > 1)  # norms are all ones
    assert held == sum(parameter.nbytes for parameter in base.parameters()) + of_reward + trained
    trainer(max_steps=2).fit(module, **data)
    apart, data = make("ppo", critic=critic(), reward=RewardModel(reward_model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout_module, "share_frozen_weights", lambda module: None)
        apart.configure_model()
    assert bytes_held(apart)[0] > held
    trainer(max_steps=2).fit(apart, **data)
    assert equal(weights(module), weights(apart))


def test_weights_that_are_trained_are_not_shared(make: MakeRun, reward_model: str) -> None:
    module, _ = make("ppo", critic=SeparateCritic(init_from=reward_model), reward=RewardModel(reward_model))
    module.configure_model()
    held, trained = bytes_held(module)
    scorer = AutoModelForSequenceClassification.from_pretrained(reward_model)
    assert trained > sum(parameter.nbytes for parameter in scorer.parameters())
    assert held == sum({id(p): p.nbytes for p in module.parameters()}.values())


def test_adapters_on_random_weights_are_refused(language_model: str) -> None:
    with pytest.raises(UserError, match="lora is set, but pretrained is false"):
        SFTModule(language_model, pretrained=False, lora=LoRA())


@pytest.mark.parametrize("sampler", [CachedSampler(), CachedSampler(pack_weights=False), TransformersSampler()])
@pytest.mark.parametrize(("precision", "gap"), [("32-true", 1e-5), ("bf16-mixed", 0.05)])
def test_the_adapted_policy_samples(
    make: MakeRun,
    trainer: MakeTrainer,
    recorder: Any,
    monkeypatch: pytest.MonkeyPatch,
    sampler: Sampler,
    precision: str,
    gap: float,
) -> None:
    """What a sampler says of its tokens is what training says of them, also once the adapters have moved."""
    monkeypatch.setattr(linear, "SMALLEST", 0)
    module, data = make("ppo", sampler=sampler)
    trainer(max_steps=4, logger=recorder, log_every_n_steps=1, precision=precision).fit(module, **data)
    assert recorder.values["rollout/kl"][-1] > 0.5
    assert max(recorder.values["rollout/sampler_gap"]) < gap


def test_a_copy_for_sampling_has_the_adapters_merged(make: MakeRun) -> None:
    module: Any
    module, _ = make("ppo")
    module.configure_model()
    sampler = CachedSampler()
    sampler.setup(module.policy, dtype=torch.bfloat16)
    assert adapted_layers(module.policy)
    assert not adapted_layers(sampler.model)


def test_packed_weights_are_the_merged_ones(make: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """One packed matrix a layer and one for the head: none for the halves of an adapter."""
    monkeypatch.setattr(linear, "SMALLEST", 0)
    module: Any
    module, _ = make("ppo")
    module.configure_model()
    packed = linear.PackedLinears()
    with torch.no_grad(), packed.applied(module.policy):
        module.policy(input_ids=torch.arange(4)[None])
    assert len(packed._packed) == (len(adapted_layers(module.policy)) + 1 if linear.packing_works() else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_into_passes_changes_nothing(make: MakeRun, trainer: MakeTrainer, weights: Weights, kind: str) -> None:
    """Plain gradient descent, so that what the weights move by is the gradient."""
    results = []
    for budget in (8, 4096):
        sgd = functools.partial(torch.optim.SGD, lr=0.1)
        module, data = make(kind, max_tokens_per_microbatch=budget, optimizer=sgd)
        accumulating = {} if kind == "ppo" else {"accumulate_grad_batches": 2}
        trainer(max_steps=1, **accumulating).fit(module, **data)
        results.append(weights(module))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-6)


def test_a_kept_reference_says_the_same_and_comes_back_without_a_copy(
    language_model: str, trainer: MakeTrainer, weights: Weights, tmp_path: Path
) -> None:
    from rlhf_lightning.data.preferences import PreferenceDataModule

    results = []
    for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        seed_everything(0, verbose=False)
        module = DPOModule(language_model, lora=LoRA(rank=2), reference_cache=cache, optimizer=adamw)
        sizes: Any = {"limit": 10, "val_size": 2, "batch_size": 2, "max_length": 96, "max_prompt_length": 48}
        trainer(max_epochs=2).fit(module, datamodule=PreferenceDataModule("builtin:demo/train", **sizes))
        assert hasattr(module, "reference") == (cache is None)
        results.append({name: t for name, t in weights(module).items() if name.startswith("policy.")})
    trainer().validate(module, rows("dpo"), verbose=False)  # rows that it does not know bring the reference back
    assert bytes_held(module)[0] == sum(parameter.nbytes for parameter in module.policy.parameters())
    for found in results[1:]:
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, results[0][name], rtol=1e-3, atol=1e-4)

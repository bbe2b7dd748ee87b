"""DPO's reference, asked once and kept on disk: the same numbers, without the model."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from rlhf_lightning.checkpoint_files import CHECKPOINT_KEY
from rlhf_lightning.data.collate import collate_sequences
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.models import causal_lm
from rlhf_lightning.models.logprob_cache import LogprobCache
from rlhf_lightning.modules.base import fingerprint
from rlhf_lightning.modules.dpo import DPOModule

MakeTrainer = Callable[..., Trainer]
BATCH = collate_sequences([([5, 6], [7, 8, 9]), ([5], [6]), ([5, 6, 7], [8, 9])], pad_id=4)


@pytest.fixture
def pairs(tmp_path: Path) -> Callable[..., PreferenceDataModule]:
    """``pairs(n)`` is a data module of n pairs of unequal lengths, and three others for validation."""

    def make(n: int = 6, first: int = 0) -> PreferenceDataModule:
        files = [tmp_path / f"{name}-{n}-{first}.jsonl" for name in ("train", "val")]
        for file, numbers in zip(files, (range(first, first + n), range(100, 103)), strict=True):
            rows = [
                {"prompt": f"tea {i}", "chosen": "good " * (i % 3 + 1), "rejected": "bad " * (i % 4 + 1)}
                for i in numbers
            ]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return PreferenceDataModule(str(files[0]), str(files[1]), batch_size=4, max_prompt_length=48)

    return make


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each pass since was the reference's: one without a gradient."""
    seen: list[bool] = []
    before = causal_lm.response_pass

    def noted(model: Any, batch: SequenceBatch, **options: Any) -> Any:
        seen.append(not next(model.parameters()).requires_grad)
        return before(model, batch, **options)

    monkeypatch.setattr(causal_lm, "response_pass", noted)
    return seen


def dpo(policy: str, reference: str, cache: Path | None, **options: Any) -> DPOModule:
    return DPOModule(
        policy,
        reference,
        ld_alpha=0.5,
        reference_cache=None if cache is None else str(cache),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        **options,
    )


def test_metrics_and_weights_are_those_without_it(
    language_model: str,
    save_model: Callable[..., str],
    pairs: Callable[..., PreferenceDataModule],
    trainer: MakeTrainer,
    weights: Callable[[LightningModule], dict[str, Tensor]],
    asked: list[bool],
    tmp_path: Path,
) -> None:
    reference = save_model(tmp_path / "reference", seed=5)
    results = []
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        module, run = dpo(language_model, reference, cache), trainer(max_epochs=2)
        asked.clear()
        run.fit(module, datamodule=pairs())
        state = {name: tensor for name, tensor in weights(module).items() if name.startswith("policy.")}
        results.append((state, {name: float(value) for name, value in run.callback_metrics.items()}, sum(asked)))
        assert hasattr(module, "reference") == (cache is None)
    (state, metrics, _), *others = results
    assert metrics["val/margin_mean"] != 0
    for other, found, _ in others:
        assert found == pytest.approx(metrics, rel=1e-4, abs=1e-5)
        for name, tensor in state.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)
    assert results[0][2] > results[1][2] > results[2][2] == 0  # each step, each row once, never


def test_rows_that_are_new_are_added(
    language_model: str, pairs: Callable[..., PreferenceDataModule], trainer: MakeTrainer, tmp_path: Path
) -> None:
    for data, known in ((pairs(6), 18), (pairs(6, first=4), 26)):  # four of six are new; both sides of each
        module = DPOModule(language_model, reference_cache=str(tmp_path / "cache"))
        trainer(max_epochs=1).fit(module, datamodule=data)
        assert module._cache is not None
        assert len(module._cache) <= known
        assert not module._cache.missing(
            SequenceBatch.stack([batch for pair in [data.collate(data.train_examples)] for batch in pair[:2]])
        )
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("limits", "passes"), [({"max_steps": 1}, 1), ({"max_epochs": 1, "limit_train_batches": 1}, 2)]
)
def test_a_short_run_asks_about_its_own_rows_alone(
    limits: dict[str, int],
    passes: int,
    language_model: str,
    pairs: Callable[..., PreferenceDataModule],
    trainer: MakeTrainer,
    weights: Callable[[LightningModule], dict[str, Tensor]],
    asked: list[bool],
    tmp_path: Path,
) -> None:
    """Of twelve pairs four are trained on; the second time they are known, and three of validation where it runs."""
    kept = []
    for cache, expected in ((None, passes), (tmp_path / "cache", passes), (tmp_path / "cache", 0)):
        module = dpo(language_model, language_model, cache)
        asked.clear()
        trainer(**limits, num_sanity_val_steps=0).fit(module, datamodule=pairs(12))
        assert sum(asked) == expected
        assert hasattr(module, "reference")
        kept.append(weights(module))
        if cache is not None:
            assert module._cache is not None
            assert len(module._cache) <= 14  # two sides of seven pairs
    for state in kept[1:]:
        for name, tensor in kept[0].items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-6)


def test_rows_of_another_data_set_are_answered_by_the_reference(
    language_model: str, pairs: Callable[..., PreferenceDataModule], trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = DPOModule(language_model, reference_cache=str(tmp_path / "cache"))
    trainer(max_epochs=1).fit(module, datamodule=pairs())
    others = pairs(4, first=50)
    (cached,) = trainer().validate(module, datamodule=others, verbose=False)
    live = DPOModule(language_model)
    live.configure_model()
    live.policy.load_state_dict(module.policy.state_dict())
    (expected,) = trainer().validate(live, datamodule=others, verbose=False)
    assert cached == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_resumed_run_meets_the_same_reference(
    language_model: str,
    save_model: Callable[..., str],
    pairs: Callable[..., PreferenceDataModule],
    trainer: MakeTrainer,
    tmp_path: Path,
) -> None:
    reference, other = (save_model(tmp_path / f"reference-{seed}", seed=seed) for seed in (5, 6))
    run = trainer(max_steps=2)
    module = dpo(language_model, reference, tmp_path / "cache")
    run.fit(module, datamodule=pairs())
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    alone = DPOModule(reference)
    alone.configure_model()
    assert saved[CHECKPOINT_KEY]["frozen"]["reference"] == fingerprint(alone.policy)
    longer = trainer(max_steps=3)
    again = dpo(language_model, reference, tmp_path / "cache")
    longer.fit(again, datamodule=pairs(), ckpt_path=tmp_path / "last.ckpt")
    assert longer.global_step == 3
    with pytest.raises(UserError, match="the reference is not the one that the checkpoint was trained with"):
        trainer(max_steps=3).fit(
            dpo(language_model, other, tmp_path / "cache"), datamodule=pairs(), ckpt_path=tmp_path / "last.ckpt"
        )


def test_the_cache_gives_back_what_it_was_given(tmp_path: Path) -> None:
    cache = LogprobCache(tmp_path, model="a", precision="32-true")
    assert cache.missing(BATCH) == [0, 1, 2]
    logprobs = torch.where(BATCH.response_mask, -torch.rand(3, 3), 0.0)
    cache.put(BATCH.select(torch.tensor([0, 2])), logprobs[[0, 2]])
    assert cache.missing(BATCH) == [1]
    cache.put(BATCH, logprobs)
    cache.save()
    again = LogprobCache(tmp_path, model="a", precision="32-true")
    everything = again.get(BATCH)
    assert everything is not None
    assert torch.equal(everything, logprobs)
    order = torch.tensor([2, 1])
    some = again.get(BATCH.select(order))
    assert some is not None
    assert torch.equal(some, logprobs[order][:, :2])
    assert LogprobCache(tmp_path, model="b", precision="32-true").get(BATCH) is None
    # Where the response begins, the model and the precision are part of the key.
    assert again.missing(BATCH._replace(prompt_lengths=BATCH.prompt_lengths + 10)) == [0, 1, 2]
    for other in ({"model": "b", "precision": "32-true"}, {"model": "a", "precision": "bf16-mixed"}):
        assert LogprobCache(tmp_path, **other).missing(BATCH) == [0, 1, 2]


def test_a_place_that_cannot_be_is_refused(language_model: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"reference_cache '.*file' cannot be made a folder: Not a directory"):
        LogprobCache(tmp_path / "file", model="a", precision="32-true")
    with pytest.raises(UserError, match="reference_cache is set, but reference_free is true"):
        DPOModule(language_model, reference_free=True, reference_cache=str(tmp_path))


def test_a_second_fit_of_the_same_module_asks_the_reference_again(
    language_model: str, pairs: Callable[..., PreferenceDataModule], trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = DPOModule(language_model, reference_cache=str(tmp_path / "cache"))
    trainer(max_epochs=1).fit(module, datamodule=pairs())
    trainer(max_epochs=1).fit(module, datamodule=pairs(5, first=20))
    assert module._cache is not None
    assert not hasattr(module, "reference")


def test_rows_that_are_not_known_beforehand_are_refused(
    language_model: str, pairs: Callable[..., PreferenceDataModule], trainer: MakeTrainer, tmp_path: Path
) -> None:
    data = pairs()
    module = DPOModule(language_model, reference_cache=str(tmp_path / "cache"))
    data.tokenizer_name = language_model
    data.setup("fit")
    with pytest.raises(UserError, match="reference_cache is set, but the rows come from a dataloader"):
        trainer(max_steps=1).fit(module, data.train_dataloader())


def test_what_an_interrupted_filling_has_is_kept(
    language_model: str,
    pairs: Callable[..., PreferenceDataModule],
    trainer: MakeTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlhf_lightning.modules.dpo._ROWS_AT_A_TIME", 3)
    put, calls = LogprobCache.put, []

    def interrupted(self: LogprobCache, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        put(self, *arguments)

    monkeypatch.setattr(LogprobCache, "put", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(max_steps=2).fit(DPOModule(language_model, reference_cache=str(tmp_path / "cache")), datamodule=pairs())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which Lightning ignores while it ends
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(LogprobCache(tmp_path / "cache", model=_fingerprint(language_model), precision="32-true")) == 6
    assert [file.suffix for file in folder.iterdir()] == [".safetensors"]


def _fingerprint(folder: str) -> str:
    module = DPOModule(folder)
    module.configure_model()
    return fingerprint(module.policy)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    cache = LogprobCache(tmp_path, model="a", precision="32-true")
    cache.put(BATCH, torch.zeros(3, 3))
    cache.save()
    (file,) = cache.folder.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match=rf"reference_cache: '.*{file.name}' is damaged .*; delete it"):
        LogprobCache(tmp_path, model="a", precision="32-true")


def test_what_was_said_in_another_precision_does_not_count(
    language_model: str,
    save_model: Callable[..., str],
    pairs: Callable[..., PreferenceDataModule],
    trainer: MakeTrainer,
    tmp_path: Path,
) -> None:
    reference = save_model(tmp_path / "reference", seed=5)
    module = dpo(language_model, reference, tmp_path / "cache")
    trainer(max_epochs=1, precision="bf16-mixed").fit(module, datamodule=pairs())
    fresh = dpo(language_model, reference, None)
    fresh.configure_model()
    fresh.policy.load_state_dict(module.policy.state_dict())
    [found], [expected] = (trainer().validate(each, datamodule=pairs(), verbose=False) for each in (module, fresh))
    assert found == expected

"""A run that was stopped and taken up again is the run that was not, wherever in an epoch it was stopped."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from rlhf_lightning.__main__ import main
from rlhf_lightning.checkpoint_files import read_head
from rlhf_lightning.checkpointing import RunCheckpoint
from rlhf_lightning.data.digest import content_digest
from rlhf_lightning.loggers import read_metrics
from rlhf_lightning.taking_up import refuse_to_take_up

TINY = "{hidden_size: 16, intermediate_size: 32, num_attention_heads: 2, num_key_value_heads: 2}"
COMMON = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--model.optimizer.lr=0.01"]
#: Five batches an epoch.
SFT = ["--model=SFTModule", "--model.model=builtin:demo", "--model.pretrained=false", *COMMON]
SFT += [f"--model.config_overrides={TINY}", "--data=DemonstrationDataModule", "--data.source=builtin:demo/train"]
SFT += ["--data.limit=24", "--data.val_size=4", "--data.batch_size=4"]


class CtrlCAt(Callback):
    """Presses Ctrl-C once, in a batch or in the validation."""

    def __init__(self, batch: int, validation: bool = False) -> None:
        self.batch, self.validation, self.seen = batch, validation, 0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.seen += 1
        if self.seen == self.batch and not self.validation:
            os.kill(os.getpid(), signal.SIGINT)

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self.validation and self.seen == self.batch:
            self.batch = -1
            os.kill(os.getpid(), signal.SIGINT)


class StoppedAt(RunCheckpoint):
    """Saves each step, and is stopped at one: killed before it ("kill") or in the validation after the one before
    ("kill_validation"), or right behind its save ("kill_saved"), asked to stop within it ("SIGINT", "SIGTERM"), or,
    saving nothing else, while the one before is logged ("log").
    """

    def __init__(self, batch: int, how: str) -> None:
        super().__init__(every_n_steps=0 if how == "log" else 1)
        self.batch, self.how = batch, how

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.batch and self.how == "kill":
            raise RuntimeError("killed")
        if trainer.global_step == self.batch and self.how.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[self.how])

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        if trainer.global_step == self.batch and self.how == "kill_saved":
            raise RuntimeError("killed")
        if trainer.global_step == self.batch and self.how == "log":  # the hook of RunCheckpoint is over
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.batch and self.how == "kill_validation" and not trainer.sanity_checking:
            raise RuntimeError("killed")


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def fit(folder: str, *more: str, base: list[str] = SFT) -> int:
    return main(["fit", *base, f"--run_dir={folder}", *more])


def rows(folder: str, key: str = "train/loss") -> list[float]:
    logged = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in logged if key in row]


def weights(folder: str) -> dict[str, torch.Tensor]:
    state = torch.load(Path(folder, "checkpoints/last.ckpt"), weights_only=True)["state_dict"]
    return {name: tensor for name, tensor in state.items() if name.startswith("policy.")}


def check_equal(folder: str, whole: str, *keys: str) -> None:
    for key in keys:
        assert rows(folder, key) == rows(whole, key)
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(folder).items())


def at(batch: int, validation: bool = False) -> list[str]:
    own = "--trainer.callbacks=test_taking_up.CtrlCAt"
    return [own, f"--trainer.callbacks.batch={batch}", f"--trainer.callbacks.validation={str(validation).lower()}"]


@pytest.fixture(autouse=True)
def _can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


# Five batches an epoch: within one, its last, the first of the next, and the validation after the last.
@pytest.mark.parametrize(("batch", "validation"), [(3, False), (5, False), (6, False), (5, True)])
def test_epochs_go_on_with_the_data_they_stopped_at(batch: int, validation: bool) -> None:
    assert fit("whole", "--trainer.max_epochs=3") == 0
    assert fit("cut", "--trainer.max_epochs=3", *at(batch, validation)) == 130
    assert len(rows("cut")) == batch
    assert fit("cut", "--trainer.max_epochs=3", "--ckpt_path=auto") == 0
    assert len(rows("whole")) == 15
    check_equal("cut", "whole", "train/loss", "val/loss")


def fit_in_parts(*more: str, stops: list[tuple[int, str]]) -> list[list[Any]]:
    """Return the logged losses by step and epoch, of a run that was stopped so and of one that was not."""
    assert fit("whole", *more) == 0
    for batch, how in stops:
        own = ["--trainer.callbacks=test_taking_up.StoppedAt", f"--trainer.callbacks.batch={batch}"]
        with contextlib.suppress(RuntimeError):
            assert fit("cut", *more, *own, f"--trainer.callbacks.how={how}", "--ckpt_path=auto") in (130, 143)
    assert fit("cut", *more, "--ckpt_path=auto") == 0
    check_equal("cut", "whole")
    logged = [read_metrics(Path(run, "metrics.jsonl")) for run in ("cut", "whole")]
    return [[[row.get(key) for key in ("step", "epoch", "train/loss", "val/loss")] for row in run] for run in logged]


# Within an epoch and at the end of one.
@pytest.mark.parametrize(("batch", "every"), [(2, 2), (5, 1.0)])
def test_a_validation_that_was_cut_is_made_up_for(batch: int, every: float) -> None:
    epochs = ["--trainer.max_epochs=2", f"--trainer.val_check_interval={every}"]
    cut, whole = fit_in_parts(*epochs, stops=[(batch, "kill_validation")])
    assert cut == whole


# Two batches an epoch. By Lightning's counts the first ends at the second restart, the others take too many steps.
@pytest.mark.parametrize(
    "stops", [[(2, "kill"), (3, "kill")], [(2, "kill"), (4, "kill")], [(2, "kill"), (6, "SIGINT")]]
)
def test_a_run_may_be_stopped_time_and_again(stops: list[tuple[int, str]]) -> None:
    cut, whole = fit_in_parts("--trainer.max_epochs=4", "--data.limit=8", "--data.val_size=0", stops=stops)
    assert len(whole) == 8
    assert cut == whole


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_steps_keep_their_numbers_after_a_stop_at_a_validation(how: str) -> None:
    cut, whole = fit_in_parts("--trainer.max_epochs=2", "--trainer.val_check_interval=2", stops=[(1, how), (8, how)])
    assert cut == whole


def test_a_kill_right_behind_a_save_leaves_no_gap_and_no_step_twice() -> None:
    fit_in_parts("--trainer.max_epochs=2", stops=[(3, "kill_saved"), (7, "kill_saved")])
    lines = [json.loads(line) for line in Path("cut/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines if "train/loss" in row] == list(range(10))
    assert rows("cut", "train/loss") == rows("whole", "train/loss")


# Behind the last step of an epoch, with a validation due there and without.
@pytest.mark.parametrize("every", [3, 5])
def test_a_stop_behind_an_epoch_leaves_the_next_one_its_steps(every: int) -> None:
    steps = [
        "--trainer.max_steps=12",
        f"--trainer.val_check_interval={every}",
        "--trainer.check_val_every_n_epoch=null",
    ]
    cut, whole = fit_in_parts(*steps, stops=[(5, "log"), (10, "log")])
    assert cut == whole


@pytest.mark.parametrize("how", ["kill", "SIGTERM", "log"])
def test_validations_of_every_second_epoch_come_when_they_would_have(how: str) -> None:
    cut, whole = fit_in_parts(
        "--trainer.max_epochs=4", "--trainer.check_val_every_n_epoch=2", stops=[(5, how), (9, how)]
    )
    assert [step for step, _, _, loss in whole if loss is not None] == [9, 19]
    assert cut == whole


def test_a_finished_run_takes_another_epoch_of_other_data() -> None:
    assert fit("whole", "--trainer.max_epochs=2") == 0
    assert fit("cut", "--trainer.max_epochs=1") == 0
    assert fit("cut", "--trainer.max_epochs=2", "--ckpt_path=auto") == 0
    check_equal("cut", "whole", "train/loss")


def test_ctrl_c_waits_for_the_end_of_an_accumulated_step() -> None:
    accumulated = ["--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=2"]
    assert fit("whole", *accumulated) == 0
    assert fit("cut", *accumulated, *at(3)) == 130
    saved = torch.load("cut/checkpoints/last.ckpt", weights_only=True)
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] == 4  # not 3
    assert fit("cut", *accumulated, "--ckpt_path=auto") == 0
    assert all(torch.equal(tensor, weights("whole")[name]) for name, tensor in weights("cut").items())


def test_going_on_by_epochs_where_steps_have_cut_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("run", "--trainer.max_steps=7") == 0
    assert fit("run", "--trainer.max_epochs=2", "--ckpt_path=auto") == 2
    assert "go on by a larger trainer.max_steps, not by trainer.max_epochs" in capsys.readouterr().err
    assert fit("run", "--trainer.max_steps=10", "--ckpt_path=auto") == 0
    assert fit("whole", "--trainer.max_steps=10") == 0
    check_equal("run", "whole", "train/loss")
    last = Path("run/checkpoints/last.ckpt")
    refuse_to_take_up(str(last), read_head(last), "SFTModule", -1)  # which ends where an epoch does


@pytest.mark.parametrize("change", ["a word", "the order", "the template"])
def test_data_that_changed_within_is_refused(change: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [{"prompt": f"Is {n} a number?", "response": "It is."} for n in range(12)]

    def fit_on(rows: list[dict[str, str]], *more: str) -> int:
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = ["--data.source=rows.jsonl", "--data.limit=null", "--trainer.max_steps=3", *more]
        return fit("run", *own)

    assert fit_on(texts) == 0
    longer = ["--trainer.max_steps=4", "--ckpt_path=auto"]
    changed = {"a word": [*texts[:-1], {**texts[-1], "response": "It was."}], "the order": texts[::-1]}
    more = ["--data.chat=false"] if change == "the template" else []
    assert fit_on(changed.get(change, texts), *longer, *more) == 2
    assert (
        "the training rows are as many as when the checkpoint was written, but not the same" in capsys.readouterr().err
    )
    assert fit_on(texts, *longer) == 0


def test_damage_is_told_of_and_the_checkpoint_before_is_taken_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = ["--trainer.callbacks=RunCheckpoint", "--trainer.callbacks.every_n_steps=2", "--trainer.max_epochs=2"]
    assert fit("whole", *saving) == 0
    assert fit("cut", *saving) == 0
    last = Path("cut/checkpoints/last.ckpt")
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    for command in ("validate", "test", "predict", "fit"):
        assert main([command, *SFT, "--run_dir=other", f"--ckpt_path={last}"]) == 2
        err = capsys.readouterr().err
        assert "error: checkpoint 'cut/checkpoints/last.ckpt' is damaged: " in err
        assert "an earlier one of this run is 'cut/checkpoints/step-8.ckpt'." in err
    assert main(["export", f"--ckpt={last}", "--output=model"]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert fit("cut", *saving, "--ckpt_path=auto") == 0
    assert "checkpoint 'cut/checkpoints/last.ckpt' is damaged: " in capsys.readouterr().err
    check_equal("cut", "whole", "train/loss")
    assert sorted(path.name for path in last.parent.iterdir()) == ["last.ckpt", "step-8.ckpt"]
    for path in last.parent.iterdir():
        path.write_bytes(b"")
    assert fit("cut", *saving, "--ckpt_path=auto") == 2  # never a silent fresh start
    assert "every checkpoint in 'cut/checkpoints' is damaged" in capsys.readouterr().err
    last.unlink()
    last.with_name("step-8.ckpt").unlink()
    assert fit("cut", "--ckpt_path=best") == 2
    assert "best.ckpt does not exist" in capsys.readouterr().err


def test_a_second_fit_of_the_same_objects_begins_anew(tmp_path: Path) -> None:
    from rlhf_lightning.data.text import DemonstrationDataModule

    data = DemonstrationDataModule("builtin:demo/train", limit=20, batch_size=4, tokenizer="builtin:demo")
    data.setup("fit")
    first = data.train_dataloader()
    batches = [batch.input_ids for batch in first]
    state = data.state_dict()
    digest = content_digest(data.train_examples)
    assert state == {"stream": {"consumed": 20, "examples": 20, "seed": first.seed, "digest": digest}}
    again = [batch.input_ids for batch in data.train_dataloader()]
    assert all(torch.equal(one, two) for one, two in zip(batches, again, strict=True))
    data.load_state_dict(state)
    later = [batch.input_ids for batch in data.train_dataloader()]
    assert not all(one.shape == two.shape and torch.equal(one, two) for one, two in zip(batches, later, strict=True))

import html
import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from torch.utils.data import DataLoader

from rlhf_lightning.callbacks import SampleTable
from rlhf_lightning.callbacks.samples import MAX_LETTERS, sample_table
from rlhf_lightning.errors import UserError

NASTY = "a | b\n| c |\n\n<script>alert(1)</script> **bold** [link](http://x) `code` _e_ \\| &amp; ~~s~~"


class Talker(pl.LightningModule):
    """Answers "<iteration>:<number>" in manual optimization, as PPO leaves its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(1, 1)
        self.samples: list[dict[str, Any]] = []
        self.val_samples: list[dict[str, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.step()
        self.samples = [self.sample(f"{batch_idx}:{number}") for number in range(3)]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_samples = [self.sample("val")]

    def sample(self, response: str) -> dict[str, Any]:
        prompt = [{"role": "user", "content": "Hi"}]
        return {"prompt": prompt, "response": response, "score": 0.5, "kl": math.nan, "length": 3, "finished": True}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Mute(pl.LightningModule):
    """Has no samples at all, as a reward model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(torch.ones(1, 1)).sum()

    configure_optimizers = Talker.configure_optimizers


def fit(folder: Path, callback: SampleTable, module: pl.LightningModule | None = None, **options: Any) -> None:
    data: DataLoader[Any] = DataLoader(list(range(5)), batch_size=1)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        **{"max_epochs": 1, **options},
        default_root_dir=folder,
        callbacks=[callback],
        logger=TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        log_every_n_steps=1,
    )
    trainer.fit(module or Talker(), data, data)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line, parse_constant=pytest.fail) for line in (folder / "samples.jsonl").read_text().splitlines()
    ]


def cells(table: str) -> list[list[str]]:
    """Return the body of a table as TensorBoard's page shows it."""
    page = markdown_to_safe_html(table)
    body = page.split("<tbody>")[1].split("</tbody>")[0]
    return [
        [cell.split("</td>")[0] for cell in row.split("<td>")[1:]]  # one entry for each cell
        for row in body.split("</tr>")[:-1]
    ]


def test_every_nth_the_first_and_the_last_iteration_are_written(tmp_path: Path) -> None:
    fit(tmp_path, SampleTable(every_n=3, num=2))
    train = [(row["step"], row["response"]) for row in rows(tmp_path) if row["split"] == "train"]
    assert train == [(0, "0:0"), (0, "0:1"), (3, "3:0"), (3, "3:1"), (4, "4:0"), (4, "4:1")]


def test_an_iteration_that_is_both_nth_and_last_is_written_once(tmp_path: Path) -> None:
    fit(tmp_path, SampleTable(every_n=2, num=1))
    assert [row["step"] for row in rows(tmp_path) if row["split"] == "train"] == [0, 2, 4]


def test_validation_samples_stand_at_the_step_of_the_iteration_before(tmp_path: Path) -> None:
    fit(tmp_path, SampleTable(every_n=100), val_check_interval=2)
    found = [(row["step"], row["response"]) for row in rows(tmp_path) if row["split"] == "val"]
    assert found == [(1, "val"), (3, "val")]  # and none from the sanity check


def test_a_line_holds_the_whole_sample_in_valid_json(tmp_path: Path) -> None:
    fit(tmp_path, SampleTable(num=1), max_steps=1)
    assert rows(tmp_path)[0] == {
        "step": 0,
        "split": "train",
        "prompt": [{"role": "user", "content": "Hi"}],
        "response": "0:0",
        "score": 0.5,
        "kl": "NaN",
        "length": 3,
        "finished": True,
    }


def test_tensorboard_shows_the_table(tmp_path: Path) -> None:
    fit(tmp_path, SampleTable(every_n=4, num=2))
    events = EventAccumulator(str(tmp_path)).Reload()
    texts = events.Tensors("samples/rollout/text_summary")
    assert [event.step for event in texts] == [0, 4]
    table = texts[1].tensor_proto.string_val[0].decode()
    assert cells(table) == [
        ["user: Hi", "4:0", "0.500", "nan", "3", "yes"],
        ["user: Hi", "4:1", "0.500", "nan", "3", "yes"],
    ]
    assert events.Tensors("samples/val/text_summary")


def test_any_text_is_shown_as_it_is_in_one_cell() -> None:
    ((prompt, response),) = cells(sample_table([{"prompt": NASTY, "response": "fine"}]))
    assert response == "fine"
    assert html.unescape(prompt.replace("<br>", "\n")) == NASTY
    assert "<script" not in prompt


def test_the_table_cuts_long_texts_and_the_file_does_not(tmp_path: Path) -> None:
    class Chatty(Talker):
        def sample(self, response: str) -> dict[str, Any]:
            return {**super().sample(response), "response": "x" * 5000}

    fit(tmp_path, SampleTable(num=1), Chatty(), max_steps=1)
    assert len(rows(tmp_path)[0]["response"]) == 5000
    table = EventAccumulator(str(tmp_path)).Reload().Tensors("samples/rollout/text_summary")[0]
    assert "x" * MAX_LETTERS + " …" in table.tensor_proto.string_val[0].decode()
    assert "x" * (MAX_LETTERS + 1) not in table.tensor_proto.string_val[0].decode()


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_a_module_without_samples_is_left_alone(tmp_path: Path) -> None:
    fit(tmp_path, SampleTable(), Mute())
    assert not (tmp_path / "samples.jsonl").exists()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    fit(tmp_path, SampleTable(), fast_dev_run=1)
    assert not (tmp_path / "samples.jsonl").exists()


@pytest.mark.parametrize("numbers", [{"every_n": 0}, {"num": 0}])
def test_numbers_below_one_are_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(UserError, match="both must be 1 or more"):
        SampleTable(**numbers)

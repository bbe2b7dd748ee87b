import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.collate import PairBatch
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.readers import line_of_row
from rlhf_lightning.data.stream import EvalBatches
from rlhf_lightning.errors import UserError

PAIRS = [{"prompt": f"Hi {n % 7}", "chosen": f"yes {n}", "rejected": "no"} for n in range(20)]


def write(folder: Path, rows: list[dict[str, Any]], name: str = "pairs.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def pairs(source: str | list[str], stage: str = "fit", **settings: Any) -> PreferenceDataModule:
    data = PreferenceDataModule(
        source, **{"tokenizer": "builtin:demo", "max_length": 64, "max_prompt_length": 32, **settings}
    )
    data.prepare_data()
    data.setup(stage)
    return data


def responses(batches: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [
        tokenizer.decode(tokens[mask], skip_special_tokens=True)
        for batch in batches
        for tokens, mask in zip(batch.chosen.response_tokens, batch.chosen.response_mask, strict=True)
    ]


def test_rows_taken_off_for_validation_share_no_prompt(tmp_path: Path, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    data = pairs(write(tmp_path, PAIRS), val_size=6, shuffle=False)
    assert (len(data.train_examples), len(data.val_examples)) == (14, 6)
    train, val = ({tuple(example.prompt_ids) for example in part} for part in (data.train_examples, data.val_examples))
    assert not train & val
    validated = responses(data.val_dataloader(), demo_tokenizer)
    assert responses(data.test_dataloader(), demo_tokenizer) == responses(data.predict_dataloader(), demo_tokenizer)
    assert sorted([*responses(data.train_dataloader(), demo_tokenizer)[:14], *validated]) == sorted(
        row["chosen"] for row in PAIRS
    )


def test_rows_of_another_file_are_kept_apart_and_overlap_is_counted(tmp_path: Path) -> None:
    val = write(tmp_path, [PAIRS[0], {**PAIRS[0], "prompt": "Ho"}], "val.jsonl")
    data = pairs(write(tmp_path, PAIRS), val_source=val, limit=5)
    assert {name: n for name, n in data.counts.items() if n} == {
        "train_rows": 5,
        "train_kept": 5,
        "val_rows": 2,
        "val_kept": 2,
        "val_prompts_in_training": 1,
    }


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_training_rows_are_read_only_for_training(tmp_path: Path, stage: str) -> None:
    source, val = write(tmp_path, PAIRS), write(tmp_path, PAIRS[:3], "val.jsonl")
    data = pairs(source, stage, val_source=val)
    assert (len(data.train_examples), len(data.val_examples)) == (0, 3)
    assert "train_rows" not in data.counts
    data.setup("fit")
    assert (len(data.train_examples), len(data.val_examples)) == (20, 3)
    assert data.counts["val_prompts_in_training"] == 3
    both = pairs(source, stage, val_size=6)  # one file: the same rows are taken off it, the others are not tokenised
    assert (len(both.train_examples), len(both.val_examples)) == (0, 6)
    again = pairs(source, val_size=6)
    assert [tuple(e.chosen_ids) for e in both.val_examples] == [tuple(e.chosen_ids) for e in again.val_examples]


def test_predict_says_which_rows_it_takes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rlhf_lightning")
    source, val = write(tmp_path, PAIRS), write(tmp_path, PAIRS[:3], "val.jsonl")
    for settings, told in (
        ({"val_source": val}, f"predicting the validation rows of {val} (3); for others set val_source."),
        ({"val_size": 6}, f"predicting the validation rows taken off {source} (6); for others set val_source."),
        ({}, f"predicting all rows of {source} (20); for others set val_source."),
    ):
        pairs(source, "predict", **settings).predict_dataloader()
        assert caplog.records[-1].getMessage() == told


def test_without_validation_rows_fit_runs_and_validate_says_what_is_missing(tmp_path: Path) -> None:
    data = pairs(write(tmp_path, PAIRS))
    assert data.val_dataloader() == []
    assert sum(len(batch.chosen.input_ids) for batch in data.predict_dataloader()) == 20
    for stage in ("validate", "test"):
        with pytest.raises(UserError, match=f"{stage} needs validation rows; set val_source or val_size"):
            data.setup(stage)


def test_an_empty_prompt_is_dropped_from_chats_and_counted(tmp_path: Path) -> None:
    source = write(tmp_path, [*PAIRS[:2], {**PAIRS[0], "prompt": " \n"}])
    assert pairs(source).counts["train_dropped_empty_prompt"] == 1
    assert len(pairs(source, chat=False).train_examples) == 3


def test_a_bad_row_is_named_or_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(
        tmp_path, [*PAIRS[:2], {"prompt": "Hi", "chosen": "x"}, {"prompt": 3, "chosen": "x", "rejected": "y"}]
    )
    with pytest.raises(UserError, match=r"pairs\.jsonl' row 3: no column 'rejected'"):
        pairs(source)
    with caplog.at_level(logging.INFO, logger="rlhf_lightning"):
        data = pairs(source, bad_rows="drop", max_bad_share=0.5)
    assert (data.counts["train_dropped_bad"], len(data.train_examples)) == (2, 2)
    assert [record.getMessage() for record in caplog.records] == [
        f"train data from {source}: rows 4, dropped_bad 2, kept 2",
        f"2 rows were dropped as bad: {source!r} row 3: no column 'rejected'; found 'prompt', 'chosen'. | {source!r} "
        "row 4: prompt is 3; expected text or a list of chat messages.",
    ]
    with pytest.raises(UserError, match=r"nothing is left"):
        pairs(write(tmp_path, [{"prompt": "Hi"}], "none.jsonl"), bad_rows="drop", max_bad_share=1)


def test_more_bad_rows_than_their_share_are_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = {"prompt": "Hi", "chosen": "x"}
    source = write(tmp_path, [*PAIRS[:2], bad, *PAIRS[:6], bad])
    expected = (
        r"2 of 10 rows of .* more than the share of 0\.1 that max_bad_share allows. The first: .* row 3: no column"
    )
    with pytest.raises(UserError, match=expected):
        pairs(source, bad_rows="drop")
    with pytest.raises(UserError, match=r"share of 0\.19 that"):
        pairs(source, bad_rows="drop", max_bad_share=0.19)
    assert len(pairs(source, bad_rows="drop", max_bad_share=0.2).train_examples) == 8
    with pytest.raises(UserError, match=r"max_bad_share is 1\.1; it must lie in \[0, 1\]"):
        pairs(source, bad_rows="drop", max_bad_share=1.1)
    many = write(tmp_path, [PAIRS[0], *[bad] * 7], "many.jsonl")
    pairs(many, bad_rows="drop", max_bad_share=1)
    assert caplog.records[-1].getMessage().endswith("(and 2 more)")
    assert caplog.records[-1].getMessage().count("no column") == 5


def test_a_bad_row_is_named_by_its_line_too_where_that_is_another(tmp_path: Path) -> None:
    good, bad = json.dumps(PAIRS[0]), json.dumps({"prompt": "Hi", "chosen": "x"})
    (tmp_path / "gaps.jsonl").write_text(f"\n{good}\n\n\n{bad}\n")
    (tmp_path / "table.csv").write_text('prompt,chosen,rejected\n"one\ntwo",a,b\nthree,c,d\n')
    (tmp_path / "list.json").write_text(f"[{good},\n{bad}]")
    for name, place in (("gaps.jsonl", r"row 2 \(line 5\): "), ("list.json", "row 2: ")):
        with pytest.raises(UserError, match=place + "no column 'rejected'"):
            pairs(str(tmp_path / name))
    assert [line_of_row(str(tmp_path / "table.csv"), row) for row in (1, 2)] == [" (line 3)", " (line 4)"]
    assert line_of_row(str(tmp_path / "none.parquet"), 1) == ""


def test_what_the_template_refuses_is_named_by_its_row_too(tmp_path: Path) -> None:
    source = write(tmp_path, [PAIRS[0], {**PAIRS[0], "prompt": [{"role": "user", "content": "Hi"}]}])
    with pytest.raises(UserError, match=r"row 2: the prompt is a list of chat messages, but chat is false"):
        pairs(source, chat=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"val_batch_size": -1}, "val_batch_size is -1"),
        ({"limit": 0}, "limit is 0"),
        ({"val_size": -1}, "val_size is -1"),
        ({"val_size": 2, "val_source": "x.jsonl"}, "val_size is 2; .* val_source"),
        ({"val_split": "test"}, "val_split 'test' needs a hub data set"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused_before_anything_is_read(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        PreferenceDataModule("no_such_file.jsonl", **settings)


def test_extremes_are_those_of_all_that_a_model_will_read(tmp_path: Path) -> None:
    data = pairs(write(tmp_path, PAIRS), val_size=6)
    examples = [*data.train_examples, *data.val_examples]
    sides = [[*e.prompt_ids, *side] for e in examples for side in (e.chosen_ids, e.rejected_ids)]
    assert data.extremes() == (max(map(len, sides)), max(map(max, sides)))


def test_what_drops_all_rows_is_told_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dropped_overlong 20\. Raise max_length, or set overlong: truncate\."):
        pairs(write(tmp_path, PAIRS), max_length=8, max_prompt_length=7)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer: .* set tokenizer"):
        pairs(write(tmp_path, PAIRS), tokenizer=None)
    with pytest.raises(RuntimeError, match="call setup"):
        PreferenceDataModule("x.jsonl").encoder.encode("a", "b")


def test_each_rank_has_its_share(tmp_path: Path, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    data = pairs(write(tmp_path, PAIRS), val_size=5, batch_size=4)
    whole = list(data.train_dataloader())
    evaluated: list[str] = []
    for rank in range(2):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
        for batch, share in zip(whole, data.train_dataloader(), strict=True):
            assert responses([share], demo_tokenizer) == responses([batch], demo_tokenizer)[rank::2]
        evaluated += responses(data.val_dataloader(), demo_tokenizer)
    data.trainer = None
    assert sorted(evaluated) == sorted(responses(data.val_dataloader(), demo_tokenizer))


class Recorder(pl.LightningModule):
    """Brings a tokenizer and writes down what it is given."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[str] = []
        self.validated: list[str] = []

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        self.seen += responses([batch], self.tokenizer)
        return self.weight * 1.0

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        self.validated += responses([batch], self.tokenizer)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.0)


def test_a_plain_trainer_drives_it_with_the_tokenizer_of_the_module(
    tmp_path: Path, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    pl.seed_everything(11, verbose=False)
    module = Recorder(demo_tokenizer)
    data = PreferenceDataModule(write(tmp_path, PAIRS), val_size=5, batch_size=4)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    assert len(module.seen) == 2 * 16, "15 rows in batches of 4 are 4 full batches an epoch"
    assert len(set(module.seen[:15])) == 15
    val = data.val_dataloader()
    assert isinstance(val, EvalBatches)
    assert module.validated == 2 * responses(val, demo_tokenizer)
    assert module.seen[:16] == responses(data.train_dataloader(), demo_tokenizer), (
        "the order follows from the run's seed"
    )
    pl.seed_everything(12, verbose=False)
    assert module.seen[:16] != responses(data.train_dataloader(), demo_tokenizer)


def test_a_list_of_sources_is_read_as_one_and_a_bad_row_named_in_its_own(
    tmp_path: Path, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    first, second = write(tmp_path, PAIRS[:3]), write(tmp_path, PAIRS[10:12], "more.jsonl")
    data = pairs([first, second], shuffle=False)
    assert responses(data.train_dataloader(), demo_tokenizer)[:5] == ["yes 0", "yes 1", "yes 2", "yes 10", "yes 11"]
    assert (data.counts["train_rows"], data.counts["train_kept"]) == (5, 5)
    assert pairs(first, val_source=[first, second]).counts["val_rows"] == 5
    broken = write(tmp_path, [PAIRS[0], {"prompt": "Hi", "chosen": "yes"}], "broken.jsonl")
    with pytest.raises(UserError, match=r"broken\.jsonl' row 2: no column 'rejected'"):
        pairs([first, broken])
    with pytest.raises(UserError, match=r"pairs\.jsonl' is named twice in a list of sources"):
        pairs([first, first])
    with pytest.raises(UserError, match="the list of data sources is empty"):
        pairs([])


def test_skip_leaves_out_the_first_rows_of_each_source_of_training(
    tmp_path: Path, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    source = write(tmp_path, PAIRS)
    data = pairs(source, val_source=source, skip=4, limit=2, shuffle=False)
    assert responses(data.train_dataloader(), demo_tokenizer)[:2] == ["yes 4", "yes 5"]
    assert (data.counts["train_rows"], data.counts["val_rows"]) == (2, 20)
    broken = write(tmp_path, [*PAIRS, {"prompt": "Hi"}], "broken.jsonl")
    with pytest.raises(UserError, match=r"broken\.jsonl' row 21: no column"):
        pairs(broken, skip=19)
    with pytest.raises(UserError, match=r"skip is 20, but .* has no more rows than that"):
        pairs(source, skip=20)
    with pytest.raises(UserError, match="skip is -1; expected at least 0"):
        pairs(source, skip=-1)

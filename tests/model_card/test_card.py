import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from rlhf_lightning.evaluation.formatting import TableRow
from rlhf_lightning.evaluation.statistics import Interval
from rlhf_lightning.model_card.card import write_card
from rlhf_lightning.model_card.comparison import MeasuredModel, MeasuredTable
from rlhf_lightning.model_card.records import RunRecords

EVIL = [
    "<script>alert(1)</script>",
    "\n# A heading of mine\n",
    "\n---\nlicense: mit\n---\n",
    "\n```\n# out of the fence\n```python\n",
    "x\r\n| a | b |\n|---|---|\n| 1 | 2 |",
    "![a](https://evil.example/a.png) [b](javascript:alert(1))",
    '"><img src=x onerror=alert(1)>',
    "' : !!python/object:os.system {a: &b *b}",
    "{a: [b, 'c",
    "- item\n- item",
    "`code` **bold** <!-- hidden",
    "\u2028\u2029\x85\x0b\x00\x1b[31m",
]


def measured(text: str) -> MeasuredModel:
    """A comparison in which every text is this one."""
    row = TableRow(text, text, "number", [Interval(1.0, 0.5, 1.5), 2.0])
    names = [f"base{text}", f"own{text}"]
    samples = [
        {"row": 0, "model": name, "prompt": text, "response": text, "score": 1.5, "finished": True} for name in names
    ]
    chat = [{"row": 1, "model": names[1], "prompt": [{"role": text, "content": text}] * 2, "response": text}]
    report = {
        "base": names[0],
        "created": text,
        "seed": 0,
        "reward": text,
        "prompts": {"source": text, "count": 1, "available": 1},
        "sampling": {"temperature": 1.0, "max_new_tokens": 8},
        "questions": [{"prompt": text, "greedy": {names[1]: text}, "sampled": {names[1]: text}}],
    }
    tables = [MeasuredTable("", "", names, [row]), MeasuredTable(text, text, [text, text], [row])]
    return MeasuredModel(Path(), names[1], report, tables, [*samples, *chat])


def records(text: str) -> RunRecords:
    """Records of a run in which every text is this one, where a text may be."""
    reward = {"class_path": text, "init_args": {"path": text, text: text}}
    settings = {
        "model": {
            "class_path": text,
            "init_args": {"policy": text, "reward": reward, "lr": text, text: [text, {text: text}]},
        },
        "data": {"class_path": text, "init_args": {"source": text, "val_source": text, text: text}},
        "seed_everything": 42,
        "trainer": {"precision": text},
    }
    record = {
        "versions": {"rlhf_lightning": text, text: text},
        "hardware": text,
        "precision": text,
        "start": {"name": text, "hub": None},
        "parts": {text: {"class_path": text, "init_args": {text: text}}},
        "data": {"source": text, "counts": {f"train_{text}": 3}, "digest": text},
    }
    metrics = [
        {"step": step, "time": 1.0, "val/loss": 1.0 / (step + 1), f"val/{text}": float(step)} for step in range(3)
    ]
    samples = [{"step": 0, "split": "val", "prompt": text, "response": text, "score": 1.0}]
    return RunRecords(text or "PPOModule", "LlamaForCausalLM", 3, settings, record, metrics, samples, text)


def card_of(folder: Path, given: RunRecords, comparison: MeasuredModel | None = None, **how: Any) -> Any:
    write_card(folder, given, comparison, **how)
    return ModelCard.load(folder / "README.md")


def shape(text: str) -> list[str]:
    """Return what Markdown makes of each line: its heading, fence or table mark, and nothing of what it says."""
    marks = [re.match(r"(#+ |```|\||>|- |---|<)?", line) for line in text.split("\n")]
    return [mark[1] or "" for mark in marks if mark]


@pytest.mark.parametrize("comparison", [True, False])
@pytest.mark.parametrize("evil", EVIL)
def test_no_text_becomes_markup_or_metadata(evil: str, comparison: bool, tmp_path: Path) -> None:
    (tmp_path / "evil").mkdir()
    (tmp_path / "plain").mkdir()
    card = card_of(tmp_path / "evil", records(evil), measured(evil) if comparison else None)
    tame = card_of(tmp_path / "plain", records("tame text"), measured("tame text") if comparison else None)
    assert shape(card.text) == shape(tame.text)
    assert card.data.to_dict().keys() == tame.data.to_dict().keys()
    assert len(card.data.eval_results) == len(tame.data.eval_results)
    # A line that begins with an image is HTML, in which Markdown sees no links.
    assert "](" not in "".join(line for line in card.text.splitlines() if not line.startswith("<img "))
    for text in [card.text, *(path.read_text() for path in tmp_path.glob("evil/curves/*"))]:
        assert not re.search(r"<(script|!--)|<img src=x|onerror=alert\(1\)>|\x1b|\x00", text)
        assert not re.search(r'alt="[^"]*"(?! width="376">)', text)
        assert set(re.findall(r"<(\w+)", text)) <= {
            *("b", "br", "code", "img", "svg", "style", "rect", "text", "line", "g", "path", "circle", "title")
        }


def test_no_path_of_the_home_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    text = "/home/someone/runs/sft and [/home/someone] and /home/someone_else"
    card_of(tmp_path, records(text), measured(text))
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert not re.search(r"/home/someone(?!&#95;else|_else)", written)
    assert "~/runs/sft" in written


def test_what_is_unknown_is_left_out(tmp_path: Path) -> None:
    card = card_of(tmp_path, RunRecords("", "LlamaForCausalLM", 0), name="thing")
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags", "model_name"}
    for heading in ("Results", "Samples", "Settings", "Curves", "Methods"):
        assert f"# {heading}" not in card.text
    assert "None" not in card.text
    assert "null" not in card.text


def test_names_of_the_hub_become_links(tmp_path: Path) -> None:
    known = RunRecords(
        "DPOModule",
        "LlamaForCausalLM",
        3,
        settings={"data": {"class_path": "x", "init_args": {"source": "HumanLLMs/Human-Like-DPO-Dataset:default"}}},
        record={"start": {"name": "runs/sft/model", "hub": "HuggingFaceTB/SmolLM-135M-Instruct"}},
    )
    card = card_of(tmp_path, known, name="m")
    assert card.data.base_model == "HuggingFaceTB/SmolLM-135M-Instruct"
    assert card.data.datasets == ["HumanLLMs/Human-Like-DPO-Dataset"]
    assert "from `runs/sft/model`, which goes back to `HuggingFaceTB/SmolLM-135M-Instruct`" in card.text


def test_limits_are_those_of_the_run(tmp_path: Path) -> None:
    metrics = [{"step": 0, "val/kl": 12.345, "rollout/finished_fraction": 0.75, "train/nonfinite_steps": 2.0}]
    data = {"counts": {"train_kept": 1234, "val_kept": 56, "val_prompts_in_training": 7}}
    settings = {
        "model": {"class_path": "rlhf_lightning.PPOModule", "init_args": {"sampling": {"max_new_tokens": 99}}},
        "data": {"class_path": "", "init_args": {"max_prompt_length": 77}},
        "seed_everything": 5,
    }
    text = card_of(
        tmp_path, RunRecords("PPOModule", "LlamaForCausalLM", 3, settings, {"data": data}, metrics), name="m"
    ).text.partition("## Limits")[2]
    for told in (
        "12.3 nats a response",
        "1,234 rows, and validated on 56",
        "7 prompts of the validation rows are among",
        "prompts of up to 77 tokens and responses of up to 99",
        "75.0 % of its last responses ended by themselves",
        "one training run with seed 5",
        "2 training steps were skipped",
    ):
        assert told in text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"model": {"sampling": {"max_new_tokens": 9, "temperature": 0.5}}},
            "max_new_tokens=9, do_sample=True, temperature=0.5, top_k=0",
        ),
        ({"model": {"sampling": {"max_new_tokens": 9, "temperature": 0}}}, "max_new_tokens=9, do_sample=False)"),
        ({"model": {"sampling": {"stop_tokens": ["<s>"]}}}, "eos_token_id=tokenizer.convert_tokens_to_ids(['<s>'])"),
        ({"data": {"stop_token": "<s>", "max_length": 70}}, "max_length=70, do_sample=True, top_k=0, eos_token_id="),
        ({"data": {"chat": False}}, 'inputs = tokenizer("Once upon a time", return_tensors="pt")'),
    ],
)
def test_the_code_samples_as_the_run_did(settings: dict[str, Any], expected: str, tmp_path: Path) -> None:
    given = {key: {"class_path": "", "init_args": value} for key, value in settings.items()}
    card = card_of(tmp_path, RunRecords("SFTModule", "LlamaForCausalLM", 3, given), name="m")
    code = card.text.split("```")[1].removeprefix("python\n")
    assert expected in code
    compile(code, "card", "exec")


def test_settings_are_those_that_matter_or_differ(tmp_path: Path) -> None:
    model = {
        "policy": "p",
        "ppo_epochs": 4,
        "max_tokens_per_microbatch": 100,
        "lora": None,
        "kl": {
            "class_path": "rlhf_lightning.FixedKL",
            "init_args": {"coef": 0.05, "estimator": "k1", "place": "reward"},
        },
        "score_transforms": [{"class_path": "rlhf_lightning.ScoreClip", "init_args": {"low": -1.0}}],
        "sampling": {"max_new_tokens": 128, "temperature": 1.0, "top_k": 0, "top_p": 0.9},
        "optimizer": {
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-5},
        },
        "mine": {"class_path": "my.package.Thing", "init_args": {"a": 1}},
    }
    settings = {"model": {"class_path": "rlhf_lightning.PPOModule", "init_args": model}, "trainer": {"max_steps": -1}}
    text = card_of(tmp_path, RunRecords("PPOModule", "LlamaForCausalLM", 3, settings), name="m").text
    shown = dict(re.findall(r"\| `([\w.\[\]]+)` \| `([^`]*)` \|", text))
    assert shown == {
        "model.policy": "p",
        "model.ppo_epochs": "4",
        "model.kl": "FixedKL",
        "model.kl.coef": "0.05",
        "model.kl.estimator": "k1",
        "model.score_transforms[0]": "ScoreClip",
        "model.score_transforms[0].low": "-1.0",
        "model.sampling.max_new_tokens": "128",
        "model.sampling.temperature": "1.0",
        "model.sampling.top_p": "0.9",
        "model.optimizer": "AdamW",
        "model.optimizer.lr": "0.001",
        "model.optimizer.eps": "1e-05",
        "model.mine": "Thing",
        "model.mine.a": "1",
    }


def test_papers_are_those_of_the_classes_in_use(tmp_path: Path) -> None:
    def papers(loss: str) -> str:
        model = {"class_path": "rlhf_lightning.DPOModule", "init_args": {"loss": {"class_path": loss, "init_args": {}}}}
        given = RunRecords("DPOModule", "LlamaForCausalLM", 3, {"model": model})
        return card_of(tmp_path, given, name="m").text.partition("## Methods")[2]

    ipo = papers("rlhf_lightning.algorithm.preference_losses.IPOLoss")
    assert 'Rafailov et al. 2023, "Direct Preference Optimization' in ipo
    assert "Azar et al. 2023" in ipo
    assert "Azar" not in papers("rlhf_lightning.algorithm.preference_losses.SigmoidLoss")
    assert "Azar" not in papers("os.system")


def test_a_class_of_a_stranger_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for path in ("evil_module.Evil", "torch.optim.evil_module.Evil", "rlhf_lightning.evil_module.Evil"):
        settings = {"model": {"class_path": path, "init_args": {"kl": {"class_path": path, "init_args": {"a": 1}}}}}
        assert "`Evil`" in card_of(tmp_path, RunRecords("Evil", "LlamaForCausalLM", 1, settings), name="m").text


def test_curves_carry_their_colours_for_light_and_dark(tmp_path: Path) -> None:
    metrics = [{"step": step, "rollout/score": float(step), "val/score": 1.0} for step in range(5)]
    text = card_of(tmp_path, RunRecords("PPOModule", "LlamaForCausalLM", 3, metrics=metrics), name="m").text
    assert '<img src="curves/1-score.svg" alt="Score: rollout/score, val/score" width="376">' in text
    drawn = (tmp_path / "curves" / "1-score.svg").read_text()
    assert "(prefers-color-scheme: dark)" in drawn
    assert "--c1" in drawn
    assert ">rollout</text>" in drawn  # the whole name would not fit
    assert "http://" not in drawn.replace("http://www.w3.org/2000/svg", "")

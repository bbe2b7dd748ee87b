import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from rlhf_lightning.__main__ import main
from rlhf_lightning.checkpoint_files import CHECKPOINT_KEY
from rlhf_lightning.data.chat import ConversationEncoder
from rlhf_lightning.data.collate import collate_sequences
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.formatting import plain
from rlhf_lightning.loggers import read_metrics
from rlhf_lightning.model_card.export import export_with_card
from rlhf_lightning.models.loading import load_sequence_classifier, load_tokenizer
from rlhf_lightning.models.scalar_head import ScalarModel

LAST = "checkpoints/last.ckpt"
WAYS = {"sft": "supervised fine-tuning", "dpo": "DPO", "ppo": "PPO", "rloo": "RLOO", "reward": "preference pairs"}
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w])")


@pytest.fixture(scope="module")
def exported(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The PPO run, exported beside the comparison that measured it."""
    return export_with_card(runs / "ppo" / LAST, tmp_path_factory.mktemp("out") / "my-model")


def code_of(card: Path) -> str:
    found = re.search(r"```python\n(.*?)```", card.read_text(), flags=re.DOTALL)
    assert found
    return found[1]


def run(code: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    return capsys.readouterr().out


@pytest.mark.parametrize("name", WAYS)
def test_the_card_at_the_end_of_a_fit_parses_and_its_code_runs(
    name: str, in_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = in_runs / name / "model"
    card = ModelCard.load(folder / "README.md")
    is_reward = name == "reward"
    assert card.data.pipeline_tag == ("text-classification" if is_reward else "text-generation")
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["rlhf_lightning", name, "reward-model" if is_reward else "rlhf"]
    assert card.data.get("base_model") is None  # trained from scratch, at the beginning
    assert card.data.get("datasets") is None
    assert card.data.get("license") is None
    assert f"\n# {name}\n" in card.text
    assert WAYS[name] in card.text.partition("## Use")[0]
    logged = {result.metric_name: result.metric_value for result in card.data.eval_results}
    row = next(
        row for row in reversed(read_metrics(in_runs / name / "metrics.jsonl")) if "val/loss" in row or "val/kl" in row
    )
    assert logged[
        f"{'val/loss' if 'val/loss' in row else 'val/kl'} (validation at step {row['step']})"
    ] == pytest.approx(row.get("val/loss", row.get("val/kl")), rel=1e-5, abs=1e-9)
    for path in re.findall(r'<img src="([^"]+)"', card.text):
        assert (folder / path).read_text().startswith("<svg ")
    monkeypatch.chdir(folder)
    printed = run(code_of(folder / "README.md"), capsys)
    assert printed.strip() or not is_reward


def test_the_code_of_a_reward_model_gives_its_own_score(
    in_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(in_runs / "reward" / "model")
    encoder = ConversationEncoder(load_tokenizer("."))
    batch = collate_sequences([encoder.encode("How was your day?", "It was lovely!")], pad_id=0)
    with torch.no_grad():
        score = float(ScalarModel(load_sequence_classifier(".")).scores(batch))
    assert float(run(code_of(Path("README.md")), capsys)) == pytest.approx(score, abs=1e-5)


def test_a_comparison_beside_the_run_is_found_by_the_weights(exported: Path, runs: Path) -> None:
    card = ModelCard.load(exported / "README.md")
    report = json.loads((runs / "compare" / "report.json").read_text())
    ppo = next(model for model in report["models"] if model["name"] == "ppo")
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["score"].metric_value == pytest.approx(ppo["score"]["mean"], rel=1e-5)
    assert results["win_rate"].metric_value == pytest.approx(ppo["win_rate"]["mean"], rel=1e-5)
    assert results["human_voice"].dataset_name == "builtin:demo/eval_prompts"
    assert "training" not in results
    assert card.data.model_name == "my-model"
    assert card.text.count("\n> ") == 4  # prompts
    answers = [json.loads(line) for line in (runs / "compare" / "samples.jsonl").read_text().splitlines()]
    shown = [answer for answer in answers if f"| {answer['model']} | {answer['response']} |" in card.text]
    assert {answer["model"] for answer in shown} <= {"sft", "ppo"}
    assert not (exported / "checkpoints").exists()


def test_weights_are_those_of_the_run_to_the_byte(exported: Path, runs: Path) -> None:
    own = runs / "ppo" / "model"
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (exported / name).read_bytes() == (own / name).read_bytes()


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from numbers_in(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)
    elif isinstance(value, str):
        yield from (float(text.replace(",", "")) for text in NUMBER.findall(value))


def forms(number: float) -> set[str]:
    """Return how a number may be written: rounded to a few places, in percent, with its sign."""
    places = {
        f"{size:{sign}.{digits}f}" for size in (number, 100 * number) for digits in range(7) for sign in ("", "+")
    }
    return places | {plain(number), f"{number:.6g}", f"{number:g}", repr(number), f"{number:.0f}"}


def strangers(text: str, known: set[str]) -> list[str]:
    """Return the numbers of a text that none of the records holds."""
    return [found for found in NUMBER.findall(text) if found.replace(",", "") not in known]


def test_every_number_of_tables_and_metadata_is_in_the_records(exported: Path, runs: Path) -> None:
    run_dir = runs / "ppo"
    head = torch.load(run_dir / LAST, weights_only=True)
    records: list[Any] = [
        json.loads((runs / "compare" / "report.json").read_text()),
        [json.loads(line) for line in (runs / "compare" / "samples.jsonl").read_text().splitlines()],
        read_metrics(run_dir / "metrics.jsonl"),
        [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()],
        yaml.safe_load((run_dir / "config.yaml").read_text()),
        head[CHECKPOINT_KEY]["record"],
        head["global_step"],
    ]
    known = {form for number in numbers_in(records) for form in forms(number)}
    text = (exported / "README.md").read_text()
    tables = [line for line in text.splitlines() if line.startswith("|") and "Versions" not in line]
    told = [line for line in tables if "SHA-256" not in line]
    block = text.split("\n---\n")[0].replace("95 % interval", "interval")
    assert len(told) > 60
    assert strangers("\n".join(told), known) == []
    assert strangers(block, known) == []
    changed = "\n".join(told).replace("| ppo |", "| ppo | 17.3171 |")
    assert strangers(changed, known)  # so the check can fail


def test_a_report_is_named_and_its_model_too(in_runs: Path, tmp_path: Path) -> None:
    shutil.copytree("compare", tmp_path / "elsewhere")
    out = export_with_card(f"dpo/{LAST}", tmp_path / "a")
    assert "### " not in (out / "README.md").read_text().partition("## Training")[0]
    with pytest.raises(UserError, match=r"none of the models of .* \(sft, ppo\) has the weights of 'dpo/"):
        export_with_card(f"dpo/{LAST}", tmp_path / "b", report="compare")
    with pytest.raises(UserError, match="'ppo' in 'compare' was measured with other weights"):
        export_with_card(f"dpo/{LAST}", tmp_path / "c", report="compare", report_model="ppo")
    with pytest.raises(UserError, match=r"report_model is 'pop'; .* compares sft, ppo\. Did you mean 'ppo'\?"):
        export_with_card(f"ppo/{LAST}", tmp_path / "d", report="compare", report_model="pop")
    assert not any(path.is_file() for name in "bcd" for path in (tmp_path / name).rglob("*"))
    path = tmp_path / "elsewhere" / "report.json"
    path.write_text(path.read_text().replace('"ppo/model"', '"/another/machine/ppo"'))
    named = export_with_card(f"ppo/{LAST}", tmp_path / "e", report=path.parent, report_model="ppo")
    assert "This model is <b>ppo</b>" in (named / "README.md").read_text()


def test_a_model_that_was_trained_on_since_is_not_given_the_old_results(in_runs: Path, tmp_path: Path) -> None:
    for name in ("ppo", "compare", "sft"):
        shutil.copytree(name, tmp_path / name)
    report = tmp_path / "compare" / "report.json"
    report.write_text(report.read_text().replace('"ppo/model"', json.dumps(str(tmp_path / "ppo" / "model"))))
    fresh = export_with_card(tmp_path / "ppo" / LAST, tmp_path / "fresh")
    assert "This model is" in (fresh / "README.md").read_text()
    (tmp_path / "ppo" / "model" / "model.safetensors").touch()
    stale = export_with_card(tmp_path / "ppo" / LAST, tmp_path / "stale")
    assert "This model is" not in (stale / "README.md").read_text()
    with pytest.raises(UserError, match=r"'ppo' was trained on since '.*compare' measured it; run compare again"):
        export_with_card(tmp_path / "ppo" / LAST, tmp_path / "named", report=report.parent)


def test_a_checkpoint_alone_tells_what_it_knows(runs: Path, tmp_path: Path) -> None:
    shutil.copy(runs / "ppo" / LAST, tmp_path / "alone.ckpt")
    text = (export_with_card(tmp_path / "alone.ckpt", tmp_path / "out") / "README.md").read_text()
    assert "\n# out\n" in text
    for expected in (
        "| `model.optimizer.lr` | `1e-05` |",
        "| `model.kl` | `FixedKL` |",
        "| `data.rollout_batch_size` | `4` |",
    ):
        assert expected in text
    assert "max_new_tokens=8" in text
    assert "### Curves" not in text
    assert "## Results" not in text
    assert "Trained with rlhf_lightning" in text


def test_a_checkpoint_of_an_earlier_version_is_exported_with_less(runs: Path, tmp_path: Path) -> None:
    head = torch.load(runs / "sft" / LAST, weights_only=True)
    del head[CHECKPOINT_KEY]["record"]
    torch.save(head, tmp_path / "old.ckpt")
    text = (export_with_card(tmp_path / "old.ckpt", tmp_path / "out") / "README.md").read_text()
    assert "Hardware" not in text
    assert "`SFTModule`" in text


def test_an_earlier_checkpoint_is_not_given_later_numbers(in_runs: Path, tmp_path: Path) -> None:
    shutil.copytree("sft", tmp_path / "sft")
    head = torch.load(f"sft/{LAST}", weights_only=True)
    head["rlhf_lightning_run"]["next_step"] = 1
    torch.save(head, tmp_path / "sft" / LAST)
    text = (export_with_card(tmp_path / "sft" / LAST, tmp_path / "out") / "README.md").read_text()
    assert "The last validation" not in text
    assert "### Curves" not in text


def test_the_command_prints_where_and_names_the_repository(
    in_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", f"--ckpt=ppo/{LAST}", f"--output={tmp_path / 'out'}", "--report=compare"]) == 0
    assert capsys.readouterr().out == f"model written to {tmp_path / 'out'}\n"
    assert "This model is <b>ppo</b>" in (tmp_path / "out" / "README.md").read_text()
    folder = export_with_card(f"ppo/{LAST}", tmp_path / "b", repository="someone/tea")
    assert 'path = "someone/tea"' in (folder / "README.md").read_text()
    assert "\n# tea\n" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("config.yaml", "a: [", "'.*config.yaml', the run's config, cannot be read"),
        ("metrics.jsonl", "{}\n", "'.*metrics.jsonl', the run's log, is damaged"),
        ("samples.jsonl", "[1]\n", "'.*samples.jsonl', the run's samples, is damaged"),
    ],
)
def test_a_damaged_record_is_named_and_nothing_is_left(
    name: str, content: str, error: str, runs: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "sft", tmp_path / "sft")
    (tmp_path / "sft" / name).write_text(content)
    with pytest.raises(UserError, match=error):
        export_with_card(tmp_path / "sft" / LAST, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda report: report.pop("format"), "was not written by compare"),
        (lambda report: report.pop("table"), "is of an earlier version and holds no table; run compare again"),
        (lambda report: report.pop("models"), r"is damaged \(KeyError\)"),
        (lambda report: report["table"]["rows"][0]["cells"].pop(), r"is damaged \(ValueError\)"),
        (lambda report: report["table"]["rows"][0].update(kind="evil"), r"is damaged \(ValueError\)"),
        (lambda report: report["models"][0].update(path=3), r"is damaged \(\w+\)"),
        (lambda report: report.update(base="none"), r"is damaged \(\w+\)"),
    ],
)
def test_a_damaged_report_is_refused_when_named_and_passed_over_when_found(
    change: Any, error: str, in_runs: Path, tmp_path: Path
) -> None:
    for name in ("ppo", "compare"):
        shutil.copytree(name, tmp_path / name)
    path = tmp_path / "compare" / "report.json"
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))
    with pytest.raises(UserError, match=error):
        export_with_card(tmp_path / "ppo" / LAST, tmp_path / "out", report=path.parent)
    assert not (tmp_path / "out").exists()
    found = export_with_card(tmp_path / "ppo" / LAST, tmp_path / "out")
    assert "This model is" not in (found / "README.md").read_text()

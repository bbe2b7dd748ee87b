import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_lightning.__main__ import main
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model with random weights and the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    load_causal_lm("builtin:demo", pretrained=False, config_overrides=TINY).save_pretrained(folder)
    load_tokenizer("builtin:demo").save_pretrained(folder)
    return folder


def answers(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["generate", *argv]) == 0
    return capsys.readouterr().out


def test_same_seed_gives_the_same_answer(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = (f"--model={model_folder}", "--prompt=How are you?", "--max_new_tokens=8")
    one = answers(capsys, *argv, "--seed=3")
    assert one == answers(capsys, *argv, "--seed=3")
    assert one != answers(capsys, *argv, "--seed=4")


def test_greedy_answer_is_that_of_transformers(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = (f"--model={model_folder}", "--prompt=How are you?", "--max_new_tokens=6", "--temperature=0")
    tokenizer, model = load_tokenizer(str(model_folder)), AutoModelForCausalLM.from_pretrained(model_folder)
    messages = [{"role": "user", "content": "How are you?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answers(capsys, *argv) == tokenizer.decode(ids, skip_special_tokens=True).strip() + "\n"


def test_an_answer_ends_with_a_stop_string(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = (f"--model={model_folder}", "--prompt=How are you?", "--max_new_tokens=8", "--temperature=0")
    whole = answers(capsys, *argv)
    stop = whole.split()[2]
    cut = answers(capsys, *argv, f'--stop_strings=["{stop}"]')
    assert len(cut) < len(whole)
    assert cut == whole[: whole.index(stop) + len(stop)] + "\n"


def test_plain_text_is_continued_without_the_template(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = (f"--model={model_folder}", "--prompt=How are you?", "--max_new_tokens=8", "--temperature=0")
    assert answers(capsys, *argv, "--chat=false") != answers(capsys, *argv, "--chat=true")


def test_prompts_are_read_line_by_line(
    model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = (f"--model={model_folder}", "--max_new_tokens=4", "--temperature=0")
    single = answers(capsys, *argv, "--prompt=Hello")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nHello\n\nnever read\n"))
    assert answers(capsys, *argv) == single * 2


def test_what_would_steer_a_terminal_is_spelled_out(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("--prompt=How are you?", "--max_new_tokens=4", "--temperature=0")
    saying = shutil.copytree(model_folder, tmp_path / "saying")
    tokenizer = json.loads((saying / "tokenizer.json").read_text(encoding="utf-8"))
    for entry in tokenizer["model"]["vocab"]:
        if not entry[0].startswith("<") and entry[0].strip("\u2581") not in "How are you? user assistant":
            entry[0] += "\x1b[31m"
    (saying / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "\x1b[31m" in answers(capsys, f"--model={saying}", *argv)  # into a pipe, as it is
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    shown = answers(capsys, f"--model={saying}", *argv)
    assert "\x1b" not in shown
    assert "\\x1b[31m" in shown


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--stop_tokens=[<nope>]"], "stop token '<nope>' is not in the tokenizer's vocabulary"),
        (["--temperature=-1"], "temperature is -1.0"),
        (["--samples=0"], "samples is 0; it must be at least 1."),
        (["--temperatur=1"], "'temperatur' is not a key. Did you mean 'temperature'?"),
        (["--top_k=many"], "top_k is 'many', expected an integer"),
    ],
)
def test_mistake_in_generate_takes_one_line(
    argv: list[str], line: str, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", f"--model={model_folder}", "--prompt=a", *argv]) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {line}")


def test_answers_end_where_the_model_can_read_no_further(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    limit = config["max_position_embeddings"]
    assert main(["generate", f"--model={model_folder}", "--prompt=a", f"--max_new_tokens={2 * limit}"]) == 0
    assert main(["generate", f"--model={model_folder}", f"--prompt={'a ' * limit}"]) == 2
    assert f"but the model reads {limit}; give a shorter one." in capsys.readouterr().err


def test_export_writes_the_trained_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model=SFTModule", "--model.model=builtin:demo", "--model.pretrained=false"]
    data = ["--data=DemonstrationDataModule", "--data.source=builtin:demo/train", "--data.limit=4"]
    trainer = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--run_dir=run"]
    tiny = f"--model.config_overrides={json.dumps(TINY)}"
    assert main(["fit", *model, tiny, *data, *trainer]) == 0
    assert main(["export", "--ckpt=run/checkpoints/last.ckpt", "--output=exported"]) == 0
    assert "model written to exported" in capsys.readouterr().out
    exported = AutoModelForCausalLM.from_pretrained("exported").state_dict()
    saved = torch.load("run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[f"policy.{name}"], value) for name, value in exported.items())
    assert main(["export", "--ckpt=run/checkpoints/last.ckpt", "--output=exported"]) == 2
    assert main(["export", "--ckpt=run/checkpoints/lst.ckpt", "--output=other"]) == 2


def test_export_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--ckpt=a.ckpt"]) == 2
    assert capsys.readouterr().err.startswith("error: 'output' must be given")


def test_compare_knows_every_reward_by_its_short_name_in_a_process_of_its_own() -> None:
    """Where nothing else has imported the class before."""
    config = Path(__file__).parents[1] / "configs/demo/compare.yaml"
    code = "import sys; from rlhf_lightning.commands import check_function_command as check; "
    code += f"print(check('compare', ['--config', {str(config)!r}])['reward'].path)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "reward" in told.stdout

"""What comes from elsewhere - a checkpoint, a model folder, a data file - is read and never run.

Each test gives the real command line something made to run code, and looks for the file that the code would write.
"""

import io
import json
import os
import pickle
import re
import shlex
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401 - its log goes to the stderr of whoever imports it first
import pytest
import torch
from markdown_it import MarkdownIt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.__main__ import main
from rlhf_lightning.callbacks.samples import sample_table

MARKER = "code-was-run"
TRAINER = "--trainer.accelerator=cpu --trainer.max_steps=1 --trainer.enable_progress_bar=false"
DATA = (
    "--data=DemonstrationDataModule --data.source=pairs.jsonl --data.val_source=pairs.jsonl "
    "--data.max_length=48 --data.max_prompt_length=24 --data.batch_size=2"
)
SFT = f"--model=SFTModule --model.model=policy {DATA} {TRAINER}"
PIPELINE = """
run_dir: all
stages: [{name: sft, command: fit, config: sft.yaml, set: {ckpt_path: evil.ckpt}}]
"""
SFT_YAML = """
model: {class_path: SFTModule, init_args: {model: policy}}
data: {class_path: DemonstrationDataModule, init_args: {source: pairs.jsonl, max_length: 48, max_prompt_length: 24}}
trainer: {accelerator: cpu, max_steps: 1, enable_progress_bar: false}
"""
COMPARE = "--prompts=pairs.jsonl --output=report --device=cpu --sampling.max_new_tokens=4 --max_prompt_length=24"
#: Every command that reads a checkpoint, as it reads this one.
READS_CHECKPOINT = {
    "fit": f"fit {SFT} --ckpt_path=evil.ckpt",
    "validate": f"validate {SFT} --ckpt_path=evil.ckpt",
    "test": f"test {SFT} --ckpt_path=evil.ckpt",
    "predict": f"predict {SFT} --ckpt_path=evil.ckpt",
    "plan": f"plan {SFT} --ckpt_path=evil.ckpt",
    "export": "export --ckpt=evil.ckpt --output=exported",
    "pipeline": "pipeline --config=pipeline.yaml",
    "auto": f"fit {SFT} --run_dir=taken_over --ckpt_path=auto",
    "compare": f"compare --models.a=evil.ckpt {COMPARE}",
    "generate": "generate --model=evil.ckpt --prompt=Hi",
}
#: Every command that reads a model folder.
READS_MODEL = {
    "fit": f"fit {SFT} --model.model=evil",
    "reward": f"fit --model=RewardModule --model.model=evil {DATA.replace('Demonstration', 'Preference')} {TRAINER}",
    "plan": f"plan {SFT} --model.model=evil",
    "compare": f"compare --models.a=evil {COMPARE}",
    "generate": "generate --model=evil --prompt=Hi",
}


class RunsCode:
    """An object whose pickle writes a file when it is loaded."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (MARKER,)


@pytest.fixture
def place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    demo_tokenizer: PreTrainedTokenizerBase,
    make_model: Callable[..., PreTrainedModel],
) -> Path:
    """A folder with rows and a good model, in which the commands are run."""
    monkeypatch.chdir(tmp_path)
    model = make_model("llama", vocab_size=len(demo_tokenizer))
    model.save_pretrained("policy")
    demo_tokenizer.save_pretrained("policy")
    pair = {"prompt": "Do you like tea?", "chosen": "I like tea.", "rejected": "As an AI, no."}
    Path("pairs.jsonl").write_text("".join(json.dumps(pair | {"prompt": f"Tea {n}?"}) + "\n" for n in range(4)))
    Path("sft.yaml").write_text(SFT_YAML)
    Path("pipeline.yaml").write_text(PIPELINE)
    return tmp_path


def error_line(command: str, capfd: pytest.CaptureFixture[str]) -> str:
    """Run a command that must end in one line, and return the line."""
    capfd.readouterr()
    status = main(shlex.split(command))
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (status, len(lines)) == (2, 1), err
    assert "Traceback" not in err
    return lines[0]


def write_evil_checkpoint(path: Path) -> None:
    torch.save({"pytorch-lightning_version": "2.6.6", "state_dict": {}, "loops": RunsCode()}, path)


def test_the_pickle_does_run_code_where_it_is_trusted(place: Path) -> None:
    write_evil_checkpoint(Path("evil.ckpt"))
    torch.load("evil.ckpt", weights_only=False)
    assert Path(MARKER).exists()


@pytest.mark.parametrize("command", READS_CHECKPOINT)
@pytest.mark.parametrize("form", ["torch", "pickle", "old_torch"])
def test_a_checkpoint_made_to_run_code_does_not(
    command: str, form: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if form == "pickle":
        Path("evil.ckpt").write_bytes(pickle.dumps(RunsCode()))
    elif form == "old_torch":
        torch.save(RunsCode(), "evil.ckpt", _use_new_zipfile_serialization=False)
    else:
        write_evil_checkpoint(Path("evil.ckpt"))
    Path("taken_over/checkpoints").mkdir(parents=True)
    shutil.copy("evil.ckpt", "taken_over/checkpoints/last.ckpt")
    if command == "plan":  # it looks at no checkpoint at all
        assert main(shlex.split(READS_CHECKPOINT[command])) == 0
    else:
        line = error_line(READS_CHECKPOINT[command], capfd)
        assert re.search("could run code|is not a checkpoint|is damaged|is a file; give the Hugging Face folder", line)
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("command", READS_MODEL)
def test_a_model_folder_with_pickled_weights_does_not_run_code(
    command: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("policy", "evil")
    Path("evil/model.safetensors").unlink()
    torch.save({"weight": RunsCode()}, "evil/pytorch_model.bin")
    if command == "plan":  # it looks at no weights
        assert main(shlex.split(READS_MODEL[command])) == 0
    else:
        assert re.search("could run code|has no weights", error_line(READS_MODEL[command], capfd))
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("command", READS_MODEL)
@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_a_model_folder_that_asks_for_code_of_its_own_does_not_get_it(
    command: str, part: str, place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # transformers would ask whether to run it
    shutil.copytree("policy", "evil")
    Path("evil/code.py").write_text(f"import os\nos.mkdir({str(place / MARKER)!r})\nclass Thing: pass\n")
    if part == "config":
        autos = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
        change(Path("evil/config.json"), auto_map=dict.fromkeys(autos, "code.Thing"), model_type="evil")
    else:
        change(Path("evil/tokenizer_config.json"), auto_map={"AutoTokenizer": [None, "code.Thing"]})
        change(Path("evil/tokenizer_config.json"), tokenizer_class="Thing")
        change(Path("evil/config.json"), model_type="evil")
    # Where the config is read before the tokenizer, an architecture that nobody knows is refused first.
    expected = r"asks for code of its own to be run \(auto_map\), which is never done here|model type `evil`"
    assert re.search(expected, error_line(READS_MODEL[command], capfd))
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("command", READS_MODEL)
def test_code_beside_a_known_architecture_is_left_alone(command: str, place: Path) -> None:
    shutil.copytree("policy", "evil")
    Path("evil/code.py").write_text(f"import os\nos.mkdir({str(place / MARKER)!r})\nclass Thing: pass\n")
    autos = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    change(Path("evil/config.json"), auto_map=dict.fromkeys(autos, "code.Thing"))
    change(Path("evil/tokenizer_config.json"), auto_map={"AutoTokenizer": [None, "code.Thing"]})
    Path("evil/custom_generate").mkdir()
    shutil.copy("evil/code.py", "evil/custom_generate/generate.py")
    assert main(shlex.split(READS_MODEL[command])) == 0
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("command", READS_MODEL)
def test_a_model_folder_cannot_name_a_repository_whose_code_is_fetched(
    command: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("policy", "evil")
    change(Path("evil/config.json"), attn_implementation="evil/kernel")
    line = error_line(READS_MODEL[command], capfd)
    assert "asks for the code of 'evil/kernel' to be run (attn_implementation), which is never done" in line


#: Names under which a program would be reached, where a config names a class.
CALLABLES = ("os.system", "subprocess.Popen", "builtins.eval", "builtins.exec", "pathlib.Path.mkdir", "shutil.rmtree")
CLASS_KEYS = ("model", "data", "model.optimizer", "model.lr_scheduler", "trainer.callbacks", "trainer.logger")


@pytest.mark.parametrize("name", CALLABLES)
@pytest.mark.parametrize("key", CLASS_KEYS)
def test_a_config_names_classes_of_the_kind_that_is_asked_for_and_no_function(
    name: str, key: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = error_line(f"fit {SFT} --{key}={name}", capfd)
    assert line.startswith(f"error: {key}")
    assert sorted(path.name for path in place.iterdir()) == ["pairs.jsonl", "pipeline.yaml", "policy", "sft.yaml"]


def test_settings_inside_a_checkpoint_name_nothing_that_is_made(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(f"fit {SFT} --run_dir=run")) == 0
    state = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    function = {"class_path": "os.mkdir", "init_args": {"path": MARKER}}
    settings = {"_instantiator": "os.mkdir", "class_path": "os.mkdir", "optimizer": function, "lora": function}
    state["hyper_parameters"] = settings
    state["datamodule_hyper_parameters"] = settings
    torch.save(state, "evil.ckpt")
    for command in ("validate", "predict", "export"):
        assert main(shlex.split(READS_CHECKPOINT[command])) == 0
    assert main(shlex.split(f"{READS_CHECKPOINT['fit']} --trainer.max_steps=2")) == 0
    assert not Path(MARKER).exists()


@pytest.mark.parametrize(
    "packed",
    [
        3,
        {},
        {"format": "new"},
        {"format": 1, "prefix": "policy.", "class": "LlamaForCausalLM", "files": {"config.json": "{}"}},
        {"format": 1, "prefix": "policy.", "class": "LlamaForCausalLM", "files": ["config.json"]},
        {"format": 1, "prefix": "policy.", "class": "os.system", "files": {"..": "x", "/": "x"}},
        {"format": 1, "prefix": "policy.", "class": 7, "files": {"config.json": 7}},
    ],
)
def test_a_checkpoint_that_describes_its_model_wrongly_takes_one_line(
    packed: Any, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {}, "rlhf_lightning": packed}, "evil.ckpt")
    assert "evil.ckpt" in error_line(READS_CHECKPOINT["export"], capfd)


def test_files_of_a_model_inside_a_checkpoint_stay_in_the_folder_and_run_no_code(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(f"fit {SFT} --run_dir=run")) == 0
    state = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    files = state["rlhf_lightning"]["files"]
    for name in ("../outside", f"{place}/outside", "..", "", "a/b"):
        files[name] = "x"
        torch.save(state, "evil.ckpt")
        assert "describes its model in a way" in error_line(READS_CHECKPOINT["export"], capfd)
        del files[name]
    assert not Path("outside").exists()
    files["code.py"] = f"import os; os.mkdir({str(place / MARKER)!r})"
    config = json.loads(files["config.json"])
    files["config.json"] = json.dumps(config | {"model_type": "evil", "auto_map": {"AutoConfig": "code.Thing"}})
    torch.save(state, "evil.ckpt")
    assert "evil.ckpt" in error_line(READS_CHECKPOINT["export"], capfd)
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz"])
def test_a_pickle_in_place_of_data_is_not_unpickled(
    ending: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path(f"evil{ending}").write_bytes(pickle.dumps(RunsCode()))
    assert f"evil{ending}" in error_line(f"fit {SFT} --data.source=evil{ending}", capfd)
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("ending", [".pkl", ".pt", ".npy", ".arrow", ".py"])
def test_files_that_could_hold_code_are_no_data(ending: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path(f"evil{ending}").write_bytes(pickle.dumps(RunsCode()))
    assert "is of no kind that is read here" in error_line(f"fit {SFT} --data.source=evil{ending}", capfd)
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("cache", ["--data.token_cache=cache", "--model.reference_cache=cache"])
def test_files_of_the_caches_are_not_unpickled(cache: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pairs = DATA.replace("Demonstration", "Preference")
    command = f"fit --model=DPOModule --model.policy=policy {pairs} {TRAINER} {cache}"
    assert main(shlex.split(command)) == 0
    files = [path for path in Path("cache").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors"}
    for path in files:
        path.write_bytes(pickle.dumps(RunsCode()))
    assert "is damaged" in error_line(command, capfd)
    assert not Path(MARKER).exists()


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


#: What a model, a data set or a name may say to whoever reads the report or TensorBoard.
MARKUP = (
    "<script>alert(1)</script> <img src=x onerror=alert(2)> [link](javascript:alert(3)) ![i](http://x/y.png) "
    "<a href='javascript:alert(4)'>x</a> </td></table><iframe src=//x> `a` | b\n# head\n<http://auto.link> &lt;b&gt; "
    "[r][1]\n\n[1]: javascript:alert(5)"
)


TABLE = {"table", "thead", "tbody", "tr", "th", "td"}


class Markup(HTMLParser):
    """Collects the tags of a page, and the attributes that could load or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.active: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.active += [(key, value) for key, value in attrs if key in ("src", "href", "srcdoc") or key[:2] == "on"]


def read_markup(page: str) -> Markup:
    parsed = Markup()
    parsed.feed(page)
    return parsed


def test_what_tensorboard_makes_of_samples_is_a_table_and_text(place: Path) -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    messages = [{"role": MARKUP, "content": MARKUP}]
    table = sample_table([{"prompt": messages, "response": MARKUP, "score": 0.5}, {"prompt": MARKUP, "kl": MARKUP}])
    parsed = read_markup(markdown_to_safe_html(table))
    assert parsed.tags == TABLE | {"br"}
    assert parsed.active == []


def test_a_report_shows_markup_of_data_and_names_as_text(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("pairs.jsonl").write_text(json.dumps({"prompt": MARKUP}) + "\n")
    name = "<b onclick=x>&\"'</title><script>"
    config = {"models": {name: "policy", "b": "policy"}, "prompts": "pairs.jsonl", "output": "report", "device": "cpu"}
    settings = {"sampling": {"max_new_tokens": 4}, "max_prompt_length": 24}
    Path("compare.json").write_text(json.dumps(config | settings))
    assert main(["compare", "--config=compare.json"]) == 0
    page = Path("report/report.html").read_text()
    parsed = read_markup(page)
    assert not parsed.tags & {"script", "img", "a", "b onclick", "iframe", "h4", "object", "link"}
    assert parsed.active == []
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "default-src 'none'" in page
    text = Path("report/report.md").read_text()
    read_back = read_markup(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))
    assert read_back.tags <= {"h1", "h2", "p", "ul", "li", "strong", "code", "blockquote", "br"} | TABLE
    assert read_back.active == []


SECRETS = {
    name: f"{name.lower()}-5ecret" for name in ("HF_TOKEN", "WANDB_API_KEY", "USER", "MY_SETTING", "HOSTALIASES")
}


@pytest.mark.parametrize("given", ["relative", "absolute"])
def test_no_token_environment_or_home_folder_is_written(
    given: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(place))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    root = "" if given == "relative" else f"{place}/"
    sft = SFT.replace("=policy", f"={root}policy").replace("pairs.jsonl", f"{root}pairs.jsonl")
    models = f"--models.a={root}policy --models.b={root}run/model --curves.b={root}run/metrics.jsonl"
    for command in (
        f"fit {sft} --run_dir={root}run",
        f"predict {sft} --run_dir={root}predicted",
        f"export --ckpt={root}run/checkpoints/last.ckpt --output={root}exported",
        f"compare {models} {COMPARE.replace('pairs.jsonl', f'{root}pairs.jsonl')}",
    ):
        assert main(shlex.split(command)) == 0
    folders = ("run", "predicted", "exported", "report")
    written = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    assert {"config.yaml", "last.ckpt", "report.html", "report.json", "config.json"} <= {path.name for path in written}
    assert [path for path in written if any(value.encode() in path.read_bytes() for value in SECRETS.values())] == []
    telling = {str(path) for path in written if str(place).encode() in path.read_bytes()}
    if (
        given == "absolute"
    ):  # A path that was asked for is part of the run's settings, and of nothing that is handed on.
        telling = {path for path in telling if not re.search(r"config[^/]*\.yaml|hparams\.yaml|\.ckpt|tfevents", path)}
        assert "~/run/model" in Path("report/report.json").read_text()
    assert telling == set()

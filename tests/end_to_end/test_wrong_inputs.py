"""What a user can get wrong, given to the real command line with real files: one clear line, and nothing trained.

The table is ``wrong_inputs.txt`` beside this file; the files and folders that it names are made here, once.
"""

import contextlib
import gzip
import json
import os
import re
import shlex
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerBase

from rlhf_lightning.__main__ import main

#: What may follow the line.
HINTS = ("See all keys and their meaning: ", "in stage ")
TRAINER = "--trainer.accelerator=cpu --trainer.max_steps=1 --trainer.enable_progress_bar=false"
LENGTHS = "--data.max_length=48 --data.max_prompt_length=24 --data.batch_size=2"
PROMPTS = "--data=PromptDataModule --data.source=pairs.jsonl --data.max_prompt_length=24 --data.rollout_batch_size=4"
SFT = f"--model=SFTModule --model.model=policy --data=DemonstrationDataModule --data.source=pairs.jsonl {LENGTHS}"
PAIRS = f"--data=PreferenceDataModule --data.source=pairs.jsonl {LENGTHS}"
UNPAIRED = f"--data=UnpairedDataModule --data.source=pairs.jsonl {LENGTHS}"
PPO = "--model=PPOModule --model.policy=policy --model.minibatch_size=2 --model.ppo_epochs=1"
PPO_BY_FUNCTION = f"fit {PPO} --model.reward=FunctionReward --model.reward.function=rewards.py:lengths {PROMPTS}"
#: Commands that are right (but for the last), by the name that stands for them in the table.
COMMANDS = {
    "sft": f"fit {SFT} {TRAINER}",
    "validate_sft": f"validate {SFT} {TRAINER}",
    "reward": f"fit --model=RewardModule --model.model=policy {PAIRS} {TRAINER}",
    "dpo": f"fit --model=DPOModule --model.policy=policy {PAIRS} {TRAINER}",
    "kto": f"fit --model=KTOModule --model.policy=policy {UNPAIRED} {TRAINER}",
    "ppo": f"{PPO_BY_FUNCTION} --model.sampling.max_new_tokens=4 {TRAINER}",
    "ppo_by_model": f"fit {PPO} --model.reward=RewardModel {PROMPTS} --model.sampling.max_new_tokens=4 {TRAINER}",
    "compare": "compare --models.a=policy --models.b=policy --prompts=pairs.jsonl --output=report --device=cpu "
    "--sampling.max_new_tokens=4 --max_prompt_length=24",
    "compare_by_reward": "compare --models.a=policy --prompts=pairs.jsonl --output=report --device=cpu "
    "--sampling.max_new_tokens=4 --max_prompt_length=24 --reward=FunctionReward --reward.function=rewards.py:lengths",
    "generate": "generate --model=policy --prompt=Hi --max_new_tokens=4",
    "generate_long": f"generate --model=policy --prompt='{'tea ' * 48}'",
}

REWARDS = """
def lengths(prompts, responses, **columns): return [float(len(r)) for r in responses]
def too_few(prompts, responses, **columns): return [0.0]
def not_a_number(prompts, responses, **columns): return [float("nan")] * len(responses)
def words(prompts, responses, **columns): return responses
def nothing(prompts, responses, **columns): pass
def one(prompts, responses, **columns): return 1.0
def of_column(prompts, responses, promt): return [0.0] * len(responses)
def failing(prompts, responses, **columns): return [1 / 0 for r in responses]
settings = {}
"""
STAGES = """run_dir: runs/all
stages:
  - {name: sft, command: fit, config: sft.yaml}
  - {name: compare, command: compare, config: compare.yaml}
"""
SFT_YAML = """
model: {class_path: SFTModule, init_args: {model: policy}}
data: {class_path: DemonstrationDataModule, init_args: {source: pairs.jsonl, max_length: 48, max_prompt_length: 24}}
trainer: {accelerator: cpu, max_steps: 1, enable_progress_bar: false}
"""
COMPARE_YAML = "{models: {a: policy, b: policy}, prompts: pairs.jsonl, sampling: {max_new_tokens: 4}, device: cpu}"
PPO_YAML = """
model:
  class_path: PPOModule
  init_args:
    policy: policy
    reward:
      class_path: WeightedSum
      init_args:
        rewards: [{class_path: FunctionReward, init_args: {function: "rewards.py:lengths"}}]
        weights: [1.0]
    kl: {class_path: FixedKL, init_args: {coef: 0.05}}
data: {class_path: PromptDataModule, init_args: {source: pairs.jsonl}}
"""


def rows(*found: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in found)


def pair(**columns: Any) -> dict[str, Any]:
    return {"prompt": "Do you like tea?", "chosen": "I like tea.", "rejected": "As an AI, no.", **columns}


def message(**entries: str) -> str:
    return rows({"messages": [entries]})


DATA: dict[str, str | bytes] = {
    "pairs.jsonl": rows(*[pair(prompt=f"Do you like {number}?") for number in range(8)]),
    "empty.jsonl": "",
    "blank_lines.jsonl": "\n \n",
    "no_json.jsonl": rows(pair()) + '{"prompt": "Hi", chosen}\n',
    "cut_list.json": '[{"prompt": "Hi"},\n {"prompt": ',
    "latin.jsonl": rows(pair()).encode() + b'{"prompt": "caf\xe9"}\n',
    "array_row.jsonl": rows(pair(), ["Hi", "Hello"]),
    "texts.json": '["Hi", "Hello"]',
    "half_character.jsonl": rows(pair(chosen="\ud800")),
    "choosen.jsonl": rows({"prompt": "Hi", "choosen": "a", "rejected": "b"}),
    "promt.jsonl": rows({"promt": "Hi"}),
    "second_row.jsonl": rows(pair(), {"prompt": "Hi", "chosen": "a"}),
    "no_prompt.jsonl": rows({"chosen": "a", "rejected": "b"}),
    "number.jsonl": rows(pair(chosen=3)),
    "null.jsonl": rows(pair(rejected=None)),
    "mixed.jsonl": rows(pair(rejected=[{"role": "assistant", "content": "a"}])),
    "role.jsonl": message(role="robot", content="a"),
    "no_content.jsonl": message(role="user", text="a"),
    "no_reply.jsonl": message(role="user", content="a"),
    "unpaired.jsonl": rows({"prompt": "Hi", "completion": "a", "label": True}),
    "unlabelled.jsonl": rows({"prompt": "Hi", "completion": "a", "lable": True}),
    "word_label.jsonl": rows({"prompt": "Hi", "completion": "a", "label": "good"}),
    "text.jsonl": rows({"text": "Once upon a time"}),
    "messages.jsonl": rows({"prompt": [{"role": "user", "content": "a"}]}),
    "blank_prompt.jsonl": rows({"prompt": " "}),
    "long.jsonl": rows(pair(chosen="I like tea." * 20)),
    "no_parquet.parquet": rows(pair()),
    "empty.csv": "",
    "header.csv": "prompt,chosen,rejected\n",
    "ragged.csv": "prompt,response\nHi,Hello, you\n",
    "no_gzip.jsonl.gz": rows(pair()),
    "notes.txt": "Hi\n",
    "folder/rows.jsonl": rows(pair()),
    "rewards.py": REWARDS,
    "no_python.py": "def f(:\n",
    "importing.py": "import missing_package\n",
}
GOOD_ROWS = rows(*[pair(prompt=f"Do you like {number}?") for number in range(8)])
DATA |= {
    "garbage.jsonl": bytes(range(256)) * 8,
    "garbage.parquet": b"PAR1" + bytes(range(256)) * 8,
    "garbage.csv": bytes(range(128, 256)) * 8,
    "garbage.json": bytes(range(256)),
    "empty.json": "",
    "empty_list.json": "[]",
    "empty_file.parquet": "",
    "empty.jsonl.gz": "",
    "cut.jsonl.gz": gzip.compress(GOOD_ROWS.encode(), mtime=0)[:-20],
    "cut.csv.gz": gzip.compress(b"prompt,chosen,rejected\na,b,c\n", mtime=0)[:20],
    "huge_line.jsonl": '{"prompt": "' + "a" * 3_000_000,
    "huge_number.jsonl": '{"prompt": "Hi", "chosen": ' + "9" * 5000 + "}",
    "deep.jsonl": "[" * 100_000,
    "utf16.jsonl": GOOD_ROWS.encode("utf-16"),
    "utf16.csv": "prompt,chosen,rejected\na,b,c\n".encode("utf-16"),
    "shift_jis.jsonl": '{"prompt": "お茶"}'.encode("shift_jis"),
    "twice.csv": "prompt,chosen,prompt\na,b,c\n",
    "quotes.csv": 'prompt,chosen,rejected\n"a,b,c\n',
    "null_bytes.csv": "prompt,chosen,rejected\na\x00,b\n",
    "semicolons.csv": "prompt;chosen;rejected\na;b;c\n",
    "labels.csv": "prompt,response,label\nHi,Hello,maybe\n",
    "nan_label.jsonl": '{"prompt": "Hi", "completion": "a", "label": NaN}\n',
    "infinite_label.jsonl": '{"prompt": "Hi", "completion": "a", "label": -Infinity}\n',
    "nan_chosen.jsonl": '{"prompt": "Hi", "chosen": NaN, "rejected": "b"}\n',
    "nan_margin.jsonl": rows(pair(margin=1)) + '{"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": NaN}\n',
    "negative_margin.jsonl": rows(pair(margin=-1)),
    "text_margin.jsonl": rows(pair(margin="much")),
    "mixed_types.jsonl": rows(pair(), pair(prompt=["Hi"])),
    "number_prompt.jsonl": rows(pair(prompt=7)),
    "null_content.jsonl": rows({"messages": [{"role": "user", "content": None}]}),
    "list_content.jsonl": rows({"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    "empty_messages.jsonl": rows({"messages": []}),
    "text_messages.jsonl": rows({"messages": "Hi"}),
    "number_messages.jsonl": rows({"messages": [1, 2]}),
    "mostly_bad.jsonl": rows(pair(), {"prompt": "Hi"}, {"prompt": "Hi"}),
    "gaps.jsonl": "\n\n" + rows(pair(), {"prompt": "Hi"}),
    "two_values.jsonl": '{"prompt": "a"} {"prompt": "b"}\n',
    "single_quotes.jsonl": "{'prompt': 'a'}\n",
    "object.json": '{"data": [{"prompt": "a"}]}',
    "bare.txt.gz": gzip.compress(b"Hi", mtime=0),
}
CONFIGS: dict[str, str | bytes] = {
    "sft.yaml": SFT_YAML,
    "compare.yaml": COMPARE_YAML,
    "pipeline.yaml": STAGES,
    "mistyped_coef.yaml": PPO_YAML.replace("coef", "cof"),
    "mistyped_class_path.yaml": PPO_YAML.replace("kl: {class_path", "kl: {class_pth"),
    "no_init_args.yaml": PPO_YAML.replace("init_args: {coef: 0.05}", "coef: 0.05"),
    "mistyped_data.yaml": PPO_YAML.replace("data:", "dta:"),
    "mistyped_function.yaml": PPO_YAML.replace("function:", "fnction:"),
    "weights.yaml": PPO_YAML.replace("[1.0]", "[1.0, 2.0]"),
    "no_yaml.yaml": "model:\n  class_path: [SFTModule\n",
    "tab.yaml": "model:\n\tclass_path: SFTModule\n",
    "latin.yaml": b"model: caf\xe9\n",
    "list.yaml": "- model\n",
    "empty.yaml": "",
    "command.yaml": STAGES.replace("command: fit", "command: fitt"),
    "same_name.yaml": STAGES.replace("name: compare", "name: sft"),
    "no_stage_config.yaml": STAGES.replace("config: sft", "config: sftt"),
    "stage_key.yaml": STAGES.replace("config: compare", "confg: compare"),
    "set_key.yaml": STAGES.replace("sft.yaml", "sft.yaml, set: {model.modl: x}"),
    "no_stages.yaml": "run_dir: runs/all\n",
    "last_no_yaml.yaml": STAGES.replace("compare.yaml", "no_yaml.yaml"),
}
for _name, _before, _after in (
    ("last_key", "prompts", "promts"),
    ("last_number", "tokens: 4", "tokens: 0"),
    ("last_prompts", "pairs", "pairz"),
    ("last_model", "b: policy", "b: ./polici"),
):
    CONFIGS[f"{_name}.yaml"] = STAGES.replace("compare.yaml", f"{_name}_compare.yaml")
    CONFIGS[f"{_name}_compare.yaml"] = COMPARE_YAML.replace(_before, _after)


def having(**values: Any) -> Callable[[bytes], bytes]:
    """Return what changes values in a JSON file; ``None`` removes one."""
    kept = {key: value for key, value in values.items() if value is not None}
    return lambda text: json.dumps(
        {key: value for key, value in json.loads(text).items() if key not in values} | kept
    ).encode()


def first_half(data: bytes) -> bytes:
    return data[: len(data) // 2]


#: Model folders: of which good one they are a copy, and what is done to its files; ``None`` removes one.
MODELS: dict[str, tuple[str, dict[str, str | Callable[[bytes], bytes] | None]]] = {
    "no_config": ("policy", {"config.json": None}),
    "no_tokenizer": ("policy", {"tokenizer.json": None, "tokenizer_config.json": None}),
    "no_weights": ("policy", {"model.safetensors": None}),
    "pickled": ("policy", {"model.safetensors": None, "pytorch_model.bin": "x"}),
    "cut_config": ("policy", {"config.json": "{"}),
    "lama": ("policy", {"config.json": having(model_type="lama")}),
    "no_type": ("policy", {"config.json": having(model_type=None, architectures=None)}),
    "cut_tokenizer": ("policy", {"tokenizer.json": "{"}),
    "no_tensors": ("policy", {"model.safetensors": "not tensors at all"}),
    "cut_weights": ("policy", {"model.safetensors": first_half}),
    "wider": ("policy", {"config.json": having(hidden_size=32)}),
    "deeper": ("policy", {"config.json": having(num_hidden_layers=2)}),
    "few_tokens": ("policy", {"config.json": having(vocab_size=8)}),
    "no_template": ("policy", {"chat_template.jinja": None}),
    "broken_template": ("policy", {"chat_template.jinja": "{% for"}),
    "refusing_template": ("policy", {"chat_template.jinja": "{{ raise_exception('no') }}"}),
    "last_template": ("policy", {"chat_template.jinja": "{{ messages[-1].content }}"}),
    "two_labels": ("scorer", {"config.json": having(id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})}),
    "endless_template": (
        "policy",
        {"chat_template.jinja": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"},
    ),
    "long_range": ("policy", {"chat_template.jinja": "{% for i in range(10 ** 9) %}{% endfor %}"}),
    "greedy_template": ("policy", {"chat_template.jinja": "{{ 'a' * 10 ** 10 }}"}),
    "writing_template": ("policy", {"chat_template.jinja": "{{ 'a' * 5000000 }}"}),
    "dividing_template": ("policy", {"chat_template.jinja": "{{ 1 / 0 }}"}),
    "breaking_out": ("policy", {"chat_template.jinja": "{{ ''.__class__.__mro__ }}"}),
    "remote_code": ("policy", {"config.json": having(model_type="x", auto_map={"AutoConfig": "code.Thing"})}),
    "remote_kernel": ("policy", {"config.json": having(attn_implementation="owner/name")}),
    "lacking_attention": ("policy", {"config.json": having(attn_implementation="flash_attention_2")}),
    "config_list": ("policy", {"config.json": "[]"}),
    "config_garbage": ("policy", {"config.json": lambda text: bytes(range(128, 256))}),
    "text_size": ("policy", {"config.json": having(hidden_size="big")}),
    "no_heads": ("policy", {"config.json": having(num_attention_heads=0)}),
    "other_activation": ("policy", {"config.json": having(hidden_act="gelou")}),
    "empty_weights": ("policy", {"model.safetensors": ""}),
    "garbage_weights": ("policy", {"model.safetensors": lambda data: bytes(range(256)) * 40}),
    "longer_header": ("policy", {"model.safetensors": lambda data: (2**62).to_bytes(8, "little") + data[8:]}),
    "tokenizer_list": ("policy", {"tokenizer.json": "[]"}),
    "no_tokenizer_model": ("policy", {"tokenizer.json": having(model=None)}),
    "tokenizer_garbage": ("policy", {"tokenizer.json": lambda text: bytes(range(256))}),
    "unknown_stop": ("policy", {"tokenizer_config.json": having(eos_token="<|nowhere|>")}),
    "no_stop": ("policy", {"tokenizer_config.json": having(eos_token=None)}),
    "tokenizer_config_list": ("policy", {"tokenizer_config.json": "[]"}),
    "other_stop": ("scorer", {"config.json": having(scored_token_id=9)}),
}


def write_model(folder: Path, tokenizer: PreTrainedTokenizerBase, *, scalar: bool = False) -> None:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=48,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **({"num_labels": 1} if scalar else {}),
    )
    (LlamaForSequenceClassification if scalar else LlamaForCausalLM)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def damage(folder: Path, changes: dict[str, str | Callable[[bytes], bytes] | None]) -> None:
    for name, change in changes.items():
        if change is None:
            (folder / name).unlink()
        elif isinstance(change, str):
            (folder / name).write_text(change)
        else:
            (folder / name).write_bytes(change((folder / name).read_bytes()))


def write_checkpoints() -> None:
    """Write those of a run, of which one is cut off and one has a flipped bit, and two from elsewhere."""
    assert main([*shlex.split(COMMANDS["sft"]), "--run_dir=earlier"]) == 0
    good = Path("earlier/checkpoints/last.ckpt").read_bytes()
    Path("sft.ckpt").write_bytes(good)
    Path("cut.ckpt").write_bytes(first_half(good))
    middle = len(good) // 2
    Path("flipped.ckpt").write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    state = torch.load("sft.ckpt", weights_only=True)
    state["rlhf_lightning"]["class"] = "LlamaForSequenceClassification"
    torch.save(state, "reward.ckpt")
    torch.save({"state_dict": {}}, "foreign.ckpt")
    torch.save({"state_dict": {}, "object": Path("x")}, "objects.ckpt")
    torch.save([1, 2], "list.ckpt")
    torch.save({"state_dict": {}, "rlhf_lightning": {"format": 1}}, "vague.ckpt")
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, "other_trainer.ckpt")
    Path("empty.ckpt").write_bytes(b"")
    Path("garbage.ckpt").write_bytes(bytes(range(256)) * 40)
    with zipfile.ZipFile("zip.ckpt", "w") as file:
        file.writestr("data.pkl", "x")
    Path("damaged/checkpoints").mkdir(parents=True)
    Path("damaged/checkpoints/last.ckpt").write_bytes(first_half(good))
    Path("folder.jsonl").mkdir()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory, demo_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder with all that the table names."""
    folder = tmp_path_factory.mktemp("wrong_inputs")
    for name, content in {**DATA, **CONFIGS}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), folder / "empty.parquet")
    pq.write_table(pa.table({"prompt": ["Hi"], "chosen": [1.5], "rejected": [None]}), folder / "numbers.parquet")
    pq.write_table(pa.table({"prompt": ["Hi"] * 99}), folder / "whole.parquet")
    (folder / "cut.parquet").write_bytes(first_half((folder / "whole.parquet").read_bytes()))
    write_model(folder / "policy", demo_tokenizer)
    write_model(folder / "scorer", demo_tokenizer, scalar=True)
    write_model(folder / "other", demo_tokenizer.train_new_from_iterator(["I like tea."], vocab_size=300))
    for name, (base, changes) in MODELS.items():
        shutil.copytree(folder / base, folder / name)
        damage(folder / name, changes)
    with contextlib.chdir(folder):
        write_checkpoints()
    os.environ.pop("PL_GLOBAL_SEED", None)
    return folder


def read_table() -> dict[str, str]:
    """Return the line that each command line must end in."""
    lines = Path(__file__).with_name("wrong_inputs.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    return {command.removeprefix("$ "): line for command, line in zip(lines[::2], lines[1::2], strict=True)}


def trained() -> set[tuple[str, int]]:
    """Return what only a training leaves: checkpoints, logged numbers, models; not what ``compare`` keeps for later."""
    found = [*Path().rglob("*.ckpt"), *Path().rglob("metrics.jsonl"), *Path().rglob("*.safetensors")]
    return {(str(path), path.stat().st_size) for path in found if path.stat().st_size and "cache" not in path.parts}


TABLE = read_table()


@pytest.mark.parametrize("command", TABLE)
def test_wrong_input_takes_one_line(
    command: str, inputs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(inputs)
    before = trained()
    name, *more = shlex.split(command)
    assert main([*shlex.split(COMMANDS.get(name, name)), *more]) == 2
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    expected = ".*".join(re.escape(part.strip()) for part in TABLE[command].split(" ... "))
    assert re.match(f"error: {expected}", lines[0]), lines[0]
    rest = err[err.index(lines[0]) + len(lines[0]) :].splitlines()
    assert [line for line in rest if line and not line.startswith(HINTS)] == []
    assert trained() == before

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf_lightning.__main__ import main
from rlhf_lightning.checkpoint_files import CHECKPOINT_KEY
from rlhf_lightning.data.chat import ConversationEncoder
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.answer_sets import LikelihoodSet, PairSet
from rlhf_lightning.evaluation.compare import compare
from rlhf_lightning.evaluation.generations import sample_responses
from rlhf_lightning.evaluation.likelihood import evaluate_likelihood
from rlhf_lightning.models.export import pack_model, write_model_folder
from rlhf_lightning.models.loading import load_causal_lm, load_sequence_classifier, load_tokenizer
from rlhf_lightning.rollout.reward_model import RewardModel
from rlhf_lightning.rollout.reward_sources import FunctionReward
from rlhf_lightning.rollout.sampler import SamplingConfig

SAMPLING = SamplingConfig(max_new_tokens=8)
LONG = "LONG"  # the file of an answer that is too long


def words(prompts: list[Any], responses: list[str]) -> list[float]:
    return [float(len(response.split())) for response in responses]


def characters(prompts: list[Any], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def run(models: dict[str, str], output: Path, **more: Any) -> dict[str, str]:
    settings = {"prompts": "builtin:demo/eval_prompts", "sampling": SAMPLING, "limit": 20, **more}
    return compare(models=models, output=str(output), **settings)


def read(result: dict[str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    samples = Path(result["samples"]).read_text(encoding="utf-8").splitlines()
    return json.loads(Path(result["json"]).read_text(encoding="utf-8")), [json.loads(line) for line in samples]


def test_two_models(tiny_models: dict[str, str], tmp_path: Path, metrics_file: Path) -> None:
    result = run(
        tiny_models,
        tmp_path,
        reward=FunctionReward(f"{__file__}:words"),
        text_metrics={"human": "rlhf_lightning.demo.voice:human_voice"},
        curves={"ppo": str(metrics_file)},
    )
    report, samples = read(result)
    base, other = report["models"]
    ours, theirs = ([row for row in samples if row["model"] == name] for name in ("base", "other"))
    assert [row["row"] for row in ours] == list(range(20))
    assert ours[0]["prompt"] == theirs[0]["prompt"]
    gains = [b["score"] - a["score"] for a, b in zip(ours, theirs, strict=True)]
    assert all(row["score"] == len(row["response"].split()) for row in samples)
    assert other["score_difference"]["mean"] == pytest.approx(sum(gains) / 20)
    assert other["win_rate"]["mean"] == pytest.approx(sum((g > 0) + 0.5 * (g == 0) for g in gains) / 20)
    assert other["kl"]["mean"] == pytest.approx(sum(row["kl"] for row in theirs) / 20)
    assert other["kl"]["low"] > 0
    assert (base["kl"]["mean"], base["win_rate"], base["score_difference"]) == (0.0, None, None)
    assert (report["format"], report["base"]) == ("rlhf_lightning.comparison/2", "base")
    assert report["prompts"] == {"source": "builtin:demo/eval_prompts", "count": 20, "available": 240}
    assert report["sampling"]["max_new_tokens"] == 8
    page = Path(result["report"]).read_text(encoding="utf-8")
    assert "other against base" in page
    assert "<figcaption>Score</figcaption>" in page
    assert "human (share of responses)" in result["table"]


def test_a_model_against_itself(tiny_models: dict[str, str], tmp_path: Path) -> None:
    twins = {"one": tiny_models["base"], "two": tiny_models["base"]}
    report, samples = read(run(twins, tmp_path, reward=FunctionReward(f"{__file__}:words"), base="two"))
    one = report["models"][0]
    assert one["kl"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert one["win_rate"]["mean"] == 0.5
    assert one["score_difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert [row["response"] for row in samples[::2]] == [row["response"] for row in samples[1::2]]


def test_the_same_seed_gives_the_same_report(tiny_models: dict[str, str], tmp_path: Path) -> None:
    first, again, other = (
        read(run(tiny_models, tmp_path / name, seed=seed, batch_size=size))
        for name, seed, size in (("a", 1, 64), ("b", 1, 7), ("c", 2, 64))
    )
    assert [row["response"] for row in first[1]] == [row["response"] for row in again[1]]
    assert first[0]["models"][1]["kl"]["mean"] == pytest.approx(again[0]["models"][1]["kl"]["mean"], abs=1e-4)
    assert [row["prompt"] for row in first[1]] != [row["prompt"] for row in other[1]]


def test_a_pretrained_model_of_plain_text(shared_data: Path, tmp_path: Path) -> None:
    folder = str(shared_data / "models" / "stories260K")
    result = run(
        {"base": folder, "same": folder},
        tmp_path,
        prompts=str(shared_data / "tinystories" / "eval.jsonl"),
        chat=False,
        text_words=6,
        limit=8,
        sampling=SamplingConfig(max_new_tokens=400, stop_tokens=["<s>"]),
        reward=FunctionReward(f"{__file__}:words"),
    )
    report, samples = read(result)
    same = report["models"][1]
    assert (same["kl"]["mean"], same["win_rate"]["mean"]) == (0.0, 0.5)
    assert 0 < same["finished"]["mean"] < 1  # some stories end within 400 tokens, by the BOS token
    assert all(len(row["prompt"].split()) == 6 for row in samples)
    assert not any("<s>" in row["response"] for row in samples)


def test_given_answers_and_pairs(tiny_models: dict[str, str], tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"limit": 9, "max_length": 128, "max_prompt_length": 64}
    eval_pairs = "builtin:demo/eval"
    result = run(
        {**tiny_models, "same": tiny_models["base"]},
        tmp_path,
        limit=2,
        reward=FunctionReward(f"{__file__}:words"),
        likelihood={
            "chosen": LikelihoodSet(eval_pairs, **sizes),
            "rejected": LikelihoodSet(eval_pairs, answer="rejected", **sizes),
        },
        pairs={"held_out": PairSet(eval_pairs, **sizes)},
    )
    sections = read(result)[0]["sections"]
    assert list(sections) == ["diversity", "frontier", "likelihood", "pairs", "reward_models"]
    assert sections["likelihood"]["columns"] == ["base", "other", "same"]
    assert sections["reward_models"]["columns"] == ["words"]
    data = sections["likelihood"]["data"]
    models = {name: load_causal_lm(folder).eval() for name, folder in tiny_models.items()}
    tokenizer = load_tokenizer(tiny_models["base"])
    alone = evaluate_likelihood(models["other"], tokenizer, {"x": LikelihoodSet(eval_pairs, **sizes)})["x"]
    assert data["chosen"]["models"]["other"]["per_answer"]["mean"] == pytest.approx(alone.per_answer.mean, rel=1e-5)
    assert data["chosen"]["models"]["same"]["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert data["chosen"]["models"]["base"]["difference"] is None
    assert data["chosen"]["answers"] == data["rejected"]["answers"] == 9
    # The plain margins are those of the two likelihoods, whose rows are the same ones.
    pairs = sections["pairs"]["data"]["held_out"]["models"]
    means = [data[side]["models"]["other"]["per_answer"]["mean"] for side in ("chosen", "rejected")]
    assert pairs["other"]["logprob_per_token"]["margin"]["mean"] == pytest.approx(means[0] - means[1], rel=1e-4)
    assert pairs["same"]["reward"]["accuracy"]["mean"] == 0.5
    assert pairs["base"]["reward"] is None
    cells = {row["label"]: row["cells"] for row in sections["pairs"]["rows"]}
    assert cells["held_out: accuracy"] == [
        None,
        pairs["other"]["reward"]["accuracy"],
        pairs["same"]["reward"]["accuracy"],
    ]
    reward = sections["reward_models"]["data"]["held_out"]["rewards"]["words"]
    assert (
        sum(part["pairs"] for key, part in reward["length"].items() if key in ("chosen_longer", "chosen_shorter")) <= 9
    )
    assert reward["calibration"]["bins"]
    assert "chosen: 9 of 480 rows" in sections["likelihood"]["note"]


def test_the_command_line(tiny_models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "models": tiny_models,
        "prompts": "builtin:demo/eval_prompts",
        "output": str(tmp_path / "elsewhere"),
        "sampling": {"max_new_tokens": 4},
        "limit": 3,
        "reward": {"class_path": "FunctionReward", "init_args": {"function": f"{__file__}:words"}},
        "likelihood": {
            "train": {"source": "builtin:demo/train", "limit": 2, "max_length": 128, "max_prompt_length": 64}
        },
        "pairs": {"train": {"source": "builtin:demo/train", "limit": 2, "max_length": 128, "max_prompt_length": 64}},
    }
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["compare", "--config", str(path), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "Win rate (against base, ties half)" in printed
    assert f"report: {tmp_path / 'out' / 'report.html'}\nmarkdown: {tmp_path / 'out' / 'report.md'}" in printed
    assert (tmp_path / "out" / "report.md").read_text().startswith("# other against base\n")
    assert not (tmp_path / "elsewhere").exists()
    first = (tmp_path / "out" / "report.json").read_text()
    assert json.loads(first)["sections"]["pairs"]["data"]["train"]["pairs"] == 2
    assert main(["compare", "--config", str(path), "--output", str(tmp_path / "out"), "--limit=2"]) == 0
    assert (tmp_path / "out" / "earlier-1" / "report.json").read_text() == first
    assert (tmp_path / "out" / "report.json").read_text() != first


FULL: dict[str, Any] = {
    "limit": 6,
    "reward": FunctionReward(words, name="words"),
    "best_of": [2],
    "best_of_samples": 3,
    "questions": ["Do you like tea?"],
}


def scorer(base: str, folder: Path, seed: int) -> RewardModel:
    torch.manual_seed(seed)
    write_model_folder(folder, load_sequence_classifier(base, new_head=True), load_tokenizer(base))
    return RewardModel(str(folder))


def test_a_comparison_with_one_model_more_computes_that_one_alone(
    tiny_models: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    sizes: dict[str, Any] = {"limit": 5, "max_length": 128, "max_prompt_length": 64}
    settings = {
        **FULL,
        "sampling": SAMPLING,
        "judges": {"strict": scorer(tiny_models["base"], tmp_path / "scorer", 2)},
        "likelihood": {"chosen": LikelihoodSet("builtin:demo/eval", **sizes)},
        "pairs": {"held_out": PairSet("builtin:demo/eval", **sizes)},
    }
    run({"base": tiny_models["base"]}, tmp_path / "a", **settings)
    # Answers and scores, the same for best-of-n, questions in two ways, likelihood, pairs, two sides of them scored.
    assert "cache: 0 of 10 results were in" in caplog.text
    caplog.clear()
    kept = read(run(tiny_models, tmp_path / "a", **settings))
    # Of the second model: answers, scores, log-probabilities by itself and by the base, questions, likelihood, pairs.
    assert "cache: 10 of 18 results were in" in caplog.text
    fresh = read(run(tiny_models, tmp_path / "b", **{**settings, "cache": None}))
    for report, _ in (kept, fresh):
        del report["created"]
    assert kept == fresh
    assert not (tmp_path / "b" / "cache").exists()
    settings["cache"] = str(tmp_path / "a" / "cache")
    caplog.clear()
    run(tiny_models, tmp_path / "c", **{**settings, "batch_size": 2})
    assert "cache: 18 of 18 results were in" in caplog.text
    caplog.clear()
    run(tiny_models, tmp_path / "d", **{**settings, "sampling": SamplingConfig(max_new_tokens=8, top_k=5)})
    assert "cache: 8 of 18 results were in" in caplog.text  # greedy answers, and what was given and not sampled


def test_other_weights_in_the_same_folder_are_another_model(tiny_models: dict[str, str], tmp_path: Path) -> None:
    folder, tokenizer = tmp_path / "model", load_tokenizer(tiny_models["base"])
    answers = []
    for name in ("base", "other"):
        write_model_folder(folder, load_causal_lm(tiny_models[name]), tokenizer)
        _, samples = read(run({"model": str(folder)}, tmp_path / "out", limit=4))
        answers.append([row["response"] for row in samples])
    assert answers[0] != answers[1]


def test_sections_judges_and_questions(tiny_models: dict[str, str], tmp_path: Path) -> None:
    judges = {"chars": FunctionReward(characters), "strict": scorer(tiny_models["base"], tmp_path / "scorer", 2)}
    report, samples = read(run(tiny_models, tmp_path / "out", judges=judges, **FULL))
    assert list(report["sections"]) == ["diversity", "judges", "best_of", "frontier"]
    of_chars = report["sections"]["judges"]["data"]["chars"]
    for name in ("base", "other"):
        rows = [row for row in samples if row["model"] == name]
        assert all(row["judges"]["chars"] == len(row["response"]) for row in rows)
        assert of_chars[name]["score"]["mean"] == pytest.approx(sum(len(row["response"]) for row in rows) / 6)
    assert report["sections"]["best_of"]["columns"] == ["best of 2"]
    assert report["sections"]["best_of"]["data"]["samples"] == 3
    (question,) = report["questions"]
    assert question["prompt"] == "Do you like tea?"
    assert set(question["greedy"]) == set(question["sampled"]) == {"base", "other"}
    plain, plain_samples = read(run(tiny_models, tmp_path / "plain", limit=6))
    assert list(plain["sections"]) == ["diversity"]
    assert plain["questions"] == []
    assert [row["response"] for row in plain_samples] == [row["response"] for row in samples]
    assert "judges" not in plain_samples[0]


def test_checkpoints_of_a_run_by_one_pattern(tiny_models: dict[str, str], tmp_path: Path) -> None:
    for step, name in ((1, "base"), (2, "other")):
        model, tokenizer = load_causal_lm(tiny_models[name]), load_tokenizer(tiny_models[name])
        weights = {f"policy.{key}": value for key, value in model.state_dict().items()}
        packed = pack_model("policy.", model, tokenizer)
        state = {"state_dict": weights, CHECKPOINT_KEY: packed, "global_step": step}
        torch.save(state, tmp_path / f"step-{step}.ckpt")
    settings = {"limit": 6, "reward": FunctionReward(words)}
    report, samples = read(run({"ppo": f"{tmp_path}/*.ckpt"}, tmp_path / "a", **settings))
    _, folders = read(run(tiny_models, tmp_path / "b", **settings))
    assert report["base"] == "ppo step 1"
    assert [model["name"] for model in report["models"]] == ["ppo step 1", "ppo step 2"]
    assert [row["response"] for row in samples] == [row["response"] for row in folders]
    points = report["sections"]["frontier"]["data"]["points"]
    assert [(point["line"], point["step"]) for point in points] == [("ppo", 1), ("ppo", 2)]
    assert not list((tmp_path / "a").rglob("model.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "bse"}, r"base is 'bse', which is none of the models base, other. Did you mean 'base'\?"),
        ({"models": {}}, "models is empty"),
        ({"models": {"base": "runs/none/here/model"}}, "'runs/none/here/model' does not exist"),
        ({"models": {"base": "builtin:demo"}}, "models.base: the folder 'builtin:demo' has no weights"),
        ({"prompts": "none.jsonl"}, "'none.jsonl' does not exist"),
        ({"prompts": "builtin:demo/eval_promts"}, "eval_prompts"),
        ({"prompts": "EMPTY"}, "holds no rows"),
        ({"text_metrics": {"human": "rlhf_lightning.demo.voice:humn_voice"}}, "Did you mean 'human_voice'"),
        ({"text_metrics": {"score": "rlhf_lightning.demo.voice:human_voice"}}, "'score' is a name of the report's own"),
        ({"curves": {"ppo": "none/metrics.jsonl"}}, "curves.ppo: 'none/metrics.jsonl' does not exist"),
        ({"limit": 0}, "limit is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"device": "cudda"}, "device is 'cudda'"),
        ({"sampling": SamplingConfig(max_new_tokens=250)}, "do not fit into its 256 positions"),
        ({"sampling": SamplingConfig(stop_tokens=["<|im_ed|>"])}, "stop token '<|im_ed|>' is not in"),
        ({"output": "FILE"}, "is a file; give a folder"),
        ({"reward": object()}, "reward is a object, which has no score"),
        ({"likelihood": {"x": LikelihoodSet("none.jsonl")}}, "likelihood.x: data file 'none.jsonl' does not exist"),
        (
            {"pairs": {"x": PairSet("builtin:demo/prompts")}},
            "pairs.x: 'builtin:demo/prompts' row 1: no column 'chosen'",
        ),
        ({"pairs": {"x": PairSet(LONG, max_length=300)}}, "pairs.x has sequences of 300 tokens, but models.base reads"),
        ({"judges": {"a": object()}}, "judges.a is a object, which has no score"),
        ({"best_of": [4]}, "best_of takes the answer of the highest score and so needs a reward"),
        ({"questions": [" "]}, "questions has an empty one"),
        ({"questions": ["tea " * 300], "max_prompt_length": 300}, "do not fit into its 256 positions"),
        ({"cache": "FILE"}, "is a file; give a folder, or null for none"),
        ({"models": {"base": "none/*.ckpt"}}, "models.base: no file matches 'none/\\*.ckpt'"),
    ],
)
def test_mistakes_end_in_one_line(
    tiny_models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b " * 600, "rejected": "c"}))
    for wanted in change.get("pairs", {}).values():
        monkeypatch.setattr(wanted, "source", wanted.source.replace(LONG, str(tmp_path / "long.jsonl")))
    stands_for = {"EMPTY": str(tmp_path / "empty.jsonl"), "FILE": str(tmp_path / "file")}
    settings: dict[str, Any] = {
        "models": tiny_models,
        "prompts": "builtin:demo/eval_prompts",
        "output": str(tmp_path / "out"),
        "sampling": SAMPLING,
        "limit": 2,
        **{key: stands_for.get(value, value) if isinstance(value, str) else value for key, value in change.items()},
    }
    with pytest.raises(UserError, match=message.replace("|", r"\|")) as refusal:
        compare(**settings)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_models_of_different_tokenizers_are_refused(
    tiny_models: dict[str, str], tmp_path: Path, shared_data: Path
) -> None:
    strange = str(shared_data / "models" / "stories260K")
    with pytest.raises(UserError, match="'base' and 'story' have different tokenizers"):
        run({"base": tiny_models["base"], "story": strange}, tmp_path)


def test_models_of_different_templates_are_refused(tiny_models: dict[str, str], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_models["other"])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    write_model_folder(tmp_path / "model", load_causal_lm(tiny_models["other"]), tokenizer)
    with pytest.raises(UserError, match="turn the same prompts into different tokens"):
        run({"base": tiny_models["base"], "other": str(tmp_path / "model")}, tmp_path / "out")


def test_a_reward_model_is_refused_before_any_answers(tiny_models: dict[str, str], tmp_path: Path) -> None:
    scorer = load_sequence_classifier(tiny_models["base"], new_head=True)
    write_model_folder(tmp_path / "scorer", scorer, load_tokenizer("builtin:demo"))
    with pytest.raises(UserError, match="is a LlamaForSequenceClassification; a language model"):
        run({**tiny_models, "scorer": str(tmp_path / "scorer")}, tmp_path / "out", prompts="none.jsonl")


def test_a_diverged_model_is_refused(tiny_models: dict[str, str], tmp_path: Path) -> None:
    model = load_causal_lm(tiny_models["other"])
    torch.nn.init.constant_(model.get_input_embeddings().weight, torch.nan)
    write_model_folder(tmp_path / "model", model, load_tokenizer(tiny_models["other"]))
    with pytest.raises(UserError, match="not finite; its training has diverged"):
        run({"base": tiny_models["base"], "other": str(tmp_path / "model")}, tmp_path / "out")


def test_a_reward_model_scores_the_very_tokens(tiny_models: dict[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(2)
    scorer = AutoModelForSequenceClassification.from_pretrained(tiny_models["base"], num_labels=1)
    write_model_folder(tmp_path / "reward", scorer, load_tokenizer(tiny_models["base"]))
    reward = RewardModel(str(tmp_path / "reward"), batch_size=3)
    _, samples = read(run({"base": tiny_models["base"]}, tmp_path / "out", reward=reward, limit=8))

    encoder = ConversationEncoder(load_tokenizer(tiny_models["base"]))
    model = load_causal_lm(tiny_models["base"]).eval()
    ids = [encoder.encode_prompt(row["prompt"]) for row in samples]
    sequences, _ = sample_responses(model, ids, config=SAMPLING, stop_ids=[4], seed=0, batch_size=64)
    for row in range(8):
        one = sequences.input_ids[row : row + 1, : int(sequences.lengths[row])]
        hidden = scorer.model(one).last_hidden_state[:, -1]
        assert samples[row]["score"] == pytest.approx(float(scorer.score(hidden).detach()), abs=1e-4)


def test_rewards_get_the_prompts_that_they_get_in_training(tiny_models: dict[str, str], tmp_path: Path) -> None:
    seen: list[Any] = []

    def look(prompts: list[Any], responses: list[str]) -> list[float]:
        seen.extend(prompts)
        return [0.0] * len(responses)

    sets = {"pairs": {"p": PairSet("builtin:demo/eval", limit=2)}, "best_of": [2], "best_of_samples": 2, "limit": 2}
    run({"base": tiny_models["base"]}, tmp_path, reward=FunctionReward(look), **sets)
    assert len(seen) == 2 + 4 + 4
    assert all(prompt[-1]["role"] == "user" for prompt in seen)

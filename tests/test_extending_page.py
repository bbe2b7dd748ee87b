"""docs/extending.md: every file on the page is written out, its config checked, and a few steps are trained with it."""

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from rlhf_lightning import SFTModule
from rlhf_lightning.__main__ import main
from rlhf_lightning.algorithm.preference_losses import Pairs
from rlhf_lightning.errors import UserError
from rlhf_lightning.loggers import read_metrics
from rlhf_lightning.models.causal_lm import ResponsePass

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE))
EXAMPLES = [title for title, text in SECTIONS.items() if "```yaml" in text]
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
#: What the configs of the page lay over: a model and numbers small enough for a test.
BASE: dict[str, dict[str, Any]] = {
    "PPOModule": {
        "policy": "start",
        "reward": {"class_path": "FunctionReward", "init_args": {"function": "base_reward.py:letters"}},
        "kl": {"class_path": "FixedKL", "init_args": {"coef": 0.1}},
        "sampling": {"max_new_tokens": 6},
        "minibatch_size": 4,
        "ppo_epochs": 2,
    },
    "DPOModule": {"policy": "start"},
}
DATA: dict[str, dict[str, Any]] = {
    "PPOModule": {"source": "builtin:demo/prompts", "rollout_batch_size": 8, "max_prompt_length": 32},
    "DPOModule": {"source": "builtin:demo/train", "limit": 8, "max_length": 96, "max_prompt_length": 32},
}


def blocks(language: str, text: str = PAGE) -> list[tuple[str, str]]:
    """Return what stands behind the language of each block, and the block."""
    return re.findall(rf"^```{language}[ ]?(.*?)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def files() -> dict[str, str]:
    """Return the files of the page by name; that of a Python file is its first line."""
    named = {code.partition("\n")[0].removeprefix("# "): code for _, code in blocks("python")}
    return named | dict(blocks("jsonl"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All files of the page and a model to start from, importable."""
    place = tmp_path_factory.mktemp("extending")
    for name, text in files().items():
        (place / name).write_text(text, encoding="utf-8")
    (place / "base_reward.py").write_text(
        "def letters(prompts, responses):\n    return [sum(map(str.isalpha, text)) / 10 for text in responses]\n"
    )
    torch.manual_seed(0)
    SFTModule("builtin:demo", pretrained=False, config_overrides=TINY).export_model(place / "start")
    known = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(place))
        yield place
    for name in set(sys.modules) - known & {Path(file).stem for file in files()}:
        del sys.modules[name]


@pytest.fixture
def arguments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """``arguments(section)`` returns a command that lays the section's config over a tiny run."""
    monkeypatch.chdir(folder)

    def command(section: str) -> list[str]:
        (_, shown), *more = blocks("yaml", SECTIONS[section])
        assert not more
        over = yaml.safe_load(shown)
        module = over["model"]["class_path"]
        data = over.get("data", {"class_path": "PromptDataModule"})["class_path"]
        base = {
            "model": {"class_path": module, "init_args": BASE[module]},
            "data": {"class_path": data, "init_args": DATA[module]},
            "trainer": {"max_steps": 2, "accelerator": "cpu"},
        }
        Path("base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
        Path("mine.yaml").write_text(shown, encoding="utf-8")
        return ["fit", "--config", "base.yaml", "--config", "mine.yaml"]

    return command


def iterations(run: Path) -> list[dict[str, Any]]:
    """Return what was logged of each step, without times, the self-check of each start and Lightning's epoch."""
    left_out = ("time", "check/", "epoch")
    rows = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(left_out)} for row in rows]


def responses(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def runs() -> dict[str, Path]:
    """Folders of the runs that have been made, by section and changes."""
    return {}


@pytest.fixture
def run_of(
    arguments: Callable[[str], list[str]], runs: dict[str, Path], folder: Path
) -> Callable[..., tuple[Path, list[dict[str, Any]]]]:
    """``run_of(section)`` trains two steps by its config, once; returns the folder and what was logged."""

    def run(section: str, **changes: Any) -> tuple[Path, list[dict[str, Any]]]:
        key = f"{section} {changes}"
        if key not in runs:
            runs[key] = folder / f"run-{len(runs)}"
            more = [f"--{name}={value}" for name, value in changes.items()]
            assert not main([*arguments(section), *more, f"--run_dir={runs[key]}"])
        return runs[key], iterations(runs[key])

    return run


def resumed(run_of: Any, section: str, steps: int = 2) -> list[dict[str, Any]]:
    """Return what is logged of the same steps where the run is stopped after the first."""
    run, _ = run_of(section, **{"trainer.max_steps": 1})
    assert not main(["fit", f"--config={run / 'config.yaml'}", f"--run_dir={run}", f"--trainer.max_steps={steps}"])
    return iterations(run)


def test_every_part_has_a_section_with_a_config() -> None:
    parts = "reward function, reward source, score transform, sampler, advantage estimator, KL controller, critic"
    for part in [*parts.split(", "), "objective", "loss on pairs", "shape of data"]:
        assert any(part in title for title in EXAMPLES), part


def test_a_reward_function_pays_what_it_returns(run_of: Any) -> None:
    run, _ = run_of("A reward function")
    on_topic = importlib.import_module("on_topic").on_topic
    topics = {row["prompt"]: row["topic"] for row in map(json.loads, files()["prompts.jsonl"].splitlines())}
    for row in (rows := responses(run)):
        topic = topics[row["prompt"][0]["content"]]
        assert row["score"] == pytest.approx(on_topic([], [row["response"]], [topic])[0], abs=1e-6)
    assert len(rows) >= 8
    assert on_topic([], ["Rain", "Sun"], ["rain", "rain"]) == [0.96, -0.03]


def test_a_reward_function_of_tokens_pays_each(run_of: Any) -> None:
    no_stutter = importlib.import_module("stutter").no_stutter
    assert no_stutter([], [""], [["a", "a", "b"]]) == [[0.0, -0.1, 0.0]]
    assert run_of("A reward for each token")[1][0]["rollout/score"] < 0  # the first rollout has a pair of equal tokens


def test_the_worst_of_several_rewards_is_paid(run_of: Any) -> None:
    run, rows = run_of("A reward source")
    judges = importlib.import_module("judges")
    for row in responses(run):
        both = judges.short([], [row["response"]]) + judges.varied([], [row["response"]])
        assert row["score"] == pytest.approx(min(both), abs=1e-6)
    assert {"rollout/score_short", "rollout/score_varied"} <= set(rows[0])
    worst_of = importlib.import_module("worst_of")
    with pytest.raises(UserError, match="at least two"):
        worst_of.WorstOf([])


def test_a_score_transform_moves_the_rewards_and_comes_back(run_of: Any) -> None:
    _, rows = run_of("A score transform")
    scores = [row["rollout/score"] for row in rows]
    assert rows[0]["rollout/rewards"] == pytest.approx(0.0, abs=1e-5)
    moved = (scores[1] - scores[0]) / 2  # half of the step that the mean did not follow
    assert rows[1]["rollout/rewards"] == pytest.approx(moved - 0.1 * rows[1]["rollout/kl"], abs=1e-4)
    assert resumed(run_of, "A score transform") == rows


def test_the_plain_sampler_draws_what_the_cached_one_draws(run_of: Any) -> None:
    run, _ = run_of("A sampler")
    cached, _ = run_of("A sampler", **{"model.sampler": "CachedSampler"})
    own = [row["response"] for row in responses(run)]
    assert own == [row["response"] for row in responses(cached)]
    assert len(set(own)) > 4


def test_the_median_of_a_group_is_its_baseline(run_of: Any) -> None:
    median = importlib.import_module("median_baseline").MedianBaseline()
    rewards = torch.tensor([[1.0, 0.0], [2.0, 0.0], [9.0, 5.0]])
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    found = median.estimate(rewards=rewards, values=torch.zeros(3, 2), response_mask=mask, group_size=3)
    assert found.advantages.tolist() == [[-1.0, -1.0], [0.0, 0.0], [7.0, 0.0]]
    _, rows = run_of("An advantage estimator")
    _, others = run_of("An advantage estimator", **{"model.advantages": "LeaveOneOut"})
    assert rows[0]["rollout/score"] == others[0]["rollout/score"]
    assert rows[0]["train/policy_loss"] != others[0]["train/policy_loss"]
    assert "train/value_loss" not in rows[0]


def test_the_price_of_a_nat_falls_in_a_line_and_over_a_restart(run_of: Any) -> None:
    _, rows = run_of("A KL controller", **{"trainer.max_steps": 3})
    assert [row["rollout/kl_coef"] for row in rows] == pytest.approx([0.2, 0.15, 0.1])
    assert resumed(run_of, "A KL controller", steps=3) == rows


def test_the_small_critic_learns_and_leaves_the_policy_alone(run_of: Any) -> None:
    _, rows = run_of("A critic")
    assert rows[1]["train/value_loss"] < rows[0]["train/value_loss"]
    assert rows[0]["train/lr_critic"] == pytest.approx(1e-3)
    critic = importlib.import_module("mlp_critic").MLPCritic(width=2)
    critic.setup("", SimpleNamespace(config=SimpleNamespace(hidden_size=4)))
    torch.nn.init.ones_(critic.layers[-1].weight)
    batch = SimpleNamespace(response_mask=torch.tensor([[True, False], [True, True]]))
    hidden = torch.randn(3, 4, requires_grad=True)
    values = critic.values(batch, ResponsePass(torch.zeros(2, 2), None, hidden))
    assert values[~batch.response_mask].tolist() == [0.0]
    assert len(set(values[batch.response_mask].tolist())) == 3  # one for each hidden state
    values.sum().backward()
    assert hidden.grad is None


def test_the_ratio_of_sequences_is_the_mean_over_tokens(run_of: Any) -> None:
    objective = importlib.import_module("sequence_ratio").SequenceRatio(clip_range=0.1)
    mask = torch.tensor([[True, True, False]])
    logprobs = torch.tensor([[0.3, -0.2, 7.0]], requires_grad=True)
    found = objective.loss(
        logprobs=logprobs,
        old_logprobs=torch.zeros(1, 3),
        advantages=torch.full((1, 3), 2.0) * mask,
        response_mask=mask,
        token_weights=mask / 2,
    )
    # The ratio is exp((0.3 - 0.2) / 2) at both tokens: within the clip range, where the first token's alone is not.
    assert float(found.loss.detach()) == pytest.approx(-2.0 * torch.tensor(0.05).exp().item())
    found.loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([-torch.tensor(0.05).exp().item()] * 2 + [0.0])
    _, rows = run_of("A policy objective")
    _, others = run_of("A policy objective", **{"model.policy_objective": "ClippedObjective"})
    assert rows[0]["train/approx_kl"] != others[0]["train/approx_kl"]


def test_the_loss_a_token_divides_by_the_lengths(run_of: Any) -> None:
    pairs = Pairs(torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([2]), torch.tensor([6]))
    loss = importlib.import_module("per_token_loss").PerTokenLoss(beta=4.0).loss(pairs)
    assert float(loss) == pytest.approx(torch.nn.functional.softplus(torch.tensor(-2.0)).item())
    _, rows = run_of("A loss on pairs", **{"model.optimizer.lr": 1e-3})
    _, others = run_of("A loss on pairs", **{"model.optimizer.lr": 1e-3, "model.loss": "SigmoidLoss"})
    assert rows[0]["train/loss"] == pytest.approx(others[0]["train/loss"])  # log 2 before the first step
    assert rows[1]["train/loss"] != pytest.approx(others[1]["train/loss"], abs=1e-6)


def test_voted_answers_become_pairs(run_of: Any, capfd: pytest.CaptureFixture[str]) -> None:
    run_of("A shape of data")
    assert "rows 4, dropped_unwanted 1, kept 3" in capfd.readouterr().err
    data = importlib.import_module("voted_answers").VotedAnswers("questions.jsonl")
    row = json.loads(files()["questions.jsonl"].splitlines()[1])
    assert [(pair.chosen, pair.rejected) for pair in data.parse(row)] == [("It thrives on it.", "No.")]
    with pytest.raises(UserError, match="expected question and answers, found prompt"):
        data.parse({"prompt": "p"})

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.collate import collate_sequences
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.answer_sets import PairSet, read_pairs
from rlhf_lightning.evaluation.pair_margins import Sides
from rlhf_lightning.evaluation.reward_pairs import evaluate_rewards, length_bias, score_pairs, summarize_rewards
from rlhf_lightning.models.export import write_model_folder
from rlhf_lightning.models.loading import load_sequence_classifier
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.rollout.reward_model import RewardModel
from rlhf_lightning.rollout.reward_sources import FunctionReward

PAIRS = [
    {"prompt": "One?", "chosen": "aaaa bbbb", "rejected": "a", "from": "x"},
    {"prompt": "Two?", "chosen": "b", "rejected": "bbbb bbbb bbbb", "from": "y"},
    {"prompt": "Three?", "chosen": "cccc", "rejected": "c", "from": "x"},
]


def letters(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return str(path)


def test_length_bias_by_hand() -> None:
    # Chosen longer: right, wrong. Shorter: right. As long: a tie.
    scores = Sides(torch.tensor([2.0, 0.0, 3.0, 1.0]), torch.tensor([1.0, 4.0, 1.0, 1.0]))
    lengths = Sides(torch.tensor([9, 9, 2, 5]), torch.tensor([4, 6, 8, 5]))
    found = length_bias(scores, lengths)
    parts = [found.chosen_longer, found.chosen_shorter, found.same_length]
    assert [part.pairs for part in parts] == [2, 1, 1]
    assert [part.accuracy and part.accuracy.mean for part in parts] == [0.5, 1.0, 0.5]
    assert found.longer_is_chosen.mean == (2 + 0.5) / 4
    assert found.correlation is not None
    margins, differences = torch.tensor([1.0, -4.0, 2.0, 0.0]), torch.tensor([5.0, 3.0, -6.0, 0.0])
    assert found.correlation.mean == pytest.approx(float(torch.corrcoef(torch.stack([margins, differences]))[0, 1]))


def test_a_kind_of_pair_that_never_comes_has_no_accuracy() -> None:
    found = length_bias(Sides(torch.ones(2), torch.zeros(2)), Sides(torch.tensor([5, 5]), torch.tensor([4, 3])))
    assert found.chosen_shorter == (0, None)
    assert found.correlation is None  # the margins are all the same


def test_groups_and_ties_by_hand() -> None:
    scores = Sides(torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 4.0, 1.0]))
    found = summarize_rewards(scores, scores, ["b", "a", "b"])
    assert list(found.groups) == ["a", "b"]
    assert [(part.pairs, part.accuracy and part.accuracy.mean) for part in found.groups.values()] == [(1, 0), (2, 0.75)]
    assert [found.ties.mean, found.scores.accuracy.mean] == pytest.approx([1 / 3, 0.5])
    assert found.scores.margin.mean == -1.0
    assert summarize_rewards(scores, scores).groups == {}


def test_a_function_that_counts_letters(source: str, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    rewards = {"letters": FunctionReward(letters)}
    sets = {"all": PairSet(source, group_by="from")}
    found = evaluate_rewards(rewards, demo_tokenizer, sets)["all"]["letters"]
    assert found.scores.accuracy.mean == pytest.approx(2 / 3)
    assert found.scores.margin.mean == pytest.approx((8 - 13 + 3) / 3)
    assert found.length.chosen_longer.accuracy is not None
    assert found.length.chosen_shorter.accuracy is not None
    assert (found.length.chosen_longer.accuracy.mean, found.length.chosen_shorter.accuracy.mean) == (1.0, 0.0)
    assert {name: part.accuracy and part.accuracy.mean for name, part in found.groups.items()} == {"x": 1.0, "y": 0.0}


def test_a_reward_model_reads_the_last_token_of_each_side(
    tiny_models: dict[str, str], source: str, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    scorer = load_sequence_classifier(tiny_models["base"], new_head=True).eval()
    write_model_folder(tmp_path / "scorer", scorer, demo_tokenizer)
    reward = RewardModel(str(tmp_path / "scorer"), batch_size=2, as_transformers=False)
    reward.setup(demo_tokenizer)
    pairs = read_pairs(PairSet(source), demo_tokenizer)
    found = score_pairs(reward, pairs)
    for side, scores in ((pairs.chosen, found.chosen), (pairs.rejected, found.rejected)):
        for row in range(3):
            tokens = side.input_ids[row, : int(side.lengths[row])].tolist()
            with torch.no_grad():
                alone = ScalarModel(scorer).scores(collate_sequences([(tokens[:1], tokens[1:])], pad_id=0))
            assert float(scores[row]) == pytest.approx(float(alone), abs=1e-5)


def test_a_score_that_is_not_finite_is_refused(source: str, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    broken = FunctionReward(lambda prompts, responses: [float("nan")] * len(responses), name="broken")
    with pytest.raises(UserError, match="broken"):
        evaluate_rewards({"broken": broken}, demo_tokenizer, {"all": PairSet(source)})

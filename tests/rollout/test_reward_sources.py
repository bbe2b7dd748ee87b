from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_lightning.errors import UserError
from rlhf_lightning.rollout.reward_sources import (
    FunctionReward,
    RewardSource,
    Scores,
    ScoringBatch,
    TokenFunctionReward,
    WeightedSum,
)
from rlhf_lightning.rollout.user_functions import RewardFunctionError
from tests.rollout.scoring import scoring_batch

REWARDS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Bonus:
    amount: float = 0.5

def length(prompts, responses):
    return [len(response) for response in responses]

def exact(prompts, responses, answer):
    return [float(response == wanted) for response, wanted in zip(responses, answer)]

def everything(prompts, responses, **columns):
    return [len(columns) + Bonus().amount] * len(responses)

def own_names(prompt, response, *, answer=None):
    return [float(text.endswith(reply)) for text, reply in zip(prompt, response)]

def own_names_and_everything(prompt, response, **columns):
    return [float("prompt" not in columns)] * len(response)

def short(prompts, responses):
    return [1.0]

def words(prompts, responses):
    return ["good"] * len(responses)

def missing(prompts, responses):
    return [1.0, float("nan")]

def nothing(prompts, responses):
    pass

def one(prompts, responses):
    return 1.5

def failing(prompts, responses):
    return [1 / 0]

def leaving(prompts, responses):
    raise SystemExit(0)

def failing_late(prompts, responses):
    return (1 / (len(response) - 3) for response in responses)

def pairs(prompts, responses):
    import torch
    return [1.0, torch.ones(2)]

def hanging(prompts, responses, **columns):
    import time
    time.sleep(60)

def ends(prompts, responses, tokens):
    return [[float(token == "<|end|>") - 0.25 * number for number, token in enumerate(row)] for row in tokens]

def ends_in_answer(prompts, responses, tokens, answer):
    return [[len(wanted)] * len(row) for row, wanted in zip(tokens, answer)]

def one_list(prompts, responses, tokens):
    return [[0.0] * len(tokens[0])]

def plain_numbers(prompts, responses, tokens):
    return [1.0] * len(tokens)

def one_too_few(prompts, responses, tokens):
    return [[0.0] * (len(row) - 1) for row in tokens]

def text_tokens(prompts, responses, tokens):
    return tokens

def infinite(prompts, responses, tokens):
    return [[float("inf")] * len(row) for row in tokens]

number = 3
"""


@pytest.fixture
def rewards(tmp_path: Path) -> str:
    """File of reward functions."""
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    return str(tmp_path / "my_rewards.py")


class TestFunctions:
    def test_it_is_called_once_with_the_batch(self, rewards: str) -> None:
        scores = FunctionReward(f"{rewards}:length").score(scoring_batch())
        assert scores.total.tolist() == [3, 4]
        assert scores.total.dtype == torch.float32
        assert {name: part.tolist() for name, part in scores.parts.items()} == {"length": [3, 4]}
        assert list(FunctionReward(f"{rewards}:length", name="size").score(scoring_batch()).parts) == ["size"]

    def test_it_gets_the_columns_that_it_names(self, rewards: str) -> None:
        assert FunctionReward(f"{rewards}:exact").score(scoring_batch()).total.tolist() == [1, 0]
        assert FunctionReward(f"{rewards}:everything").score(scoring_batch()).total.tolist() == [2.5, 2.5]

    def test_it_may_name_prompts_and_responses_as_it_likes(self, rewards: str) -> None:
        # The rows have a column `prompt` too, which must not come in under that name a second time.
        assert FunctionReward(f"{rewards}:own_names").score(scoring_batch()).total.tolist() == [1, 0]
        everything = FunctionReward(f"{rewards}:own_names_and_everything")
        assert everything.score(scoring_batch()).total.tolist() == [1, 1]

    def test_a_column_that_is_not_there(self, rewards: str) -> None:
        batch = scoring_batch(columns=[{"prompt": "q", "answers": "one"}] * 2)
        with pytest.raises(UserError) as error:
            FunctionReward(f"{rewards}:exact").score(batch)
        assert str(error.value) == (
            "reward function 'exact' asks for the column 'answer', but the prompts' rows have prompt, answers. "
            "Did you mean 'answers'?"
        )

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("short", "'short' returned 1 scores for 2 responses"),
            ("words", "'words' must return numbers: could not convert string to float"),
            ("missing", "'missing' returned nan for the response 'two!'; scores must be finite"),
            ("nothing", "'nothing' returned None; it must return one number for each response"),
            ("one", "'one' returned 1.5; it must return one number for each response"),
            ("failing", r"'failing' failed: ZeroDivisionError: division by zero \(.*\.py, line \d+\)"),
        ],
    )
    def test_what_it_returns_is_checked(self, rewards: str, name: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            FunctionReward(f"{rewards}:{name}").score(scoring_batch())

    @pytest.mark.parametrize(
        ("name", "rows"),
        [
            ("short", [0, 1]),
            ("words", [0]),
            ("pairs", [1]),
            ("missing", [1]),
            ("nothing", [0, 1]),
            ("failing", [0, 1]),
            ("failing_late", [0, 1]),
            ("leaving", [0, 1]),
        ],
    )
    def test_a_failure_has_the_rows_it_is_about(self, rewards: str, name: str, rows: list[int]) -> None:
        batch = scoring_batch()
        with pytest.raises(RewardFunctionError) as failure:
            WeightedSum([FunctionReward(f"{rewards}:{name}")], [1.0]).score(batch)
        assert failure.value.rows == [
            {"prompt": batch.prompts[row], "response": batch.responses[row], "columns": batch.rows[row]} for row in rows
        ]

    @pytest.mark.parametrize("kind", [FunctionReward, TokenFunctionReward])
    def test_timeout_s_ends_what_hangs(self, rewards: str, kind: Any, word_tokenizer: PreTrainedTokenizerFast) -> None:
        reward = kind(f"{rewards}:hanging", timeout_s=0.1)
        reward.setup(word_tokenizer)
        message = (
            r"^reward function 'hanging' has not returned within 0\.1 s \(timeout_s\) \(my_rewards\.py, line \d+\);"
        )
        with pytest.raises(RewardFunctionError, match=message) as failure:
            reward.score(scoring_batch())
        assert len(failure.value.rows) == 2
        with pytest.raises(UserError, match="timeout_s is 0; it must be above 0, or null for any time"):
            kind(f"{rewards}:hanging", timeout_s=0)


class TestTokenFunctions:
    def make(self, path: str, tokenizer: PreTrainedTokenizerFast) -> TokenFunctionReward:
        source = TokenFunctionReward(path)
        source.setup(tokenizer)
        return source

    def test_each_token_gets_its_reward(self, rewards: str, word_tokenizer: PreTrainedTokenizerFast) -> None:
        # The responses are w7 <|end|> and w9: 0 and 1 - 0.25 for the first, 0 for the second.
        scores = self.make(f"{rewards}:ends", word_tokenizer).score(scoring_batch())
        assert scores.per_token is not None
        assert scores.per_token.tolist() == [[0, 0.75], [0, 0]]
        assert scores.per_token.dtype == torch.float32
        assert scores.total.tolist() == [0.75, 0]
        assert {name: part.tolist() for name, part in scores.parts.items()} == {"ends": [0.75, 0]}

    def test_it_gets_the_columns_that_it_names(self, rewards: str, word_tokenizer: PreTrainedTokenizerFast) -> None:
        batch = scoring_batch(columns=[{"answer": "three"}, {"answer": "x"}])
        scores = self.make(f"{rewards}:ends_in_answer", word_tokenizer).score(batch)
        assert scores.per_token is not None
        assert scores.per_token.tolist() == [[5, 5], [1, 0]]  # nothing where the second has no token
        assert scores.total.tolist() == [10, 1]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("one_list", "'one_list' returned 1 lists for 2 responses; it must return a list of one number for each t"),
            ("plain_numbers", "'plain_numbers' returned 1.0 for a response; it must return a list of one number"),
            ("one_too_few", r"'one_too_few' returned 1 numbers for a response of 2 tokens \(w7 <|end|>\); it must"),
            ("text_tokens", "'text_tokens' must return numbers: could not convert string to float: 'w7'"),
            ("infinite", "'infinite' returned inf for the token 'w7'; rewards must be finite"),
            ("nothing", "'nothing' returned None; it must return a list of one number for each token, for each resp"),
        ],
    )
    def test_what_it_returns_is_checked(
        self, rewards: str, name: str, message: str, word_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        with pytest.raises(UserError, match=message.replace("|", r"\|")) as error:
            self.make(f"{rewards}:{name}", word_tokenizer).score(scoring_batch())
        assert "\n" not in str(error.value)


class Constant(RewardSource):
    """Gives fixed scores."""

    def __init__(self, name: str, scores: list[float], per_token: list[list[float]] | None = None) -> None:
        super().__init__()
        self.per_token = None if per_token is None else torch.tensor(per_token)
        self.name, self.scores = name, torch.tensor(scores)
        self.tokenizer: Any = None

    def setup(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def score(self, batch: ScoringBatch) -> Scores:
        return Scores(self.scores, {self.name: self.scores}, self.per_token)


class TestWeightedSum:
    def test_by_hand(self, word_tokenizer: PreTrainedTokenizerFast) -> None:
        parts = [Constant("kind", [1.0, 2.0]), Constant("long", [10.0, 30.0])]
        source = WeightedSum(list(parts), [2.0, -0.1])
        source.setup(word_tokenizer)
        assert [part.tokenizer for part in parts] == [word_tokenizer] * 2
        scores = source.score(scoring_batch())
        torch.testing.assert_close(scores.total, torch.tensor([1.0, 1.0]))  # 2 - 1 and 4 - 3
        # Each is logged as it came, before its weight.
        assert {name: part.tolist() for name, part in scores.parts.items()} == {"kind": [1, 2], "long": [10, 30]}

    def test_rewards_of_single_tokens_keep_their_places_and_are_weighted(self) -> None:
        kind = Constant("kind", [1.0, 2.0])
        dense = Constant("dense", [3.0, 5.0], [[1.0, 2.0], [5.0, 0.0]])
        other = Constant("other", [10.0, 0.0], [[0.0, 4.0], [0.0, 0.0]])  # pays 6 at the end of the first
        scores = WeightedSum([kind, dense, other], [2.0, -1.0, 0.5]).score(scoring_batch())
        assert scores.total.tolist() == [4, -1]  # 2 - 3 + 5 and 4 - 5
        assert scores.per_token is not None
        assert scores.per_token.tolist() == [[-1, 0], [-5, 0]]  # -1, -2 + 2; -5
        assert WeightedSum([kind], [2.0]).score(scoring_batch()).per_token is None

    def test_rewards_of_single_tokens_leave_no_rounding_to_be_paid_at_the_end(self) -> None:
        """0.3 (a + b) and 0.3 a + 0.3 b differ in float32, here by 1e-5: noise that normalising would blow up."""
        per_token = 100 * torch.rand(16, 8, generator=torch.Generator().manual_seed(0))
        dense = Constant("dense", per_token.sum(dim=1).tolist(), per_token.tolist())
        assert ((0.3 * dense.scores) - (0.3 * per_token).sum(dim=1)).abs().max() > 3e-6
        scores = WeightedSum([dense], [0.3]).score(scoring_batch())
        assert scores.per_token is not None
        assert torch.equal(scores.total, scores.per_token.sum(dim=1))

    def test_mistakes(self) -> None:
        with pytest.raises(UserError, match="1 rewards but 2 weights"):
            WeightedSum([Constant("a", [1.0])], [1.0, 2.0])
        with pytest.raises(UserError, match="0 rewards but 0 weights"):
            WeightedSum([], [])
        with pytest.raises(UserError, match=r"the weights are \[nan\]; they must be finite"):
            WeightedSum([Constant("a", [1.0])], [float("nan")])
        with pytest.raises(UserError, match=r"the names \['a', 'a'\] are not distinct"):
            WeightedSum([Constant("a", [1.0]), Constant("a", [1.0])], [1.0, 2.0])

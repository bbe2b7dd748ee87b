from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_tokenizer
from rlhf_lightning.rollout.reward_model import RewardModel
from tests.rollout.scoring import scoring_batch


@pytest.fixture
def reward_model(
    make_model: Callable[..., PreTrainedModel], word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> tuple[str, PreTrainedModel]:
    """Folder of a reward model with the tokenizer of words, and the model."""
    model = make_model("llama", scalar=True, pad_token_id=None, scored_token_id=2)
    model.save_pretrained(tmp_path / "reward")
    word_tokenizer.save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward"), model


@torch.no_grad()
def scores_of(model: PreTrainedModel, rows: list[list[int]]) -> list[float]:
    """Return what transformers' own forward says of each row alone, read at its last token."""
    return [float(model(input_ids=torch.tensor([row])).logits) for row in rows]


class TestRewardModel:
    def test_with_the_policys_tokenizer_it_reads_the_policys_tokens(
        self, reward_model: tuple[str, PreTrainedModel], word_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        path, model = reward_model
        source = RewardModel(path, name="rm")
        source.setup(word_tokenizer)
        assert source.same_tokens
        assert source.scored_token_id == 2
        # Text that says otherwise is not looked at.
        scores = source.score(scoring_batch(responses=["w30", "w31"]))
        assert scores.total.tolist() == pytest.approx(scores_of(model, [[5, 6, 7, 2], [8, 9]]), abs=1e-5)
        assert torch.equal(scores.parts["rm"], scores.total)
        assert not scores.total.requires_grad
        assert not any(parameter.requires_grad for parameter in source.parameters())
        assert not source.scalar.model.training

    def test_normalize_changes_the_scores_by_the_stored_statistics(
        self, make_model: Callable[..., PreTrainedModel], word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        make_model("llama", scalar=True, score_mean=0.5, score_std=4).save_pretrained(tmp_path)
        word_tokenizer.save_pretrained(tmp_path)
        raw, normal = RewardModel(str(tmp_path)), RewardModel(str(tmp_path), normalize=True)
        for source in (raw, normal):
            source.setup(word_tokenizer)
        expected = (raw.score(scoring_batch()).total - 0.5) / 4
        scores = normal.score(scoring_batch())
        torch.testing.assert_close(scores.total, expected)
        assert torch.equal(scores.parts["reward_model"], scores.total)

    @pytest.mark.parametrize(
        ("statistics", "found"),
        [
            ({}, "score_mean None and score_std None"),
            ({"score_mean": 1.0, "score_std": 0.0}, r"1\.0 and score_std 0\.0"),
        ],
    )
    def test_normalize_needs_statistics(
        self,
        statistics: dict[str, float],
        found: str,
        make_model: Callable[..., PreTrainedModel],
        word_tokenizer: PreTrainedTokenizerFast,
        tmp_path: Path,
    ) -> None:
        make_model("llama", scalar=True, **statistics).save_pretrained(tmp_path)
        with pytest.raises(UserError, match=f"{found}; train it with RewardModule"):
            RewardModel(str(tmp_path), normalize=True).setup(word_tokenizer)

    def test_another_tokenizer_reads_the_conversation_in_its_own_template(
        self, reward_model: tuple[str, PreTrainedModel], caplog: pytest.LogCaptureFixture
    ) -> None:
        path, model = reward_model
        source = RewardModel(path)
        with caplog.at_level("INFO"):
            source.setup(load_tokenizer("builtin:demo"))
        assert not source.same_tokens
        assert caplog.messages == [
            f"reward model '{path}' has other tokens than the policy; it reads the text by its own"
        ]
        batch = scoring_batch(
            prompts=[[{"role": "user", "content": "w5 w6"}], [{"role": "user", "content": "w7"}]],
            responses=["w8 w9", "w10 w11 w12"],
            finished=[True, False],
        )
        # <|user|> w5 w6 <|end|> w8 w9 <|end|>; the second never stopped, so it has no end to be read at.
        expected = scores_of(model, [[1, 5, 6, 2, 8, 9, 2], [1, 7, 2, 10, 11, 12]])
        assert source.score(batch).total.tolist() == pytest.approx(expected, abs=1e-5)

    def test_plain_text_goes_without_a_template(self, reward_model: tuple[str, PreTrainedModel]) -> None:
        path, model = reward_model
        source = RewardModel(path)
        source.setup(load_tokenizer("builtin:demo"))
        batch = scoring_batch(prompts=["w5 w6", "w7"], responses=[" w8 w9", " w10"], finished=[True, True])
        expected = scores_of(model, [[5, 6, 8, 9, 2], [7, 10, 2]])
        assert source.score(batch).total.tolist() == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
    def test_the_cut_into_batches_changes_nothing(
        self, reward_model: tuple[str, PreTrainedModel], word_tokenizer: PreTrainedTokenizerFast, batch_size: int
    ) -> None:
        path, model = reward_model
        rows = [([5], [6, 7, 8, 9]), ([10, 11, 12], [2]), ([13], [14]), ([15, 16], [17, 18, 19]), ([20], [21, 2])]
        source = RewardModel(path, batch_size=batch_size)
        source.setup(word_tokenizer)
        shapes: list[torch.Size] = []
        source.score(scoring_batch(rows))  # the trial of packing would be noted too
        embedding = source.scalar.model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
        scores = source.score(scoring_batch(rows)).total.tolist()
        assert scores == pytest.approx(scores_of(model, [prompt + response for prompt, response in rows]), abs=1e-5)
        # Longest first, and no padding: the two of length 5 and 4, the two of 4 and 3, the one of 2 tokens.
        sizes = {1: [5, 5, 4, 3, 2], 2: [10, 7, 2], 3: [14, 5], 32: [19]}[batch_size]
        assert [shape[:2].numel() for shape in shapes] == sizes

    def test_it_is_loaded_once(
        self, reward_model: tuple[str, PreTrainedModel], word_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        source = RewardModel(reward_model[0])
        source.setup(word_tokenizer)
        scalar = source.scalar
        source.setup(word_tokenizer)
        assert source.scalar is scalar

    def test_mistakes(self, word_tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(UserError, match="batch_size is 0; it must be at least 1"):
            RewardModel("x", batch_size=0)
        with pytest.raises(UserError, match="not a reward model"):
            RewardModel("builtin:demo").setup(word_tokenizer)

    def test_where_it_reads_is_part_of_its_digest(
        self, reward_model: tuple[str, PreTrainedModel], word_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        digests = set()
        for where in (False, True):
            source = RewardModel(reward_model[0], as_transformers=where)
            source.setup(word_tokenizer)
            digests.add(source.digest())
        assert len(digests) == 2

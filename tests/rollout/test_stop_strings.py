"""Texts that end a response: found token by token as in the whole text, and honoured alike by both samplers."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_lightning.errors import UserError
from rlhf_lightning.rollout.decoding import CachedSampler, TransformersSampler
from rlhf_lightning.rollout.sampler import Samples, SamplingConfig
from rlhf_lightning.rollout.stop_strings import StopStrings, resolve_stop_strings

ROWS = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14], [15, 2, 16], [17, 18, 19], [20], [21, 22, 23, 24, 25]]
STOPS = [2, 3]


def first_end(stops: StopStrings, ids: Sequence[int], start: int = 1) -> int | None:
    """Return after how many tokens it says that a string is complete."""
    return next((n for n in range(start, len(ids) + 1) if stops.completed([ids[:n]])[0]), None)


class TestCompleted:
    def test_a_string_of_one_and_of_several_tokens(self, word_tokenizer: PreTrainedTokenizerFast) -> None:
        # Decoded, the words stand one blank apart.
        rows = [[5], [5, 6], [7, 5, 6], [6, 5], [5, 6, 7], [16]]
        assert StopStrings(word_tokenizer, ["w6"]).completed(rows) == [False, True, True, False, False, False]
        assert StopStrings(word_tokenizer, ["w5 w6"]).completed(rows) == [False, True, True, False, False, False]
        assert StopStrings(word_tokenizer, ["5 w", "16"]).completed(rows) == [False, True, True, False, False, True]
        assert StopStrings(word_tokenizer, ["w8"]).completed(rows) == [False] * 6

    def test_one_that_stood_there_already_does_not_count_again(self, word_tokenizer: PreTrainedTokenizerFast) -> None:
        stops = StopStrings(word_tokenizer, ["w5"])
        assert stops.completed([[5, 6], [5, 5], [5, 6, 5]]) == [False, True, True]

    def test_special_tokens_have_a_text_too(self, word_tokenizer: PreTrainedTokenizerFast) -> None:
        assert StopStrings(word_tokenizer, ["w5 <|user|>"]).completed([[5, 1], [6, 1]]) == [True, False]

    @pytest.mark.parametrize("text", ["it is 5 € or so, naïve", "so 😀😀 😀", "a\n\nb \n\n c"])
    @pytest.mark.parametrize("name", ["smollm_tokenizer", "stories_tokenizer", "demo_tokenizer"])
    def test_characters_of_several_tokens(self, name: str, text: str, request: pytest.FixtureRequest) -> None:
        """As many tokens as the whole text of them needs to hold the string."""
        tokenizer = request.getfixturevalue(name)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        texts = [tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False) for n in range(len(ids) + 1)]
        for string in {text[at : at + size] for size in (1, 2, 5) for at in range(len(text))}:
            expected = next((n for n, part in enumerate(texts) if string in part), None)
            assert first_end(StopStrings(tokenizer, [string]), ids) == expected, string

    @settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_the_tail_tells_as_much_as_the_whole(self, data: st.DataObject, demo_tokenizer: Any) -> None:
        ids = data.draw(st.lists(st.integers(5, 300), min_size=1, max_size=40))
        text = demo_tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        at = data.draw(st.integers(0, max(0, len(text) - 1)))
        string = text[at : at + data.draw(st.integers(1, 12))]
        if string and "\ufffd" not in string:
            texts = (demo_tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False) for n in range(len(ids) + 1))
            expected = next(n for n, part in enumerate(texts) if string in part)
            assert first_end(StopStrings(demo_tokenizer, [string]), ids) == expected

    def test_no_more_than_a_tail_is_decoded(
        self, smollm_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stops, decode, sizes = StopStrings(smollm_tokenizer, ["End."]), smollm_tokenizer.decode, set[int]()

        def watched(ids: list[int], **arguments: Any) -> Any:
            sizes.add(len(ids))
            return decode(ids, **arguments)

        monkeypatch.setattr(smollm_tokenizer, "decode", watched)
        ids = smollm_tokenizer("word " * 500 + "End.").input_ids
        assert stops.completed([ids]) == [True]
        assert max(sizes) == stops.window == 8

    @pytest.mark.parametrize("strings", [[], ["a", ""]])
    def test_empty_ones_are_refused(self, word_tokenizer: PreTrainedTokenizerFast, strings: list[str]) -> None:
        with pytest.raises(UserError, match=r"stop_strings is .* name at least one text, none of them empty"):
            StopStrings(word_tokenizer, strings)
        with pytest.raises(UserError, match=r"stop_strings is .* name at least one text, none of them empty"):
            SamplingConfig(stop_strings=strings)

    def test_none_are_none(self, word_tokenizer: PreTrainedTokenizerFast) -> None:
        assert resolve_stop_strings(word_tokenizer, None) is None
        resolved = resolve_stop_strings(word_tokenizer, ["w5"])
        assert resolved is not None
        assert resolved.strings == ("w5",)


MakeRun = Callable[..., Samples]


@pytest.fixture
def run(
    make_model: Callable[..., PreTrainedModel],
    make_prompts: Callable[..., Any],
    word_tokenizer: PreTrainedTokenizerFast,
) -> MakeRun:
    """``run(sampler, **settings)`` samples from a tiny Llama."""
    model, prompts = make_model("llama"), make_prompts(ROWS)

    def sample(sampler: CachedSampler | TransformersSampler, *, stop_ids: Sequence[int] = STOPS, **changes: Any) -> Any:
        config = SamplingConfig(**({"max_new_tokens": 12} | changes))
        sampler.setup(model)
        strings = resolve_stop_strings(word_tokenizer, config.stop_strings)
        return sampler.sample(prompts.ids, prompts.mask, config=config, stop_ids=stop_ids, seed=3, stop_strings=strings)

    return sample


SETTINGS: list[dict[str, Any]] = [
    {"stop_strings": ["1"]},  # in a third of the words
    {"stop_strings": ["1", "w2"]},
    {"stop_strings": ["w3", "4 w", "5 w1", "6 w2"]},  # of one token and of two
    {"stop_strings": ["1"], "min_new_tokens": 3},
    {"stop_strings": ["1"], "min_new_tokens": 12},
    {"stop_strings": ["w"]},  # in every word
    {"stop_strings": ["never"]},
    {"stop_strings": ["1"], "stop_ids": []},
    {"stop_strings": ["1"], "stop_ids": [0]},  # the id that fills the rest of a row
    {"stop_strings": ["<|unk|>"], "stop_ids": []},  # whose text is that of the filling
]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_both_samplers_end_at_the_same_tokens(run: MakeRun, changes: dict[str, Any]) -> None:
    ours, theirs = run(CachedSampler(decode_batch_size=3), **changes), run(TransformersSampler(), **changes)
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert ours.lengths.tolist() == theirs.lengths.tolist()
    assert ours.finished.tolist() == theirs.finished.tolist()
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", [CachedSampler, TransformersSampler])
class TestBoth:
    def test_stop_strings_change_where_responses_end(
        self, sampler: type[CachedSampler], run: MakeRun, word_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        """Each response is the one without strings, cut behind the token that first completes one."""
        free, stopped = run(sampler()), run(sampler(), stop_strings=["1", "w2"])
        earlier = 0
        for row, length in enumerate(free.lengths.tolist()):
            tokens = free.tokens[row, :length].tolist()
            texts = [word_tokenizer.decode(tokens[: n + 1]) for n in range(length)]
            end = next((n + 1 for n, text in enumerate(texts) if "1" in text or "w2" in text), length)
            earlier += end < length
            assert stopped.tokens[row, : int(stopped.lengths[row])].tolist() == tokens[:end]
            assert stopped.finished[row] == (
                end < length or "1" in texts[-1] or "w2" in texts[-1] or free.finished[row]
            )
            assert not stopped.tokens[row, end:].any()
            assert not stopped.logprobs[row, end:].any()
        assert earlier > 3

    def test_min_new_tokens_changes_where_a_string_ends_a_response(
        self, sampler: type[CachedSampler], run: MakeRun, word_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        strings = {"stop_strings": ["1"], "stop_ids": []}
        free = run(sampler(), stop_ids=[])
        early, late = run(sampler(), **strings), run(sampler(), **strings, min_new_tokens=4)
        assert int(early.lengths.min()) <= 4 < int(late.lengths.min())  # as with a stop token, the fifth may be it
        for row, tokens in enumerate(free.tokens.tolist()):
            ends = [n + 1 for n, token in enumerate(tokens) if "1" in word_tokenizer.decode([token]) and n >= 4]
            assert int(late.lengths[row]) == (ends or [12])[0]
            assert bool(late.finished[row]) == bool(ends)

    def test_each_of_several_stop_tokens_changes_where_responses_end(
        self, sampler: type[CachedSampler], run: MakeRun
    ) -> None:
        free = run(sampler(), stop_ids=[])
        seen = free.tokens.flatten().bincount(minlength=37).argsort(descending=True)[:3].tolist()
        one, three = run(sampler(), stop_ids=seen[:1]), run(sampler(), stop_ids=seen)
        for samples, stops in ((one, seen[:1]), (three, seen)):
            for row, tokens in enumerate(free.tokens.tolist()):
                ends = [n + 1 for n, token in enumerate(tokens) if token in stops]
                assert int(samples.lengths[row]) == (ends or [12])[0]
                assert bool(samples.finished[row]) == bool(ends)
        assert int(three.lengths.sum()) < int(one.lengths.sum()) < int(free.lengths.sum())

    def test_min_new_tokens_changes_the_shortest_response(self, sampler: type[CachedSampler], run: MakeRun) -> None:
        stops = list(range(2, 20))
        short, long = run(sampler(), stop_ids=stops), run(sampler(), stop_ids=stops, min_new_tokens=5)
        assert int(short.lengths.min()) == 1
        assert int(long.lengths.min()) >= 6
        assert not set(long.tokens[:, :5].flatten().tolist()) & set(stops)

    @pytest.mark.parametrize("changes", [{"temperature": 0.3}, {"top_k": 2}, {"top_p": 0.3}], ids=str)
    def test_temperature_top_k_and_top_p_change_the_draws(
        self, sampler: type[CachedSampler], run: MakeRun, changes: dict[str, Any]
    ) -> None:
        free, changed = run(sampler(), stop_ids=[]), run(sampler(), stop_ids=[], **changes)
        assert free.tokens.tolist() != changed.tokens.tolist()
        assert changed.logprobs.mean() > free.logprobs.mean()  # drawn from fewer or likelier tokens

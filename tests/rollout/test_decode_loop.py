from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.rollout.decode_loop import WaitingPrompts
from rlhf_lightning.rollout.decoding import CachedSampler, TransformersSampler
from rlhf_lightning.rollout.sampler import Sampler, Samples, SamplingConfig

#: Groups of equal prompts, of several sizes, one prompt that comes again later, and one that another one ends with.
ROWS = [[5, 6, 7]] * 3 + [[8]] * 2 + [[9, 10, 11, 12]] + [[6, 7]] * 4 + [[5, 6, 7]] + [[21, 22, 23, 24, 25]] * 2
STOPS = [2, 3, 4, 26]

MakeModel = Callable[..., PreTrainedModel]
MakePrompts = Callable[..., Any]


def run(sampler: Sampler, model: PreTrainedModel, prompts: Any, **settings: Any) -> Samples:
    """Sample with the same draws each time."""
    sampler.setup(model)
    config = SamplingConfig(**({"max_new_tokens": 12} | settings))
    return sampler.sample(prompts.ids, prompts.mask, config=config, stop_ids=STOPS, seed=5)


def shapes_of_inputs(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """Take note of rows and tokens of each pass."""
    shapes: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(output.shape[:2]))
    )
    return shapes


@pytest.mark.parametrize(
    "settings", [{}, {"min_new_tokens": 7}, {"max_new_tokens": 1}, {"max_new_tokens": 30}], ids=str
)
@pytest.mark.parametrize("size", [1, 2, 4, 5, 12, 13, 40])
def test_the_size_of_the_batch_changes_no_token(
    make_model: MakeModel, make_prompts: MakePrompts, size: int, settings: dict[str, Any]
) -> None:
    model, prompts = make_model("llama"), make_prompts(ROWS, pad_id=36)
    ours, theirs = (
        run(CachedSampler(size), model, prompts, **settings),
        run(TransformersSampler(), model, prompts, **settings),
    )
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert ours.lengths.tolist() == theirs.lengths.tolist()
    assert ours.finished.tolist() == theirs.finished.tolist()
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [2, 5])
def test_rows_refilled_in_every_family(
    family: str, make_model: MakeModel, make_prompts: MakePrompts, size: int
) -> None:
    model, prompts = make_model(family), make_prompts(ROWS)
    ours, theirs = run(CachedSampler(size), model, prompts), run(TransformersSampler(), model, prompts)
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert ours.lengths.tolist() == theirs.lengths.tolist()


class TestWork:
    """What the loop saves."""

    def test_waiting_prompts_take_the_place_of_finished_rows(
        self, make_model: MakeModel, make_prompts: MakePrompts
    ) -> None:
        model, prompts = make_model("llama"), make_prompts([[5 + row, 5] for row in range(24)])
        run(CachedSampler(), model, prompts)  # the trial of the head would be noted too
        shapes = shapes_of_inputs(model)
        lengths = run(CachedSampler(4), model, prompts).lengths.tolist()
        assert shapes[0] == (4, 2)
        # The first token comes of reading the prompt. Each of 4 places is given the next prompt as soon as it is free,
        # as one row is a quarter of 4, so there are as many steps of one token as the busiest place has.
        places = [0, 0, 0, 0]
        for length in lengths:
            places[places.index(min(places))] += length - 1
        steps = [rows for rows, tokens in shapes if tokens == 1]
        assert len(steps) == max(places)
        assert steps.count(4) >= min(places)
        assert len(steps) < sum(max(lengths[at : at + 4]) - 1 for at in range(0, 24, 4)) * 0.8

    @pytest.mark.parametrize("size", [None, 5, 2])
    def test_equal_prompts_in_order_are_read_once(
        self, make_model: MakeModel, make_prompts: MakePrompts, size: int | None
    ) -> None:
        model, prompts = make_model("gpt2"), make_prompts(ROWS)
        read: list[Tensor] = []
        original = WaitingPrompts._run

        def noting(self: WaitingPrompts, rows: list[int]) -> Any:
            read.extend(self.ids[rows].unbind())
            return original(self, rows)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WaitingPrompts, "_run", noting)
            run(CachedSampler(size), model, prompts)
        distinct = [prompts.ids[row].tolist() for row in (0, 3, 5, 6, 10, 11)]
        assert [row.tolist() for row in read] == distinct

    def test_prompts_are_read_without_the_padding_of_others(
        self, make_model: MakeModel, make_prompts: MakePrompts
    ) -> None:
        model, prompts = make_model("llama"), make_prompts([[5], [6], list(range(5, 25))])
        run(CachedSampler(), model, prompts)
        shapes = shapes_of_inputs(model)
        run(CachedSampler(2), model, prompts, max_new_tokens=3)
        assert [shape for shape in shapes if shape[1] > 1] == [(1, 20)]

    def test_the_cache_has_room_for_one_prompt_and_response(
        self, make_model: MakeModel, make_prompts: MakePrompts
    ) -> None:
        """However many prompts come one after the other, rows move back to the left."""
        model, prompts = make_model("llama"), make_prompts([[5 + row % 30] * (1 + row % 5) for row in range(40)])
        run(CachedSampler(), model, prompts)  # the trial of the head has no cache
        seen: list[int] = []
        model.base_model.register_forward_hook(
            lambda module, inputs, output: seen.append(output.past_key_values.get_seq_length())
        )
        run(CachedSampler(3), model, prompts)
        assert len(seen) > 100
        assert 12 < max(seen) <= 5 + 12


def test_waiting_prompts_by_hand(make_model: MakeModel, make_prompts: MakePrompts) -> None:
    model, prompts = make_model("llama"), make_prompts([[5, 6], [5, 6], [7], [7], [7], [8, 9, 10]])
    waiting = WaitingPrompts(model, prompts.ids, prompts.mask)
    with torch.no_grad():
        first, second, third = waiting.read(3), waiting.read(2), waiting.read(9)
        expected = [model(input_ids=torch.tensor([row])).logits[0, -1] for row in ([5, 6], [7], [8, 9, 10])]
    assert first.rows.tolist() == [0, 1, 2]
    assert [rows.tolist() for _, rows in first.parts] == [[0, 0, 1]]
    assert [rows.tolist() for _, rows in second.parts] == [[0, 0]]  # both of the prompt that was read before
    assert (first.width, second.width, third.width) == (2, 1, 3)
    assert len(waiting) == 0
    for newcomers, rows in ((first, [0, 0, 1]), (second, [1, 1]), (third, [2])):
        torch.testing.assert_close(newcomers.logits, torch.stack([expected[row] for row in rows]), atol=1e-5, rtol=1e-5)

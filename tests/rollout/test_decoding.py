import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import SequenceBatch, length_mask
from rlhf_lightning.models.causal_lm import response_logprobs
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.rollout import linear
from rlhf_lightning.rollout.decoding import CachedSampler, TransformersSampler
from rlhf_lightning.rollout.sampler import Sampler, Samples, SamplingConfig

ROWS = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14], [15, 2, 16], [17, 18, 19], [20], [21, 22, 23, 24, 25]]
STOPS = [2, 3, 4, 26]

MakeModel = Callable[..., PreTrainedModel]
MakePrompts = Callable[..., Any]


def run(sampler: Sampler, model: PreTrainedModel, prompts: Any, **settings: Any) -> Samples:
    """Sample with what the tests have in common; the arguments of ``sample`` itself are picked out of the settings."""
    arguments: dict[str, Any] = {"stop_ids": STOPS, "seed": 3}
    arguments |= {name: settings.pop(name) for name in ("stop_ids", "seed", "row_ids", "progress") if name in settings}
    sampler.setup(model)
    config = SamplingConfig(**({"max_new_tokens": 12} | settings))
    return sampler.sample(prompts.ids, prompts.mask, config=config, **arguments)


def assert_equal(one: Samples, other: Samples) -> None:
    """Tokens, lengths and flags equal; log-probabilities up to rounding."""
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.lengths.tolist() == other.lengths.tolist()
    assert one.finished.tolist() == other.finished.tolist()
    torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decode_batch_size", [None, 3])
def test_every_family_token_for_token_as_transformers(
    family: str, make_model: MakeModel, make_prompts: MakePrompts, decode_batch_size: int | None
) -> None:
    model, prompts = make_model(family), make_prompts(ROWS)
    ours = run(CachedSampler(decode_batch_size), model, prompts)
    assert_equal(ours, run(TransformersSampler(), model, prompts))
    assert len(set(ours.lengths.tolist())) > 2  # rows ended at different times, so the batch was compacted


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 0.6},
        {"temperature": 1.5},
        {"top_k": 5},
        {"top_p": 0.7},
        {"top_k": 8, "top_p": 0.9, "temperature": 0.8},
        {"min_new_tokens": 6},
        {"min_new_tokens": 12},
        {"max_new_tokens": 1},
        {"row_ids": [40, 3, 17, 5, 6, 0, 99, 12]},
        {"stop_ids": [0]},  # the id that fills the rest of a row
        {"stop_ids": []},
        {"stop_ids": list(range(37))},
    ],
    ids=str,
)
@pytest.mark.parametrize("decode_batch_size", [None, 1, 5])
def test_every_setting_token_for_token_as_transformers(
    make_model: MakeModel, make_prompts: MakePrompts, settings: dict[str, Any], decode_batch_size: int | None
) -> None:
    model, prompts = make_model("llama"), make_prompts(ROWS)
    assert_equal(
        run(CachedSampler(decode_batch_size), model, prompts, **settings),
        run(TransformersSampler(), model, prompts, **settings),
    )


@pytest.mark.parametrize("sampler", [CachedSampler, TransformersSampler])
class TestBoth:
    def test_logprobs_are_those_of_a_teacher_forced_pass(
        self, sampler: type[CachedSampler], family: str, make_model: MakeModel, make_prompts: MakePrompts
    ) -> None:
        model, prompts = make_model(family), make_prompts(ROWS)
        samples = run(sampler(), model, prompts, temperature=0.7)
        joined = SequenceBatch.join(prompts.ids, prompts.mask, samples.tokens, samples.lengths)
        with torch.no_grad():
            expected = response_logprobs(model, joined, temperature=0.7)
        torch.testing.assert_close(samples.logprobs, expected, atol=1e-4, rtol=1e-4)

    def test_left_padding_and_neighbours_change_nothing(
        self, sampler: type[CachedSampler], family: str, make_model: MakeModel, make_prompts: MakePrompts
    ) -> None:
        model = make_model(family)
        together = run(sampler(), model, make_prompts(ROWS, pad_id=36))
        order = [6, 2, 0, 5, 7, 1, 4, 3]
        permuted = run(sampler(), model, make_prompts([ROWS[row] for row in order]), row_ids=order)
        for place, row in enumerate(order):
            alone = run(sampler(), model, make_prompts([ROWS[row]]), row_ids=[row])
            length = int(together.lengths[row])
            expected = together.tokens[row, :length].tolist()
            assert alone.tokens[0].tolist() == expected
            assert permuted.tokens[place, :length].tolist() == expected
            assert permuted.lengths[place] == alone.lengths[0] == length

    def test_responses_end_with_their_first_stop_token(
        self, sampler: type[CachedSampler], make_model: MakeModel, make_prompts: MakePrompts
    ) -> None:
        samples = run(sampler(), make_model("llama"), make_prompts(ROWS))
        assert samples.tokens.shape == samples.logprobs.shape == (8, int(samples.lengths.max()))
        assert 0 < int(samples.finished.sum()) < 8
        for tokens, length, finished in zip(
            samples.tokens.tolist(), samples.lengths.tolist(), samples.finished.tolist(), strict=True
        ):
            assert not set(tokens[: length - 1]) & set(STOPS)
            assert (tokens[length - 1] in STOPS) == finished
            assert finished or length == 12
            assert not any(tokens[length:])
        assert not samples.logprobs[~length_mask(samples.lengths)].any()
        assert (samples.logprobs[length_mask(samples.lengths)] < 0).all()

    def test_what_the_model_was_published_with_does_not_steer(
        self, sampler: type[CachedSampler], make_model: MakeModel, make_prompts: MakePrompts
    ) -> None:
        model, prompts = make_model("llama"), make_prompts(ROWS)
        expected = run(sampler(), model, prompts)
        model.generation_config.update(
            repetition_penalty=9.0, do_sample=True, temperature=0.1, top_k=1, max_length=4, eos_token_id=[5, 6, 7, 8, 9]
        )
        model.generation_config.update(min_new_tokens=11, suppress_tokens=[10, 11, 12], no_repeat_ngram_size=1)
        assert_equal(run(sampler(), model, prompts), expected)
        assert model.generation_config.repetition_penalty == 9

    def test_the_seed_decides_and_nothing_else(
        self, sampler: type[CachedSampler], make_model: MakeModel, make_prompts: MakePrompts
    ) -> None:
        model, prompts = make_model("llama"), make_prompts(ROWS)
        state = torch.random.get_rng_state()
        first = run(sampler(), model, prompts, seed=1)
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.rand(5)
        assert_equal(run(sampler(), model, prompts, seed=1), first)
        assert run(sampler(), model, prompts, seed=2).tokens.tolist() != first.tokens.tolist()

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_damaged_weights_are_named(
        self, sampler: type[CachedSampler], make_model: MakeModel, make_prompts: MakePrompts, temperature: float
    ) -> None:
        model = make_model("llama")
        with torch.no_grad():
            model.get_parameter("model.norm.weight").fill_(torch.nan)
        with pytest.raises(UserError, match="logits are not finite"):
            run(sampler(), model, make_prompts(ROWS), temperature=temperature)

    def test_without_a_model_it_says_so(self, sampler: type[CachedSampler], make_model: MakeModel) -> None:
        made = sampler()
        with pytest.raises(RuntimeError, match=r"setup\(model\)"):
            _ = made.model
        made.setup(make_model("llama"))
        made.close()
        with pytest.raises(RuntimeError, match=r"setup\(model\)"):
            _ = made.model

    def test_a_published_text_comes_out(self, sampler: type[CachedSampler], shared_data: Path) -> None:
        folder = shared_data / "models" / "stories260K"
        published = json.loads((folder / "published_greedy.json").read_text())
        prompt = torch.tensor([published["prompt_ids"]])
        made = sampler()
        made.setup(load_causal_lm(str(folder)).eval())
        samples = made.sample(
            prompt,
            prompt.bool(),
            config=SamplingConfig(max_new_tokens=published["max_new_tokens"], temperature=0.0),
            stop_ids=[1],
            seed=0,
        )
        text = load_tokenizer(str(folder)).decode(samples.tokens[0], skip_special_tokens=True)
        assert text.strip() == published["text"].strip()


def test_two_tokens_have_their_exact_joint_distribution(make_model: MakeModel, make_prompts: MakePrompts) -> None:
    model = make_model("llama", vocab_size=6, initializer_range=0.3, pad_token_id=0)
    count, temperature = 6000, 0.8
    prompts = make_prompts([[1, 3]] * count)
    samples = run(CachedSampler(), model, prompts, max_new_tokens=2, stop_ids=[], temperature=temperature)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    with torch.no_grad():
        whole = SequenceBatch(
            torch.cat([torch.tensor([[1, 3]]).expand(36, -1), pairs], dim=1), torch.full((36,), 2), torch.full((36,), 2)
        )
        probabilities = response_logprobs(model, whole, temperature=temperature).double().sum(dim=1).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    counts = (samples.tokens[:, 0] * 6 + samples.tokens[:, 1]).bincount(minlength=36)
    expected = probabilities * count
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < 66.6  # the 99.9 % point of chi-square with 35 degrees of freedom; the seed is fixed


class TestWork:
    """What the loop saves: no pass after the last stop, no finished rows carried along, no logits of prompts."""

    @staticmethod
    def watch(module: torch.nn.Module) -> list[tuple[int, ...]]:
        """Take note of the shape of what a module returns."""
        shapes: list[tuple[int, ...]] = []
        module.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
        return shapes

    def test_finished_rows_leave_the_batch(self, make_model: MakeModel, make_prompts: MakePrompts) -> None:
        model: Any = make_model("llama")
        run(CachedSampler(), model, make_prompts(ROWS[:1]))  # the trial of the head would be noted too
        shapes = self.watch(model.model.embed_tokens)
        samples = run(CachedSampler(), model, make_prompts(ROWS))
        assert shapes[0][:2] == (8, 5)
        assert len(shapes) == int(samples.lengths.max())
        rows = 8
        for step in range(1, len(shapes)):
            running = int((samples.lengths > step).sum())
            rows = running if rows - running >= rows / 4 else rows  # compacted where a quarter has ended
            assert shapes[step][:2] == (rows, 1)
        assert rows < 8

    def test_when_all_have_stopped_it_ends(self, make_model: MakeModel, make_prompts: MakePrompts) -> None:
        model: Any = make_model("llama")
        run(CachedSampler(), model, make_prompts(ROWS[:1]))
        shapes = self.watch(model.model.embed_tokens)
        samples = run(CachedSampler(), model, make_prompts(ROWS), stop_ids=list(range(37)), max_new_tokens=12)
        assert len(shapes) == 1
        assert samples.lengths.tolist() == [1] * 8

    def test_the_head_sees_one_position_a_row(
        self, family: str, make_model: MakeModel, make_prompts: MakePrompts
    ) -> None:
        model = make_model(family)
        run(CachedSampler(), model, make_prompts(ROWS[:1]))
        shapes = self.watch(model.get_output_embeddings())
        run(CachedSampler(), model, make_prompts(ROWS), max_new_tokens=2, stop_ids=[])
        assert [torch.Size(shape).numel() // 37 for shape in shapes] == [8, 8]

    @pytest.mark.parametrize(("decode_batch_size", "total"), [(None, 12), (3, 36)])
    @pytest.mark.parametrize("stop_ids", [[], STOPS], ids=["full", "stopping"])
    def test_progress_rises_to_the_end(
        self,
        make_model: MakeModel,
        make_prompts: MakePrompts,
        decode_batch_size: int | None,
        total: int,
        stop_ids: list[int],
    ) -> None:
        calls: list[tuple[int, int]] = []
        run(
            CachedSampler(decode_batch_size),
            make_model("llama"),
            make_prompts(ROWS),
            stop_ids=stop_ids,
            progress=lambda done, of: calls.append((done, of)),
        )
        done = [done for done, of in calls if of == total]
        assert len(done) == len(calls)
        assert done == sorted(done)
        assert done[-1] == total
        if decode_batch_size is None and not stop_ids:
            assert done == list(range(1, total + 1))

    def test_decode_batch_size_is_checked(self) -> None:
        with pytest.raises(UserError, match="decode_batch_size is 0; it must be at least 1"):
            CachedSampler(decode_batch_size=0)


class TestCopies:
    def test_without_another_type_the_model_itself_samples(self, make_model: MakeModel) -> None:
        model, sampler = make_model("llama"), CachedSampler()
        for dtype in (None, torch.float32):
            sampler.setup(model, dtype=dtype)
            assert sampler.model is model

    def test_a_copy_is_refreshed_once_a_version(self, make_model: MakeModel) -> None:
        model, sampler = make_model("llama"), CachedSampler()
        sampler.setup(model, dtype=torch.bfloat16)
        assert sampler.model is not model
        assert {parameter.dtype for parameter in sampler.model.parameters()} == {torch.bfloat16}
        assert not any(parameter.requires_grad for parameter in sampler.model.parameters())
        assert all(parameter.requires_grad for parameter in model.parameters())
        before = model.state_dict()["model.norm.weight"].clone()

        def norm_after(value: float, version: int) -> float:
            with torch.no_grad():
                model.get_parameter("model.norm.weight").fill_(value)
            sampler.sync(model.named_parameters(), version)
            return float(sampler.model.get_parameter("model.norm.weight")[0])

        assert (before == 1).all()
        assert norm_after(2.0, version=0) == 2
        assert norm_after(3.0, version=0) == 2  # the same version is no transfer
        assert norm_after(4.0, version=1) == 4

    def test_a_copy_in_bfloat16_is_what_transformers_loads_in_bfloat16(
        self, make_model: MakeModel, tmp_path: Path
    ) -> None:
        model, sampler = make_model("llama"), CachedSampler()
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        sampler.setup(model, dtype=torch.bfloat16)
        for (name, ours), (_, theirs) in zip(sampler.model.named_buffers(), loaded.named_buffers(), strict=True):
            # Rotary frequencies rounded to bfloat16 would turn a token 200 places on by most of a radian.
            assert ours.dtype == theirs.dtype, name
            assert torch.equal(ours, theirs), name
        ids = torch.arange(60)[None] % 37
        with torch.no_grad():
            assert torch.equal(sampler.model(input_ids=ids).logits, loaded(input_ids=ids).logits)

    def test_a_copy_in_bfloat16_samples_nearly_the_same_distribution(
        self, make_model: MakeModel, make_prompts: MakePrompts
    ) -> None:
        model, prompts, sampler = make_model("llama"), make_prompts(ROWS), CachedSampler()
        sampler.setup(copy.deepcopy(model), dtype=torch.bfloat16)
        samples = sampler.sample(
            prompts.ids, prompts.mask, config=SamplingConfig(max_new_tokens=12), stop_ids=STOPS, seed=0
        )
        assert samples.logprobs.dtype == torch.float32
        joined = SequenceBatch.join(prompts.ids, prompts.mask, samples.tokens, samples.lengths)
        with torch.no_grad():
            exact = response_logprobs(model, joined)
        assert (samples.logprobs - exact).abs().max().item() < 0.3
        assert (samples.logprobs - exact).abs().mean().item() < 0.03


class TestPackedWeights:
    @pytest.fixture(autouse=True)
    def _pack_the_smallest(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(linear, "SMALLEST", 0)

    @pytest.mark.parametrize("decode_batch_size", [None, 3])
    def test_every_family_token_for_token_as_transformers(
        self, family: str, make_model: MakeModel, make_prompts: MakePrompts, decode_batch_size: int | None
    ) -> None:
        model, prompts = make_model(family), make_prompts(ROWS)
        sampler = CachedSampler(decode_batch_size)
        ours = run(sampler, model, prompts)
        assert sampler._linears._packed
        assert_equal(ours, run(TransformersSampler(), model, prompts))

    def test_pack_weights_changes_what_is_held_and_no_token(
        self, make_model: MakeModel, make_prompts: MakePrompts
    ) -> None:
        model, prompts = make_model("llama"), make_prompts(ROWS)
        packed, plain = CachedSampler(), CachedSampler(pack_weights=False)
        assert_equal(run(packed, model, prompts), run(plain, model, prompts))
        assert len(packed._linears._packed) == 15  # seven in each of two layers, and the head
        assert not plain._linears._packed
        packed.release()
        assert not packed._linears._packed

    def test_an_update_between_two_calls_reaches_the_packed_weights(
        self, make_model: MakeModel, make_prompts: MakePrompts
    ) -> None:
        model, prompts = make_model("llama"), make_prompts(ROWS)
        sampler, config = CachedSampler(), SamplingConfig(max_new_tokens=12)
        run(sampler, model, prompts, seed=0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.3)
        sampler.sync(model.named_parameters(), 1)
        again = sampler.sample(prompts.ids, prompts.mask, config=config, stop_ids=STOPS, seed=0)
        assert_equal(again, run(TransformersSampler(), model, prompts, seed=0))


def test_models_with_another_state_are_left_to_generate(
    make_prompts: MakePrompts, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(MambaConfig(**sizes)).eval()
    prompts = make_prompts(ROWS)
    with caplog.at_level(logging.INFO, logger="rlhf_lightning"):
        ours = run(CachedSampler(3), model, prompts)
    assert "MambaForCausalLM keeps another state" in caplog.text
    assert_equal(ours, run(TransformersSampler(), model, prompts))

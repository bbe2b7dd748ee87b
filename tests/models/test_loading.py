import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import (
    context_length,
    disable_dropout,
    foreign_token,
    load_causal_lm,
    load_config,
    load_sequence_classifier,
    load_tokenizer,
    resolve_model,
)

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def language_model(
    make_model: Callable[..., PreTrainedModel], word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Path:
    """Folder of a language model, with dropout in its config and weights in bfloat16."""
    model = make_model("llama", attention_dropout=0.5, dtype="bfloat16").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "lm")
    word_tokenizer.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


@pytest.fixture
def reward_model(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    """Folder of a reward model."""
    make_model("llama", scalar=True, seed=1).save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


class TestNames:
    def test_folders_hub_names_and_the_demo(self, language_model: Path) -> None:
        assert resolve_model(str(language_model)) == str(language_model)
        assert resolve_model("HuggingFaceTB/SmolLM-135M-Instruct") == "HuggingFaceTB/SmolLM-135M-Instruct"
        assert (Path(resolve_model("builtin:demo")) / "tokenizer.json").is_file()

    def test_mistakes_are_named(self, language_model: Path, tmp_path: Path) -> None:
        for name, message in (
            ("builtin:dmeo", "no built-in model 'builtin:dmeo'. Did you mean 'builtin:demo'?"),
            (str(tmp_path), "has no config.json"),
            (str(language_model / "config.json"), "is a file; give the Hugging Face folder"),
            (str(tmp_path / "lmm"), "does not exist. Did you mean 'lm'?"),
            (str(tmp_path / "x" / "y" / "z"), "does not exist."),
        ):
            with pytest.raises(UserError) as error:
                resolve_model(name)
            assert message in str(error.value)

    def test_what_the_hub_does_not_give_is_one_line(self) -> None:
        with pytest.raises(UserError, match="'no-such-owner/no-such-model' is no folder here, and") as error:
            load_config("no-such-owner/no-such-model")
        assert "\n" not in str(error.value)


class TestLanguageModels:
    def test_it_loads_in_float32_without_dropout_ready_to_train(self, language_model: Path) -> None:
        model = load_causal_lm(str(language_model))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model.training
        assert torch.equal(model(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
        stored = load_file(language_model / "model.safetensors")["model.norm.weight"]
        assert torch.equal(model.state_dict()["model.norm.weight"], stored.float())

    def test_another_type_if_asked(self, language_model: Path) -> None:
        assert load_causal_lm(str(language_model), dtype=torch.bfloat16).dtype == torch.bfloat16

    def test_from_scratch_the_global_seed_draws(self) -> None:
        def draw(seed: int) -> torch.Tensor:
            torch.manual_seed(seed)
            return load_causal_lm("builtin:demo", pretrained=False).state_dict()["lm_head.weight"]

        with torch.random.fork_rng(devices=[]):
            assert torch.equal(draw(1), draw(1))
            assert not torch.equal(draw(1), draw(2))

    def test_overrides_change_the_shape(self) -> None:
        model = load_causal_lm(
            "builtin:demo", pretrained=False, config_overrides={"hidden_size": 64, "num_hidden_layers": 1}
        )
        config = model.config
        assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (64, 1, 16)  # 4 heads
        assert model(input_ids=IDS).logits.shape == (1, 4, config.vocab_size)
        config = load_causal_lm(
            "builtin:demo", pretrained=False, config_overrides={"num_attention_heads": 8, "num_key_value_heads": 2}
        ).config
        assert config.head_dim == 16  # 128 / 8, not what 4 heads had

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"hiden_size": 64}, "has no entry 'hiden_size'. Did you mean 'hidden_size'?"),
            ({"hidden_size": 65}, "hidden_size 65 is not divisible by 4 heads"),
            ({"hidden_size": "big"}, "hidden_size is 'big', expected a value like 128"),
            ({"hidden_size": -64}, "the model of 'builtin:demo' could not be loaded: "),
            ({"num_attention_heads": 2}, "num_attention_heads 2 is not divisible by num_key_value_heads 4"),
        ],
    )
    def test_overrides_that_cannot_be(self, overrides: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError) as error:
            load_causal_lm("builtin:demo", pretrained=False, config_overrides=overrides)
        assert message in str(error.value)

    def test_overrides_need_random_weights(self, language_model: Path) -> None:
        with pytest.raises(UserError, match="needs pretrained: false"):
            load_causal_lm(str(language_model), config_overrides={"hidden_size": 8})

    def test_a_reward_model_is_no_policy(self, reward_model: Path) -> None:
        with pytest.raises(UserError, match="is a LlamaForSequenceClassification; a language model"):
            load_causal_lm(str(reward_model))

    def test_a_folder_without_weights_says_how_to_go_on(self) -> None:
        with pytest.raises(UserError, match=r"no weights \(model.safetensors\).*pretrained: false"):
            load_causal_lm("builtin:demo")

    def test_weights_that_lack_a_tensor_are_not_drawn_at_random(self, language_model: Path) -> None:
        weights = load_file(language_model / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, language_model / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"1 tensors missing.*'model.norm.weight'"):
            load_causal_lm(str(language_model))

    def test_weights_of_another_shape(self, language_model: Path) -> None:
        config = json.loads((language_model / "config.json").read_text())
        (language_model / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
        with pytest.raises(UserError, match=r"do not fit its config: .* of another shape, such as 'model\.layers"):
            load_causal_lm(str(language_model))

    def test_pickled_weights_are_not_loaded(self, language_model: Path) -> None:
        (language_model / "model.safetensors").rename(language_model / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"has its weights in pytorch_model\.bin, which could run code"):
            load_causal_lm(str(language_model))

    def test_damaged_weights(self, language_model: Path) -> None:
        whole = (language_model / "model.safetensors").read_bytes()
        (language_model / "model.safetensors").write_bytes(whole[:100])
        with pytest.raises(UserError, match=r"the model of .* could not be") as error:
            load_causal_lm(str(language_model))
        assert "\n" not in str(error.value)


class TestRewardModels:
    def test_its_head_is_kept(self, reward_model: Path) -> None:
        stored = load_file(reward_model / "model.safetensors")["score.weight"]
        for new_head in (False, True):
            model = load_sequence_classifier(str(reward_model), new_head=new_head)
            assert torch.equal(model.state_dict()["score.weight"], stored)

    def test_a_language_model_gets_a_new_one_only_if_asked(self, language_model: Path) -> None:
        with pytest.raises(UserError, match="is a LlamaForCausalLM, not a reward model"):
            load_sequence_classifier(str(language_model))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            heads = [
                load_sequence_classifier(str(language_model), new_head=True).state_dict()["score.weight"]
                for _ in range(12)
            ]
        drawn = torch.stack(heads)
        assert drawn.shape == (12, 1, 16)
        # 192 numbers of variance 1 / (16 + 1): the mean square lies within 4 standard errors, sqrt(2 / 192).
        assert drawn.square().mean().item() * 17 == pytest.approx(1, abs=4 * (2 / 192) ** 0.5)
        trunk = load_file(language_model / "model.safetensors")["model.norm.weight"].float()
        loaded = load_sequence_classifier(str(language_model), new_head=True)
        assert torch.equal(loaded.state_dict()["model.norm.weight"], trunk)
        assert loaded.config.num_labels == 1

    def test_more_labels_than_one(self, make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
        make_model("llama", scalar=True).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        labels = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
        (tmp_path / "config.json").write_text(json.dumps(config | labels))
        with pytest.raises(UserError, match="has 2 labels; a reward model has exactly 1"):
            load_sequence_classifier(str(tmp_path))

    def test_a_head_that_the_files_promise_must_be_there(self, reward_model: Path) -> None:
        weights = load_file(reward_model / "model.safetensors")
        del weights["score.weight"]
        save_file(weights, reward_model / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"'score\.weight'"):
            load_sequence_classifier(str(reward_model), new_head=True)


SMALL = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, intermediate_size=24, attention_dropout=0.5),
        GPT2Config(vocab_size=37, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
        GPTNeoXConfig(**SMALL, intermediate_size=24, hidden_dropout=0.5, attention_dropout=0.5),
        FalconConfig(**SMALL, hidden_dropout=0.5, attention_dropout=0.5),
        OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16, dropout=0.5, attention_dropout=0.5, layerdrop=0.5),
        BloomConfig(vocab_size=37, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.5, attention_dropout=0.5),
    ],
    ids=lambda config: config.model_type,
)
def test_no_family_drops_anything_in_training(config: PreTrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # where whole layers are dropped, two passes may agree by chance
        passes = [model.train()(input_ids=IDS).logits for _ in range(2)]
        assert not torch.equal(*passes)  # it is there before
        assert disable_dropout(model) is model
        passes = [model.train()(input_ids=IDS).logits for _ in range(2)] + [model.eval()(input_ids=IDS).logits]
    assert torch.equal(passes[0], passes[1])
    assert torch.equal(passes[0], passes[2])


def test_a_tokenizer_is_loaded_or_missed(language_model: Path, reward_model: Path) -> None:
    assert load_tokenizer(str(language_model))("w5 w6")["input_ids"] == [5, 6]
    with pytest.raises(UserError, match=r"has no tokenizer \(tokenizer.json"):
        load_tokenizer(str(reward_model))
    shutil.copy(language_model / "tokenizer.json", reward_model)
    (reward_model / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer of") as error:
        load_tokenizer(str(reward_model))
    assert "\n" not in str(error.value)


def test_how_far_positions_reach(make_config: Callable[..., PreTrainedConfig]) -> None:
    assert context_length(make_config("llama")) == context_length(make_config("gpt2")) == 64
    assert context_length(BloomConfig(vocab_size=37, hidden_size=16, n_layer=1, n_head=2)) is None


def test_a_vocabulary_may_be_larger_but_not_another(demo_tokenizer: PreTrainedTokenizerBase) -> None:
    larger = load_tokenizer("builtin:demo")
    larger.add_tokens(["<new>"])
    assert foreign_token(demo_tokenizer, larger) is None
    assert foreign_token(larger, demo_tokenizer) == "<new>"

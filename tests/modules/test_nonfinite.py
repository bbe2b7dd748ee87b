"""What happens to a run whose numbers go wrong: named, skipped, counted, stopped, and no good checkpoint lost."""

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from rlhf_lightning.algorithm.advantages import LeaveOneOut
from rlhf_lightning.algorithm.kl import AdaptiveKL
from rlhf_lightning.algorithm.score_transforms import RunningNormalization
from rlhf_lightning.data.collate import LabelledBatch, PairBatch, collate_sequences
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.kto import KTOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.rating import RatingModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.rollout.reward_model import RewardModel
from rlhf_lightning.rollout.reward_sources import RewardSource, Scores, ScoringBatch
from rlhf_lightning.run_folder import RunCheckpoint
from rlhf_lightning.taking_up import LAST_CHECKPOINT

MakeTrainer = Callable[..., Trainer]
KINDS = [SFTModule, RewardModule, RatingModule, DPOModule, KTOModule]


def batches(kind: type[LightningModule], numbers: list[int]) -> DataLoader[Any]:
    """Batches of four rows each; the numbers tell which."""
    made: list[Any] = []
    for number in numbers:
        rows = [([5, 6 + number], [20 + number] * (row + 1) + [4]) for row in range(4)]
        others = [([5, 6 + number], [50 + number] * (row % 2 + 2) + [4]) for row in range(4)]
        first, second = (collate_sequences(each, pad_id=4) for each in (rows, others))
        if kind is SFTModule:
            made.append(first)
        elif kind in (RewardModule, DPOModule):
            made.append(PairBatch(first, second, None))
        else:
            made.append(LabelledBatch(first, torch.tensor([1.0, 0.0, 0.0, 1.0])))
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


def number_of(batch: Any) -> int:
    sequences = batch if isinstance(batch, SequenceBatch) else getattr(batch, "chosen", None) or batch.sequences
    return int(sequences.input_ids[0, 1]) - 6


def build(kind: Any, model: str, *, bad: dict[int, str] | None = None, **options: Any) -> Any:
    """A module whose loss or gradient is not a number in the batches whose numbers are given."""

    class GoingWrong(kind):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.ill = (bad or {}).get(number_of(batch))
            loss = super().training_step(batch, batch_idx)
            if self.ill == "constant":  # which no gradient tells of
                return loss + math.inf
            return loss * math.inf if self.ill == "loss" else loss

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            if self.ill == "gradient":
                weight = optimizer.param_groups[0]["params"][1]
                weight.grad[0] = torch.nan

    torch.manual_seed(0)  # the new head of a reward model
    given = {"optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2), **options}
    return GoingWrong(model, **given)


def state_of(run: Trainer, module: LightningModule) -> list[Tensor]:
    moments = run.optimizers[0].state_dict()["state"].values()
    return [*module.state_dict().values(), *(moment for state in moments for moment in state.values())]


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5}, {"precision": "bf16-mixed"}], ids=str)
@pytest.mark.parametrize("ill", ["loss", "constant", "gradient"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_not_finite_might_as_well_not_have_been(
    kind: Any, ill: str, options: dict[str, Any], language_model: str, trainer: MakeTrainer
) -> None:
    """Weights and moments are those of a run without the batch, to the bit, also where it is cut into parts."""
    ends = []
    for bad, numbers in (({1: ill}, [0, 1, 2]), ({}, [0, 2])):
        module = build(kind, language_model, bad=bad, max_tokens_per_microbatch=16)
        run = trainer(max_epochs=1, **options)
        run.fit(module, batches(kind, numbers))
        ends.append(state_of(run, module))
        assert run.global_step == len(numbers)
        assert run.callback_metrics["train/nonfinite_steps"] == len(bad)
    assert all(map(torch.equal, *ends))


def test_of_gradients_accumulated_over_batches_the_whole_window_is_skipped(
    language_model: str, trainer: MakeTrainer
) -> None:
    ends = []
    for bad, numbers in (({2: "loss"}, [0, 1, 2, 3, 4, 5]), ({}, [0, 1, 4, 5])):
        module = build(SFTModule, language_model, bad=bad)
        run = trainer(max_epochs=1, accumulate_grad_batches=2)
        run.fit(module, batches(SFTModule, numbers))
        ends.append(state_of(run, module))
        assert module.nonfinite.count == len(bad)
    assert all(map(torch.equal, *ends))


class Unwatched:
    """Lightning's own way, without a look at what is finite."""

    def configure_gradient_clipping(self: Any, optimizer: Any, **clipping: Any) -> None:
        LightningModule.configure_gradient_clipping(self, optimizer, **clipping)

    def on_before_backward(self, loss: Tensor) -> None:
        pass


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_healthy_run_is_what_it_was(
    kind: Any, options: dict[str, Any], language_model: str, trainer: MakeTrainer
) -> None:
    ends = []
    for cls in (kind, type("Plain", (Unwatched, kind), {})):
        module, run = build(cls, language_model), trainer(max_epochs=1, **options)
        run.fit(module, batches(kind, [0, 1, 2]))
        ends.append(state_of(run, module))
    assert all(map(torch.equal, *ends))


def test_what_went_wrong_is_named(language_model: str, trainer: MakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    module = build(SFTModule, language_model, bad={1: "gradient", 2: "loss"})
    with caplog.at_level(logging.WARNING, "rlhf_lightning"):
        trainer(max_epochs=1).fit(module, batches(SFTModule, [0, 1, 2]))
    told = [record.getMessage() for record in caplog.records if record.name == "rlhf_lightning"]
    assert told[0] == (
        "step 2: the gradient of 'policy.model.layers.0.self_attn.q_proj.weight' holds nan; skipped, 1 so far "
        "(max_nonfinite is 10)"
    )
    assert told[1].startswith(
        "step 3: the loss is inf and the gradient of 'policy.model.embed_tokens.weight' holds nan"
    )
    assert told[1].endswith("skipped, 2 so far (max_nonfinite is 10)")


@pytest.mark.parametrize("allowed", [0, 2])
def test_max_nonfinite_ends_the_run(allowed: int, language_model: str, trainer: MakeTrainer) -> None:
    module = build(SFTModule, language_model, bad=dict.fromkeys((1, 3, 4), "gradient"), max_nonfinite=allowed)
    run = trainer(max_epochs=1)
    where = {0: "step 2", 2: "step 5"}[allowed]
    with pytest.raises(
        UserError, match=rf"^{where}: the gradient .* {allowed + 1} skipped, max_nonfinite is {allowed}\."
    ):
        run.fit(module, batches(SFTModule, [0, 1, 2, 3, 4, 5]))


def test_a_number_below_zero_is_refused(language_model: str, ppo: Callable[..., PPOModule]) -> None:
    for kind in KINDS:
        with pytest.raises(UserError, match="max_nonfinite is -1; it must be at least 0"):
            kind(language_model, max_nonfinite=-1)
    with pytest.raises(UserError, match="max_nonfinite is -1; it must be at least 0"):
        ppo(max_nonfinite=-1)


def test_a_run_in_which_nothing_was_learnt_does_not_end_well(language_model: str, trainer: MakeTrainer) -> None:
    module = build(SFTModule, language_model, bad=dict.fromkeys(range(3), "loss"))
    with pytest.raises(UserError, match=r"^all 3 steps of this run were skipped, .* nothing was learnt"):
        trainer(max_epochs=1).fit(module, batches(SFTModule, [0, 1, 2]))


def test_a_resumed_run_counts_on(language_model: str, trainer: MakeTrainer, tmp_path: Path) -> None:
    def fit(steps: int, **settings: Any) -> Any:
        module = build(SFTModule, language_model, bad={0: "gradient", 2: "gradient"})
        run = trainer(max_steps=steps, enable_checkpointing=True, callbacks=[RunCheckpoint()])
        run.fit(module, batches(SFTModule, [0, 1, 2, 3]), **settings)
        return module

    assert fit(2).nonfinite.count == 1
    assert fit(4, ckpt_path=tmp_path / LAST_CHECKPOINT, weights_only=True).nonfinite.count == 2


class Overflowing(torch.optim.SGD):
    """Its steps are fine up to one, whose number is given, which is too long for a weight."""

    def __init__(self, params: Any, last: int) -> None:
        super().__init__(params, lr=1e-3)
        self.left = last

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.left -= 1
        if not self.left:
            self.param_groups[0]["params"][-1].data[0] = torch.inf
        return loss


@pytest.mark.parametrize(("every", "steps", "kept"), [(1, 3, 1), (0, 2, None), (0, 4, None)])
def test_weights_that_are_not_finite_take_the_place_of_no_checkpoint(
    every: int,
    steps: int,
    kept: int | None,
    language_model: str,
    trainer: MakeTrainer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Seen when they are to be saved, at the latest at the end, or by the loss of the next step."""
    module = SFTModule(language_model, optimizer=lambda params: Overflowing(params, 2))
    run = trainer(max_steps=steps, enable_checkpointing=True, callbacks=[RunCheckpoint(every_n_steps=every)])
    with pytest.raises(UserError, match=r"^weight 'policy\.lm_head\.weight' holds inf after 2 steps, "):
        run.fit(module, batches(SFTModule, [0, 1, 2, 3, 4]))
    last = tmp_path / LAST_CHECKPOINT
    assert last.exists() == (kept is not None)
    if kept is None:
        assert "no checkpoint was written" in caplog.text
        return
    state = torch.load(last, weights_only=True)
    assert state["global_step"] == kept
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())
    assert f"checkpoint of step 1: {last}; --ckpt_path auto takes it up" in caplog.text


@pytest.fixture
def damaged(save_model: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """``damaged(scalar=False)`` is the folder of a model of which one weight is not a number."""

    def make(*, scalar: bool = False) -> str:
        folder = save_model(tmp_path / f"damaged-{scalar}", seed=0, scalar=scalar)
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
        model = kind.from_pretrained(folder)
        with torch.no_grad():
            model.model.norm.weight[3] = torch.nan
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        return folder

    return make


def test_damaged_models_are_refused_before_training(
    damaged: Callable[..., str],
    language_model: str,
    trainer: MakeTrainer,
    ppo: Callable[..., PPOModule],
    prompts: Callable[..., PromptDataModule],
) -> None:
    cases = [
        (SFTModule(damaged()), "policy.model.norm.weight"),
        (RewardModule(damaged(scalar=True)), "scalar.model.model.norm.weight"),
        (DPOModule(language_model, reference=damaged()), "reference.model.norm.weight"),
        (ppo(reward=RewardModel(damaged(scalar=True))), "reward.scalar.model.model.norm.weight"),
        (ppo(reference=damaged()), "reference.model.norm.weight"),
    ]
    for module, name in cases:
        kind = type(module)
        data = {"datamodule": prompts()} if kind is PPOModule else {"train_dataloaders": batches(kind, [0])}
        with pytest.raises(UserError, match=rf"^weight '{name}' holds nan before training; the model folder"):
            trainer(max_steps=1).fit(module, **data)


class SometimesNaN(RewardSource):
    """The share of low tokens, but not a number for the calls whose numbers are given."""

    name = "low_tokens"

    def __init__(self, *bad: int) -> None:
        super().__init__()
        self.bad, self.calls = bad, 0

    def score(self, batch: ScoringBatch) -> Scores:
        mask = batch.sequences.response_mask
        scores = ((batch.sequences.response_tokens < 60) & mask).sum(dim=1) / mask.sum(dim=1)
        if self.calls in self.bad:
            scores[1] = torch.nan
        self.calls += 1
        return Scores(scores, {self.name: scores})


@pytest.mark.parametrize("critic", [True, False])
def test_an_iteration_of_ppo_whose_rollout_is_not_finite_teaches_nothing(
    critic: bool,
    ppo: Callable[..., PPOModule],
    prompts: Callable[..., PromptDataModule],
    trainer: MakeTrainer,
    caplog: pytest.LogCaptureFixture,
    recorder: Any,
) -> None:
    transform = RunningNormalization()
    options = {} if critic else {"critic": None, "advantages": LeaveOneOut()}
    module = ppo(
        reward=SometimesNaN(1), kl=AdaptiveKL(target=1.0, horizon=100), score_transforms=[transform], **options
    )
    seen: list[tuple[Any, ...]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            learnt = torch.cat([tensor.flatten() for tensor in pl_module.state_dict().values()])
            seen.append((learnt, module.kl.coef, str(transform.state_dict()), dict(module.counters)))

    run = trainer(max_steps=3, callbacks=[Watch()], logger=recorder, log_every_n_steps=1)
    data = prompts(48, responses_per_prompt=1 if critic else 4)
    with caplog.at_level(logging.WARNING, "rlhf_lightning"):
        run.fit(module, datamodule=data)
    assert "iteration 2: the rollout's 'score_low_tokens' holds nan (and 1 more); skipped, 1 so far" in caplog.text
    assert run.global_step == 3
    (first, *before, counters), (second, *after, later), (third, *_, last) = seen
    assert torch.equal(first, second)
    assert not torch.equal(second, third)
    assert before == after
    assert (later["iterations"], later["updates"]) == (2, counters["updates"])
    assert last["episodes"] == 24
    assert recorder.values["train/nonfinite_steps"] == [0, 1, 1]
    assert math.isnan(recorder.values["rollout/score"][1])


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_a_minibatch_of_ppo_whose_gradient_is_not_finite_is_skipped(
    max_grad_norm: float | None,
    ppo: Callable[..., PPOModule],
    prompts: Callable[..., PromptDataModule],
    trainer: MakeTrainer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class GoingWrong(PPOModule):
        minibatches = 0

        def accumulate_gradients(self, *args: Any) -> Tensor:
            approx_kl = super().accumulate_gradients(*args)
            self.minibatches += 1
            if self.minibatches == 2:
                self.policy.lm_head.weight.grad[0, 0] = torch.inf
            return approx_kl

    module = ppo(GoingWrong, max_grad_norm=max_grad_norm)
    run = trainer(max_steps=1)
    with caplog.at_level(logging.WARNING, "rlhf_lightning"):
        run.fit(module, datamodule=prompts())
    assert "iteration 1: the gradient of 'policy.lm_head.weight' holds inf; skipped, 1 so far" in caplog.text
    assert run.callback_metrics["train/nonfinite_steps"] == 1
    assert run.callback_metrics["train/grad_norm"].isfinite()


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (functools.partial(torch.optim.SGD, lr=3e38), "iteration 2: the model's logits are not finite"),
        (
            functools.partial(Overflowing, last=2),
            "weight 'policy.lm_head.weight' holds inf after 1 iterations, which no further step",
        ),
    ],
    ids=["logits", "weight"],
)
def test_ppo_ends_where_an_update_has_spoilt_a_model(
    optimizer: Any,
    message: str,
    ppo: Callable[..., PPOModule],
    prompts: Callable[..., PromptDataModule],
    trainer: MakeTrainer,
) -> None:
    module = ppo(optimizer=optimizer, ppo_epochs=1, minibatch_size=4)
    with pytest.raises(UserError, match=f"^{message}"):
        trainer(max_steps=2).fit(module, datamodule=prompts(16))

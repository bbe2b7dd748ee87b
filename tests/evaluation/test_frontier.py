import pytest
import torch

from rlhf_lightning.evaluation.best_of_n import BestOfN
from rlhf_lightning.evaluation.frontier import frontier_section
from rlhf_lightning.evaluation.generations import Generations
from rlhf_lightning.evaluation.judges import Judgement
from rlhf_lightning.evaluation.named_models import NamedModel
from rlhf_lightning.evaluation.statistics import Interval
from rlhf_lightning.evaluation.summary import ModelSummary, summarize
from rlhf_lightning.models.export import PackedModel


def summary(name: str, shift: float, kl: float) -> ModelSummary:
    return summarize(answers(name, shift, kl), answers("base", 0.0, 0.0))


def answers(name: str, shift: float, kl: float) -> Generations:
    return Generations(
        name=name,
        path=name,
        responses=["a b", "c d", "e f"],
        lengths=torch.tensor([2, 2, 2]),
        finished=torch.ones(3).bool(),
        kl=torch.full((3,), kl, dtype=torch.float64),
        judgement=Judgement(torch.tensor([0.0, 1.0, 2.0]) + shift, {}, {}),
        repetition=torch.zeros(3),
    )


def checkpoint(line: str, step: int) -> NamedModel:
    packed = PackedModel(path=None, step=step, class_name="", files={}, weights={}, adapters={})  # type: ignore[arg-type]
    return NamedModel(f"{line} step {step}", "x.ckpt", packed, line)


MODELS = [NamedModel("base", "base"), checkpoint("ppo", 10), checkpoint("ppo", 20), checkpoint("ppo", 30)]
BASE = answers("base", 0.0, 0.0)
SUMMARIES = [
    summarize(BASE, BASE),
    *(summary(f"ppo step {step}", shift, kl) for step, shift, kl in ((10, 1.0, 1.0), (20, 3.0, 4.0), (30, 4.0, 16.0))),
]
BEST = [BestOfN(4, 0.64, Interval(1.8, 1.6, 2.0), Interval(0.8, 0.6, 1.0), Interval(0.7, 0.6, 0.8), {})]


def test_gains_by_hand() -> None:
    section = frontier_section(MODELS, SUMMARIES, "base", BEST)
    assert section is not None
    assert section.columns == ["base", "ppo step 10", "ppo step 20", "ppo step 30", "best of 4"]
    assert section.rows[0].cells == [None, 1.0, pytest.approx(1.5), pytest.approx(1.0), pytest.approx(0.8 / 0.8)]
    assert [point["step"] for point in section.data["points"]] == [None, 10, 20, 30]
    assert section.data["best_of"] == [{"n": 4, "kl": 0.64, "score": BEST[0].score}]


def test_checkpoints_of_a_run_are_one_line() -> None:
    section = frontier_section(MODELS, SUMMARIES, "base", BEST)
    assert section is not None
    (figure,) = section.figures
    for picture in (figure.wide, figure.narrow):
        assert picture.count('<path class="line"') == 4  # of the run and of best-of-n, each in the legend too
        assert picture.count(">ppo</text>") == 1
        assert ">10</text>" in picture  # the first and the last step are written beside their points
        assert ">30</text>" in picture
        assert ">20</text>" not in picture
        assert "best-of-n of base" in picture
        assert "n=4" in picture
    assert 'viewBox="0 0 340' in figure.narrow


def test_named_alone_a_model_is_a_point_of_its_own_colour() -> None:
    models = [NamedModel(name, name) for name in ("base", "dpo", "ppo")]
    found = frontier_section(models, [SUMMARIES[0], summary("dpo", 1.0, 2.0), summary("ppo", 2.0, 3.0)], "base", [])
    assert found is not None
    picture = found.figures[0].wide
    assert 'class="line"' not in picture
    assert all(f'<g class="s{color}">' in picture for color in (0, 1, 2))


def test_a_kl_below_nothing_has_no_root() -> None:
    models = [NamedModel("base", "base"), NamedModel("ppo", "ppo")]
    found = frontier_section(models, [SUMMARIES[0], summary("ppo", 1.0, -0.5)], "base", [])
    assert found is not None
    assert found.rows[0].cells == [None, None]


def test_without_a_reward_or_anything_beside_the_base_there_is_no_frontier() -> None:
    unscored = [summarize(Generations(**{**vars(BASE), "judgement": Judgement(None, {}, {})}), BASE)] * 2
    assert frontier_section(MODELS[:2], unscored, "base", []) is None
    assert frontier_section(MODELS[:1], SUMMARIES[:1], "base", []) is None
    assert frontier_section(MODELS[:1], SUMMARIES[:1], "base", BEST) is not None

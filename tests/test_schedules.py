import math
import pickle
from pathlib import Path

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.schedules import ConstantWithWarmup, CosineDecay, LinearDecay, WarmupSchedule


def make_optimizer(*peaks: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": peak} for peak in peaks or (1.0,)])


def run(schedule: WarmupSchedule, steps: int) -> list[float]:
    """Return the learning rate that each of the steps used."""
    used = []
    for _ in range(steps):
        used.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return used


def test_linear_decay_by_hand() -> None:
    # 2 warmup steps at 1/3 and 2/3, then 4 steps from 1 down by quarters; zero only after the last.
    schedule = LinearDecay(make_optimizer(), warmup=2, total_steps=6)
    assert run(schedule, 6) == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])
    assert schedule.get_last_lr() == [0.0]


def test_cosine_decay_by_hand() -> None:
    # left = 1, 3/4, 1/2, 1/4 : (1 - cos(pi * left)) / 2 = 1, (1 + sqrt(1/2)) / 2, 1/2, (1 - sqrt(1/2)) / 2.
    root = math.sqrt(0.5)
    schedule = CosineDecay(make_optimizer(), total_steps=4)
    assert run(schedule, 4) == pytest.approx([1, (1 + root) / 2, 0.5, (1 - root) / 2])


def test_the_floor_is_what_is_left_and_stays() -> None:
    schedule = LinearDecay(make_optimizer(2.0), total_steps=2, floor=0.25)
    assert run(schedule, 4) == pytest.approx([2.0, 1.25, 0.5, 0.5])


def test_a_share_of_warmup_is_rounded_up() -> None:
    schedule = ConstantWithWarmup(make_optimizer(), warmup=0.3, total_steps=5)  # 1.5 -> 2 steps
    assert run(schedule, 5) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])


def test_the_total_may_come_later_and_sets_the_first_rate() -> None:
    schedule = LinearDecay(make_optimizer(3.0, 6.0), warmup=0.5)
    schedule.set_total_steps(4)
    assert [group["lr"] for group in schedule.optimizer.param_groups] == pytest.approx([1.0, 2.0])
    assert run(schedule, 4) == pytest.approx([1.0, 2.0, 3.0, 1.5])


def test_without_a_total_the_first_step_says_so() -> None:
    schedule = CosineDecay(make_optimizer())
    schedule.optimizer.step()
    with pytest.raises(UserError, match=r"CosineDecay: the number of steps is unknown; .*set_total_steps"):
        schedule.step()


def test_an_endless_run_suits_a_constant_rate_only() -> None:
    schedule = ConstantWithWarmup(make_optimizer(), warmup=1)
    schedule.set_total_steps(math.inf)
    assert run(schedule, 3) == [0.5, 1.0, 1.0]
    with pytest.raises(UserError, match="no known end"):
        LinearDecay(make_optimizer()).set_total_steps(math.inf)
    with pytest.raises(UserError, match="no known end"):
        ConstantWithWarmup(make_optimizer(), warmup=0.1).set_total_steps(math.inf)


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"warmup is -1"):
        LinearDecay(make_optimizer(), warmup=-1)
    with pytest.raises(UserError, match=r"warmup is 1\.5"):
        LinearDecay(make_optimizer(), warmup=1.5)
    with pytest.raises(UserError, match=r"floor is 2"):
        LinearDecay(make_optimizer(), floor=2)
    with pytest.raises(UserError, match=r"warmup is 10 steps but the run has only 4"):
        LinearDecay(make_optimizer(), warmup=10, total_steps=4)


@pytest.mark.parametrize("cls", [LinearDecay, CosineDecay, ConstantWithWarmup])
def test_a_resumed_schedule_goes_on_bit_for_bit(cls: type[WarmupSchedule], tmp_path: Path) -> None:
    whole = run(cls(make_optimizer(0.3), warmup=0.2, total_steps=10), 10)
    first = cls(make_optimizer(0.3), warmup=0.2, total_steps=10)
    begun = run(first, 4)
    torch.save([first.state_dict(), first.optimizer.state_dict()], tmp_path / "state.pt")
    state, optimizer_state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = cls(make_optimizer(0.3), warmup=0.2)
    second.optimizer.load_state_dict(optimizer_state)
    second.load_state_dict(state)
    second.set_total_steps(10)
    assert begun + run(second, 6) == whole


def test_the_state_is_plain_and_leaves_the_length_to_the_config() -> None:
    schedule = LinearDecay(make_optimizer(), total_steps=10)
    run(schedule, 5)
    state = pickle.loads(pickle.dumps(schedule.state_dict()))
    assert state == {"last_epoch": 5, "_step_count": 6, "base_lrs": [1.0], "_last_lr": [0.5]}
    longer = LinearDecay(make_optimizer(), total_steps=20)
    longer.load_state_dict(state)
    assert longer.optimizer.param_groups[0]["lr"] == 0.75


def test_a_learning_rate_kept_in_a_tensor_is_changed_in_place() -> None:
    rate = torch.tensor(1.0)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=rate, foreach=False, capturable=False)
    schedule = LinearDecay(optimizer, warmup=0.5)
    schedule.set_total_steps(2)
    assert optimizer.param_groups[0]["lr"].item() == 0.5

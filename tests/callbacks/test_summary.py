"""What a run trains, in a line."""

from torch import nn

from rlhf_lightning.callbacks.summary import parameter_line


def test_shared_and_partly_trained_parameters_are_told() -> None:
    policy = nn.Linear(10, 9)  # 99
    critic = nn.Sequential(policy, nn.Linear(9, 1))  # its own: 10
    adapted = nn.Sequential(nn.Linear(999, 1).requires_grad_(False), nn.Linear(4, 1))  # 1000 and 5
    module = nn.ModuleDict({"policy": policy, "critic": critic, "adapted": adapted, "metric": nn.Identity()})
    expected = "policy 99 parameters, trained; critic 10, trained; adapted 1 k, 5 of them trained"
    assert parameter_line(module) == expected
    frozen = "policy 99 parameters, frozen; critic 10, frozen; adapted 1 k, frozen"
    assert parameter_line(module.requires_grad_(False)) == frozen


def test_a_module_without_parameters_says_so() -> None:
    assert parameter_line(nn.ModuleDict({"metric": nn.Identity()})) == "no parameters"

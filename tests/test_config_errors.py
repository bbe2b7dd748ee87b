from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from rlhf_lightning.config_errors import OneLineErrors


class Penalty:
    pass


class FixedPenalty(Penalty):
    def __init__(self, coef: float = 0.1, estimator: Literal["k1", "k3"] = "k1") -> None:
        self.coef, self.estimator = coef, estimator


class AdaptivePenalty(Penalty):
    def __init__(self, target: float) -> None:
        self.target = target


class Stepper:
    def __init__(self, parameter: int, rate: float = 0.1) -> None:
        self.parameter, self.rate = parameter, rate


def make_stepper(parameter: int) -> Stepper:
    return Stepper(parameter)


@dataclass
class Drawing:
    temperature: float = 1.0
    stops: list[str] = field(default_factory=list)


class Base:
    pass


class Trainee(Base):
    def __init__(
        self,
        policy: str,
        penalty: Penalty | None = None,
        drawing: Drawing = Drawing(),  # noqa: B008
        epochs: int = 4,
        overlong: Literal["truncate", "drop"] = "drop",
        stepper: Callable[[int], Stepper] = make_stepper,
        limit: int | None = None,
    ) -> None:
        self.policy = policy


class OtherTrainee(Base):
    def __init__(self, model: str = "x") -> None:
        self.model = model


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the line that a wrong command line ends in; it is the only one, besides the hint."""
    parser = OneLineErrors(prog="tool", allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(Base, "model", required=True)
    parser.add_argument("--run_dir", type=str | None, default=None)
    with pytest.raises(SystemExit) as ending:
        parser.parse_args(list(argv))
    assert ending.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == ["See all keys and their meaning: tool --help"]
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


GOOD = ("--model=Trainee", "--model.policy=p")
MISTAKES = {
    "mistyped key": (
        ("--model.epoch=2",),
        "'model.epoch' is not a key of Trainee. Did you mean 'model.epochs'?",
    ),
    "mistyped nested key": (
        ("--model.penalty=FixedPenalty", "--model.penalty.coeff=1"),
        "'model.penalty.coeff' is not a key of FixedPenalty. Did you mean 'model.penalty.coef'?",
    ),
    "mistyped key of a dataclass": (
        ("--model.drawing.temprature=1",),
        "'model.drawing.temprature' is not a key of Trainee. Did you mean 'model.drawing.temperature'?",
    ),
    "mistyped key of a callable": (
        ("--model.stepper=Stepper", "--model.stepper.rat=1"),
        "'model.stepper.rat' is not a key. Did you mean 'model.stepper.rate'?",
    ),
    "mistyped option": (("--run_dirr=x",), "'run_dirr' is not a key. Did you mean 'run_dir'?"),
    "nothing near": (
        ("--model.penalty=FixedPenalty", "--model.penalty.zzz=1"),
        "'model.penalty.zzz' is not a key of FixedPenalty. Known here: coef, estimator.",
    ),
    "unknown class": (("--model=Traine",), "model: there is no class 'Traine'. Did you mean 'Trainee'?"),
    "unknown nested class": (
        ("--model.penalty=FixPenalty",),
        "model.penalty: there is no class 'FixPenalty'. Did you mean 'FixedPenalty'?",
    ),
    "class of another kind": (
        ("--model=collections.OrderedDict",),
        "model: collections.OrderedDict is not one of its classes. Known: Base, OtherTrainee, Trainee.",
    ),
    "no such module": (
        ("--model=nowhere.Trainee",),
        "model: there is no class 'nowhere.Trainee' (No module named 'nowhere'). Did you mean 'Trainee'?",
    ),
    "text for a number": (("--model.epochs=four",), "model.epochs is 'four', expected an integer"),
    "fraction for an integer": (("--model.epochs=1.5",), "model.epochs is '1.5', expected an integer"),
    "text for an optional number": (("--model.limit=all",), "model.limit is 'all', expected an integer or null"),
    "text for a nested number": (
        ("--model.penalty=FixedPenalty", "--model.penalty.coef=high"),
        "model.penalty.coef is 'high', expected a number",
    ),
    "not one of the choices": (
        ("--model.overlong=cut",),
        "model.overlong is 'cut', expected one of 'truncate', 'drop'",
    ),
    "abbreviated key of a class": (
        ("--model.polic=p",),
        "'model.polic' is not a key of Trainee. Did you mean 'model.policy'?",
    ),
    "abbreviated key of a dataclass": (
        ("--model.drawing.temp=1",),
        "'model.drawing.temp' is not a key of Trainee. Known here: stops, temperature.",
    ),
    "null for a number": (("--model.epochs=null",), "model.epochs is null, expected an integer"),
    "null for a nested number": (
        ("--model.penalty=FixedPenalty", "--model.penalty.coef=null"),
        "model.penalty.coef is null, expected a number",
    ),
    "stray word": (("fast",), "unexpected argument 'fast'; options are written as --key value"),
    "missing nested argument": (
        ("--model.penalty=AdaptivePenalty",),
        "'model.penalty.target' of AdaptivePenalty must be given: "
        "in the config, or on the command line as --model.penalty.target VALUE",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_on_the_command_line_takes_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, line = MISTAKES[name]
    assert refusal(capsys, *GOOD, *wrong) == line


def test_missing_argument_is_named_with_its_class(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "--model=Trainee")
    assert line.startswith("'model.policy' of Trainee must be given")


CONFIGS = {
    "mistyped nested key": (
        "model: {class_path: Trainee, init_args: {policy: p, penalty: {class_path: FixedPenalty, "
        "init_args: {coeff: 1}}}}",
        "'model.penalty.coeff' is not a key of FixedPenalty. Did you mean 'model.penalty.coef'?",
    ),
    "mistyped class": (
        "model: {class_path: Traine, init_args: {policy: p}}",
        "model: there is no class 'Traine'. Did you mean 'Trainee'?",
    ),
    "mistyped top key": (
        "modell: {class_path: Trainee, init_args: {policy: p}}",
        "'modell' is not a key. Did you mean 'model'?",
    ),
    "mistyped init_args": (
        "model: {class_path: Trainee, init_arg: {policy: p}}",
        "Did you mean 'init_args'?",
    ),
    "mistyped class_path": (
        "model: {class_path: Trainee, init_args: {policy: p, penalty: {class_pth: FixedPenalty, init_args: {}}}}",
        "'model.penalty.class_pth' is not a key. Did you mean 'class_path'?",
    ),
    "no class_path": (
        "model: {class_path: Trainee, init_args: {policy: p, penalty: [1]}}",
        "model.penalty must name a class by class_path, with its arguments under init_args. "
        "Known: AdaptivePenalty, FixedPenalty, Penalty.",
    ),
    "arguments beside class_path": (
        "model: {class_path: Trainee, init_args: {policy: p, penalty: {class_path: FixedPenalty, coef: 1}}}",
        "model.penalty has arguments beside class_path; write them under init_args",
    ),
    "null for a number": (
        "model: {class_path: Trainee, init_args: {policy: p, epochs: null}}",
        "model.epochs is null, expected an integer",
    ),
    "wrong value": (
        "model: {class_path: Trainee, init_args: {policy: p, epochs: [1]}}",
        "model.epochs is '[1]', expected an integer",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_mistake_in_a_config_takes_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, line = CONFIGS[name]
    (tmp_path / "run.yaml").write_text(text)
    assert line in refusal(capsys, f"--config={tmp_path / 'run.yaml'}")


def test_broken_yaml_is_named_with_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "run.yaml"
    broken.write_text("model:\n  class_path: Trainee\n init_args: {}\n")
    assert refusal(capsys, "--config", str(broken)).startswith(f"{broken}, line 3, column 2: not valid YAML: ")


def test_missing_config_names_the_nearest_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "reward.yaml").write_text("")
    line = refusal(capsys, "--config", str(tmp_path / "rewrd.yaml"))
    assert line == f"no file {tmp_path / 'rewrd.yaml'}. Did you mean 'reward.yaml'?"


def test_config_that_is_no_text_or_no_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe")
    line = refusal(capsys, "--config", str(tmp_path / "run.yaml"))
    assert line == f"{tmp_path / 'run.yaml'} is not UTF-8 text (byte 0)"
    line = refusal(capsys, "--config", str(tmp_path))
    assert line == f"{tmp_path} is a folder, where a YAML file was expected"


def test_empty_config_is_said_to_be_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert "empty or not a mapping" in refusal(capsys, "--config", str(tmp_path / "empty.yaml"))


def test_right_arguments_pass() -> None:
    parser = OneLineErrors(prog="tool")
    parser.add_subclass_arguments(Base, "model", required=True)
    built = parser.instantiate(parser.parse_args(list(GOOD)))
    assert built.model.policy == "p"

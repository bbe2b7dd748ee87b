"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI on our modules, with a run folder and short errors."""

import importlib
import logging
import os
import pickle
import pkgutil
import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from rlhf_lightning.checkpoint_files import read_head
from rlhf_lightning.config_errors import OneLineErrors, refusal_of_constructor
from rlhf_lightning.distributed import leave_group
from rlhf_lightning.errors import UserError
from rlhf_lightning.modules.base import ModelModule
from rlhf_lightning.run_folder import (
    SaveRunConfig,
    StartedRun,
    as_list,
    claim_run_dir,
    run_callbacks,
    run_loggers,
    set_aside_logs,
)
from rlhf_lightning.taking_up import (
    default_checkpoint,
    next_logged_step,
    refuse_to_take_up,
    resolve_checkpoint,
    run_of_checkpoint,
)

logger = logging.getLogger("rlhf_lightning")

_NAMED_IN_CONFIGS = ("algorithm", "callbacks", "data", "modules", "rollout")


def import_named_classes() -> None:
    """Import every file whose classes a config may name; short names are looked up among what is imported."""
    importlib.import_module("rlhf_lightning.schedules")
    for folder in _NAMED_IN_CONFIGS:
        package = importlib.import_module(f"rlhf_lightning.{folder}")
        for file in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{file.name}")


class TrainerParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser with errors of one line."""


class _Checked(Exception):  # noqa: N818 - a way out of LightningCLI's constructor, not an error
    """Ends :class:`TrainerCLI` once the arguments are known to be right."""

    def __init__(self, settings: Namespace, objects: Namespace) -> None:
        super().__init__()
        self.settings, self.objects = settings, objects


class TrainerCLI(LightningCLI):
    """The commands of the Trainer, on any :class:`ModelModule` and any LightningDataModule.

    What differs from LightningCLI: a run has one folder (``--run_dir``) which also gets the loggers and callbacks that
    the user has not named; a checkpoint's hyperparameters never override the config; ``--ckpt_path auto`` takes up
    the last checkpoint of the run folder; an epoch is the default length; errors take one line.

    Args:
        args: The command line without the program's name.
        check_only: Check the arguments, also by the constructors of module and data, and run nothing.
    """

    def __init__(self, args: ArgsType, *, check_only: bool = False) -> None:
        self.check_only = check_only
        self._started: StartedRun | None = None
        self._next_step: int | None = None  # to be logged, where a checkpoint tells
        import_named_classes()
        super().__init__(
            ModelModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveRunConfig,
            seed_everything_default=42,
            trainer_defaults={"log_every_n_steps": 1, "num_sanity_val_steps": 0},
            parser_class=TrainerParser,
            parser_kwargs={"prog": "rlhf-lightning", "allow_abbrev": False},
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what belongs to a run and to no class of it."""
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of this run: config, checkpoints, TensorBoard events, metrics.jsonl, samples.jsonl, model. "
            "Default: the first free one of runs/<module>-1, runs/<module>-2, ...",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments given from Python, whatever ``sys.argv`` holds."""
        self.config = parser.parse_args(args) if isinstance(args, list) else parser.parse_object(args)

    def _parse_ckpt_path(self) -> None:
        """Leave the config as it is: a checkpoint brings weights and state, never settings."""

    @property
    def settings(self) -> Namespace:
        """The parsed config of the chosen command."""
        return self.config[self.subcommand]

    def _set_seed(self) -> None:
        if not self.check_only:
            super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Settle run folder and checkpoint before anything is loaded."""
        if self.check_only:
            return
        if self.settings.run_dir is None:
            self.settings.run_dir = self.settings.trainer.default_root_dir
        run_dir, fits = self.settings.run_dir, self.subcommand == "fit" and not self.settings.trainer.fast_dev_run
        named = self.settings.ckpt_path or (default_checkpoint(run_dir) if fits else None)
        checkpoint = self.settings.ckpt_path = resolve_checkpoint(named, run_dir)
        if fits and checkpoint is not None:
            head = read_head(Path(checkpoint))
            refuse_to_take_up(checkpoint, head, self.settings.model.class_path, self.settings.trainer.max_steps)
            self._next_step = next_logged_step(head)

    def instantiate_classes(self) -> None:
        """Build module, data and Trainer; what a constructor refuses is the user's to put right."""
        try:
            if self.check_only:
                objects = self.parser.instantiate(self.config)
                raise _Checked(self.settings, objects[self.subcommand])
            super().instantiate_classes()
        except (ValueError, TypeError) as failure:
            refusal = refusal_of_constructor(failure)
            if refusal is None:
                raise
            raise UserError(str(refusal)) from failure

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer around the run folder; what the user set stays, what he left open is filled in."""
        settings = dict(self._get(self.config_init, "trainer"))
        _refuse_automatic_optimization(self.model, settings)
        if settings["max_epochs"] is None and settings["max_steps"] == -1 and settings["max_time"] is None:
            kwargs.setdefault("max_epochs", 1)
        if not settings["barebones"]:
            own = run_callbacks(str(self.subcommand), settings)
            kwargs.setdefault("callbacks", [*as_list(settings["callbacks"]), *own])
        if not settings["barebones"] and not settings["fast_dev_run"]:
            kwargs.update(self._claim_folder(settings["logger"]))
        try:
            return super().instantiate_trainer(**kwargs)
        except Exception as failure:
            self._take_back()
            if isinstance(failure, ImportError):  # An accelerator or a plugin of a package that is not there.
                raise UserError(f"trainer: {' '.join(str(failure).split())}") from failure
            raise

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if arguments.get("weights_only", False) is None:
            arguments["weights_only"] = True  # All we write loads so; anything else may run code.
        if arguments.get("return_predictions", False) is None:
            arguments["return_predictions"] = False  # They go into a file as they come, and nobody waits for them here.
        return arguments

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; what the user has to put right before anything was done leaves no run folder behind."""
        try:
            super()._run_subcommand(subcommand)
        except (UserError, MisconfigurationException, pickle.UnpicklingError):
            self._take_back()
            raise

    def _claim_folder(self, chosen_logger: Any) -> dict[str, Any]:
        command, checkpoint, given = str(self.subcommand), self.settings.ckpt_path, self.settings.run_dir
        home = None if command == "fit" else run_of_checkpoint(checkpoint)
        name = _run_name(type(self.model).__name__, command) if home is None else command
        root = home or Path("runs")
        self._started = StartedRun(Path(given or root))
        run_dir = claim_run_dir(given, name, root=root)
        self.settings.run_dir = str(run_dir)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            logger.info("run folder: %s", run_dir)
            if command == "fit" and checkpoint is None:
                set_aside_logs(run_dir)
        self._started.enter(run_dir)
        loggers = run_loggers(run_dir, self._next_step) if chosen_logger in (None, True) else chosen_logger
        return {"default_root_dir": str(run_dir), "logger": loggers}

    def _take_back(self) -> None:
        if self._started is not None and os.environ.get("LOCAL_RANK", "0") == "0":
            self._started.take_back()


def _run_name(module: str, command: str) -> str:
    """Return what a run is called: ``ppo`` for the training of a PPOModule, ``ppo-test`` for its test."""
    name = module.removesuffix("Module").lower() or "run"
    return name if command == "fit" else f"{name}-{command}"


def check_command(argv: list[str]) -> Namespace:
    """Check the command line of ``fit``, ``validate``, ``test`` or ``predict`` without loading or running anything.

    Returns:
        The command's settings.

    Raises:
        UserError: If a constructor of the module, the data or a part of them refuses its arguments.
        SystemExit: With status 2 after one line on stderr, where the parser refuses one.
    """
    return _check(argv).settings


def checked_objects(argv: list[str]) -> tuple[Namespace, Any, Any]:
    """Check a command line as :func:`check_command` does.

    Returns:
        The settings, the module and the data module; their models and rows are not loaded.
    """
    checked = _check(argv)
    return checked.settings, checked.objects.model, checked.objects.data


def _check(argv: list[str]) -> _Checked:
    try:
        TrainerCLI(argv, check_only=True)
    except _Checked as checked:
        return checked
    raise AssertionError("a command line that was to be checked was run")


def needs_processes(settings: Namespace) -> bool:
    """Return whether a run with these settings starts further processes, each with the whole command line again."""
    trainer = settings.trainer
    if str(trainer.devices) in ("auto", "-1"):
        many = trainer.accelerator != "cpu" and torch.cuda.device_count() > 1
    elif isinstance(trainer.devices, list) or "," in str(trainer.devices):
        many = len([index for index in str(trainer.devices).split(",") if index.strip()]) > 1
    else:
        many = str(trainer.devices).isdecimal() and int(trainer.devices) > 1
    return bool(many or trainer.num_nodes > 1)


def run_command(argv: list[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` with the command line's arguments.

    Raises:
        UserError: If something that the user gave cannot work.
        SystemExit: From the parser: with status 0 after ``--help`` and ``--print_config``, 2 after a wrong argument.
    """
    _calm_third_parties()
    try:
        TrainerCLI(argv)
    except MisconfigurationException as refusal:
        raise UserError(" ".join(str(refusal).split())) from refusal
    except pickle.UnpicklingError as refusal:
        raise UserError(
            "the checkpoint holds Python objects, which could run code when loaded; --weights_only false loads it all "
            "the same, if you trust where it comes from."
        ) from refusal
    finally:
        leave_group()


def _refuse_automatic_optimization(module: ModelModule, settings: dict[str, Any]) -> None:
    """Name a module's own knob where the Trainer's cannot reach its optimization."""
    for name, off, own in (
        ("gradient_clip_val", None, "max_grad_norm"),
        ("accumulate_grad_batches", 1, "max_tokens_per_microbatch"),
    ):
        if settings[name] not in (off, 0) and not module.automatic_optimization and hasattr(module, own):
            raise UserError(
                f"trainer.{name} is {settings[name]:g}, but {type(module).__name__} optimizes by itself; set "
                f"model.{own} instead."
            )


class _WithoutAdvertisements(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(("💡 Tip", "TPU available", "Trainer already configured"))


def _calm_third_parties() -> None:
    """Keep what is no news to a user off the terminal; our own lines, and warnings that matter, stay."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.connectors.accelerator_connector"):
        logging.getLogger(name).filters = [_WithoutAdvertisements()]
    for message in (
        ".*does not have many workers.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*Found .* module\\(s\\) in eval mode.*",
        ".*Total length of `list` across ranks is zero.*",
        ".*Couldn't infer the batch indices.*",
    ):
        warnings.filterwarnings("ignore", message=message)

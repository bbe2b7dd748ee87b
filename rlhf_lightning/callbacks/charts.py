"""TensorBoard's overview: the handful of charts that one watches, and the hyperparameters."""

import re
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

Charts = dict[str, list[str]]

#: The charts of each module, by class name: title -> the names that share its axes.
CHARTS: dict[str, Charts] = {
    "PPOModule": {
        "score (up)": ["rollout/score", "val/score"],
        "KL to the reference, nats a response": ["rollout/kl", "val/kl"],
        "response length, tokens": ["rollout/response_length", "val/response_length"],
        "finished responses, share": ["rollout/finished_fraction", "val/finished_fraction"],
        "policy and value loss": ["train/policy_loss", "train/value_loss"],
        "size of the update": ["train/approx_kl", "train/clip_fraction"],
        "explained variance of the values (up to 1)": ["train/explained_variance"],
        "entropy, nats a token": ["train/entropy"],
        "gradient norm": ["train/grad_norm"],
        "speed, tokens a second": ["time/tokens_per_s"],
    },
    "RewardModule": {
        "loss (down from 0.69)": ["train/loss", "val/loss"],
        "accuracy (up from 0.5)": ["train/accuracy", "val/accuracy"],
        "margin, chosen minus rejected": ["train/margin", "val/margin_mean"],
        "spread of the margins": ["val/margin_q05", "val/margin_median", "val/margin_q95"],
    },
    "DPOModule": {
        "loss (down from 0.69)": ["train/loss", "val/loss"],
        "accuracy (up from 0.5)": ["train/accuracy", "val/accuracy"],
        "margin of the implied rewards": ["train/margin", "val/margin_mean"],
        "implied rewards of both sides": ["train/reward_chosen", "train/reward_rejected"],
        "log-probability of the chosen side, nats (falling far: too much)": ["train/logprob_chosen"],
    },
    "KTOModule": {
        "loss (down from half the weight)": ["train/loss", "val/loss"],
        "implied rewards by label": ["train/reward_desirable", "train/reward_undesirable"],
        "margin of the implied rewards": ["val/margin"],
        "reference point, nats a response": ["train/kl", "val/kl"],
        "log-probability of good responses, nats": ["train/logprob_desirable"],
    },
    "SFTModule": {
        "loss, nats a token (down)": ["train/loss", "val/loss"],
        "perplexity a token": ["val/perplexity"],
        "learning rate": ["train/lr"],
    },
}
#: The values that stand beside the hyperparameters, when runs are compared.
RESULTS: dict[str, list[str]] = {
    "PPOModule": ["rollout/score", "rollout/kl", "val/score"],
    "RewardModule": ["val/accuracy", "val/loss"],
    "DPOModule": ["val/accuracy", "val/margin_mean", "val/loss"],
    "KTOModule": ["val/margin", "val/loss"],
    "SFTModule": ["val/loss", "val/perplexity"],
}


def layout(charts: Charts) -> dict[str, dict[str, list[Any]]]:
    """Return what TensorBoard's custom-scalars page is laid out by.

    It reads the names as regular expressions that match from the left; here each means itself alone.

    Example:
        >>> layout({"loss": ["train/loss", "val/loss"]})
        {'watch': {'loss': ['Multiline', ['train/loss$', 'val/loss$']]}}
    """
    return {
        "watch": {title: ["Multiline", [f"{re.escape(name)}$" for name in names]] for title, names in charts.items()}
    }


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Turn nested settings into one level of numbers and texts.

    Example:
        >>> flatten({"kl": {"class_path": "FixedKL", "init_args": {"coef": 0.05}}, "critic": None, "_class_path": "x"})
        {'kl/class_path': 'FixedKL', 'kl/init_args/coef': 0.05, 'critic': 'None'}
    """
    flat: dict[str, bool | int | float | str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if str(key).startswith("_"):
            continue
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}/"))
        else:
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


class ChartLayout(pl.Callback):
    """Lays out TensorBoard's "Custom Scalars" page, and fills its "HParams" page.

    The pages are written once, when a run begins, and only if the run has a ``TensorBoardLogger``. Give that logger
    ``default_hp_metric=False``: otherwise it adds a meaningless ``hp_metric`` of -1 by itself.

    Args:
        charts: Title of each chart, and the logged names that share its axes; ``None`` takes the ones made for
            the module's class, or for the one that it inherits from.
        results: Logged names to be shown beside the hyperparameters; ``None`` takes the ones made for the module.
    """

    def __init__(self, charts: dict[str, list[str]] | None = None, results: list[str] | None = None) -> None:
        self.charts = charts
        self.results = results

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write both pages."""
        names = [cls.__name__ for cls in type(pl_module).__mro__]
        charts = self.charts or next((CHARTS[name] for name in names if name in CHARTS), None)
        results = self.results or next((RESULTS[name] for name in names if name in RESULTS), [])
        settings = {**_hyperparameters(pl_module), **_hyperparameters(getattr(trainer, "datamodule", None))}
        for writer in _writers(trainer):
            if charts:
                writer.add_custom_scalars(layout(charts))
            if settings:
                _write_hyperparameters(writer, settings, results, stage="start")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mark the run as finished on the "HParams" page."""
        for writer in _writers(trainer):
            _write_hyperparameters(writer, {}, [], stage="end")


def _hyperparameters(owner: Any) -> dict[str, bool | int | float | str]:
    """Return what a module or data module saved by ``save_hyperparameters``."""
    return flatten(getattr(owner, "hparams_initial", None) or {})


def _writers(trainer: pl.Trainer) -> list[Any]:
    """Return TensorBoard's writers; none outside the first process."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]


def _write_hyperparameters(writer: Any, settings: dict[str, Any], results: list[str], *, stage: str) -> None:
    """Write the start or the end of a session for the "HParams" page.

    Only the names of the results are written: the page reads their values from the curves. ``add_hparams`` of torch and
    ``log_hyperparams`` of Lightning would put a made-up first value into every curve.
    """
    from torch.utils.tensorboard.summary import hparams

    experiment, start, end = hparams(settings, dict.fromkeys(results, 0.0))
    file_writer = writer._get_file_writer()
    for summary in (experiment, start) if stage == "start" else (end,):
        file_writer.add_summary(summary)
    writer.flush()

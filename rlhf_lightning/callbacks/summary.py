"""What is trained, in a line."""

import logging
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelSummary

logger = logging.getLogger("rlhf_lightning")


def parameter_line(module: Any) -> str:
    """Name the parts of a module that have parameters, with their number and whether they are trained.

    Parameters that two parts share are counted in the first.

    Example:
        >>> import torch
        >>> module = torch.nn.ModuleDict({"policy": torch.nn.Linear(4, 2), "loss": torch.nn.MSELoss()})
        >>> module["reference"] = torch.nn.Linear(400, 20).requires_grad_(False)
        >>> parameter_line(module)
        'policy 10 parameters, trained; reference 8.02 k, frozen'
    """
    counted: set[int] = set()
    parts: list[str] = []
    for name, part in module.named_children():
        own = [p for p in part.parameters() if id(p) not in counted]
        counted |= {id(p) for p in own}
        if own:
            size = short_number(sum(p.numel() for p in own))
            trained = sum(p.numel() for p in own if p.requires_grad)
            state = "trained" if all(p.requires_grad for p in own) else "frozen"
            if trained and state == "frozen":
                state = f"{short_number(trained)} of them trained"
            parts.append(f"{name} {size}{'' if parts else ' parameters'}, {state}")
    return "; ".join(parts) or "no parameters"


def short_number(number: int) -> str:
    """Write a whole number in three digits.

    Example:
        >>> short_number(999), short_number(1500), short_number(134_515_008), short_number(2_000_000_000)
        ('999', '1.5 k', '135 M', '2 G')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{float(f'{number / size:.3g}'):g} {letter}"
    return str(number)


class ModelLine(ModelSummary):
    """Says in one line what a run trains: the parts that have parameters, how many, trained or frozen.

    It takes the place of Lightning's table, which also counts metrics, modes and operations that a language model never
    reports; name ``ModelSummary`` or ``RichModelSummary`` among the callbacks to have that instead.
    """

    def __init__(self) -> None:
        super().__init__(max_depth=1)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say it."""
        if trainer.is_global_zero:
            logger.info("models: %s", parameter_line(pl_module))

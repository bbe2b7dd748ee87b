"""What a module checks of its data before weights are loaded."""

from typing import TYPE_CHECKING, Any

from rlhf_lightning.data.base import RowsDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import context_length

if TYPE_CHECKING:
    from rlhf_lightning.modules.base import ModelModule


def check_data(module: "ModelModule", data: object) -> None:
    """Refuse data of the wrong kind, with margins that nobody reads, longer than the model reads, or of other tokens.

    Args:
        module: The module that is to read it.
        data: Its data module; one of the user's own is his own to check.

    Raises:
        UserError: Naming what does not fit.
    """
    if not isinstance(data, RowsDataModule):
        return
    if data.batch_type is not module.batch_type:
        raise UserError(
            f"{type(module).__name__} cannot read the batches of {type(data).__name__}; set data to {_fitting(module)}."
        )
    margin_column = getattr(data, "margin_column", None)
    if margin_column is not None and not module.uses_margins:
        raise UserError(
            f"data.margin_column is {margin_column!r}, but {type(module).__name__} takes no notice of margins; "
            "RewardModule does. Leave it out."
        )
    config, (longest, largest_id) = module.start_config(), data.extremes()
    limit, known = context_length(config), getattr(config, "vocab_size", None)
    if limit is not None and longest > limit:
        knob = "max_length" if hasattr(data, "max_length") else "max_prompt_length"
        raise UserError(
            f"the data has sequences of {longest} tokens, but model {module.model_name!r} reads at most {limit}; lower "
            f"data.{knob}."
        )
    stop_id = data.encoder.stop_id or 0
    if known is not None and max(largest_id, stop_id) >= known:
        what, wrong = ("the data has", largest_id) if largest_id >= known else ("responses end with", stop_id)
        raise UserError(
            f"{what} token {data.encoder.tokenizer.convert_ids_to_tokens(wrong)!r} (id {wrong}), but "
            f"model {module.model_name!r} knows only {known}; its tokenizer belongs to another model."
        )


def check_batch(module: "ModelModule", batch: object) -> None:
    """Refuse what a dataloader of the user's gives where it is no batch of ours.

    Raises:
        UserError: Saying which batches the module reads, and how a dataloader comes by them.
    """
    wanted = getattr(module, "batch_type", object)  # a module of the user's own may say nothing
    if not isinstance(batch, wanted):
        raise UserError(
            f"{type(module).__name__} reads batches of the class {wanted.__name__}, but the dataloader gives a "
            f"{type(batch).__name__}; give data={_fitting(module)}(...) as datamodule, or after data.setup('fit') a "
            "DataLoader(data.train_examples, batch_size=..., collate_fn=data.collate)."
        )


def _fitting(module: "ModelModule") -> str:
    """Return the names of the data modules whose batches the module reads."""
    return " or ".join(kind.__name__ for kind in _kinds() if getattr(kind, "batch_type", None) is module.batch_type)


def _kinds(of: type[RowsDataModule[Any, Any, Any]] = RowsDataModule) -> list[type[RowsDataModule[Any, Any, Any]]]:
    """Return all subclasses, theirs included."""
    return [kind for direct in of.__subclasses__() for kind in (direct, *_kinds(direct))]

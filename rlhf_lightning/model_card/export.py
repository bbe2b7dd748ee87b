"""A checkpoint out to a folder with its card."""

from pathlib import Path

from rlhf_lightning.checkpoint_files import CHECKPOINTS
from rlhf_lightning.errors import UserError
from rlhf_lightning.model_card.card import write_card
from rlhf_lightning.model_card.comparison import check_report, comparison_beside, named_comparison
from rlhf_lightning.model_card.records import records_of_checkpoint
from rlhf_lightning.models.export import export_checkpoint


def export_with_card(
    checkpoint: str | Path,
    output: str | Path,
    *,
    report: str | Path | None = None,
    report_model: str | None = None,
    repository: str | None = None,
) -> Path:
    """Write the trained model of a checkpoint as a Hugging Face folder, and its card.

    Args:
        checkpoint: A ``.ckpt`` file; what the run's folder around it has recorded goes into the card.
        output: Folder to be made; it must not hold files yet.
        report: Folder of a comparison; ``None`` looks beside the run's folder.
        report_model: What the comparison calls the model; ``None`` finds it by its weights.
        repository: Name of the repository that the folder is meant for.

    Returns:
        The folder.

    Raises:
        UserError: If one of them is not what it should be; a folder that was begun is taken away again.
    """
    checkpoint = Path(checkpoint)
    if report is not None:
        check_report(report, report_model)
    folder = export_checkpoint(checkpoint, output)
    try:
        records = records_of_checkpoint(checkpoint)
        measured = None
        if report is not None:
            measured = named_comparison(report, report_model, folder, checkpoint)
        elif checkpoint.parent.name == CHECKPOINTS:
            measured = comparison_beside(checkpoint.parent.parent, folder, checkpoint)
        name = (repository or "").rpartition("/")[2] or (folder.name if folder.name != "model" else None)
        write_card(folder, records, measured, name=name, repository=repository)
    except UserError:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        raise
    return folder

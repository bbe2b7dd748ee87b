"""What reward models minimise beside the Bradley-Terry loss of :mod:`rlhf_lightning.functional.losses`."""

from torch import Tensor


def center_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Return (s_chosen + s_rejected)² of each pair, which holds the scores around zero.

    The Bradley-Terry loss sees differences alone, so the scores' common level is free to drift; this term fixes it.

    Args:
        chosen_scores: Score of each chosen response, shape (batch,).
        rejected_scores: Score of each rejected response, shape (batch,).

    Returns:
        Shape (batch,), float32, not averaged.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> center_loss(torch.tensor([2.0, 1.0]), torch.tensor([1.0, -1.0]))
        tensor([9., 0.])

    References:
        Eisenstein et al. 2023, "Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward
        Hacking"; TRL's ``center_rewards_coefficient`` weighs it.
    """
    _check("center_loss", chosen_scores, rejected_scores)
    return (chosen_scores.float() + rejected_scores.float()) ** 2


def rating_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the squared distance of each score from its label.

    Args:
        scores: Score of each response, shape (batch,).
        labels: What each should be, shape (batch,).

    Returns:
        Shape (batch,), float32, not averaged.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> rating_loss(torch.tensor([2.0, 1.0]), torch.tensor([5.0, 1.0]))
        tensor([9., 0.])
    """
    _check("rating_loss", scores, labels)
    return (scores.float() - labels.float()) ** 2


def _check(name: str, a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{name}: shapes {tuple(a.shape)} and {tuple(b.shape)} differ; expected (batch,) of both.")

"""What direct preference optimisation minimises on a pair."""

from typing import NamedTuple

from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.preference import dpo_loss, hinge_loss, ipo_loss, robust_dpo_loss


class Pairs(NamedTuple):
    """Pairs of responses as a loss sees them.

    Attributes:
        chosen: log π - log π_ref of the chosen responses, with gradient, nats, shape (pairs,).
        rejected: Of the rejected ones.
        chosen_lengths: Tokens of the chosen responses, shape (pairs,), int64.
        rejected_lengths: Of the rejected ones.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor


class PreferenceLoss:
    """Base of the losses on preference pairs; a subclass of your own says what :meth:`loss` returns.

    Args:
        beta: What a log-ratio is multiplied by to be reported as a reward, above 0.
    """

    def __init__(self, beta: float = 0.1) -> None:
        if not beta > 0:
            raise UserError(f"{type(self).__name__}: beta is {beta}; it must be above 0.")
        self.beta = beta

    def loss(self, pairs: Pairs) -> Tensor:
        """Return the loss of each pair, shape (pairs,), float32."""
        raise NotImplementedError


class SigmoidLoss(PreferenceLoss):
    """DPO's loss, -log σ(βΔ), Δ being chosen minus rejected log-ratio.

    Args:
        beta: Price of a nat of divergence from the reference, above 0; higher keeps the policy closer to it.
        label_smoothing: Share of pairs assumed to be labelled the wrong way round, in [0, 0.5); higher keeps margins
            smaller (conservative DPO), 0 is off.

    References:
        Rafailov et al. 2023, "Direct Preference Optimization", eq. 7; Mitchell 2023, "A note on DPO with noisy
        preferences & relationship to IPO".
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__(beta)
        self.label_smoothing = _checked_smoothing(self, label_smoothing)

    def loss(self, pairs: Pairs) -> Tensor:
        """Return the loss of each pair; see :func:`~rlhf_lightning.functional.preference.dpo_loss`."""
        return dpo_loss(
            chosen_logratios=pairs.chosen,
            rejected_logratios=pairs.rejected,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )


class RobustLoss(PreferenceLoss):
    """DPO's loss made unbiased for labels of which a known share is wrong.

    Args:
        beta: Price of a nat of divergence from the reference, above 0; higher keeps the policy closer to it.
        label_smoothing: Share of pairs labelled the wrong way round, in [0, 0.5); higher makes the loss larger where
            a pair is still the wrong way round, and 0 is plain DPO.

    References:
        Chowdhury et al. 2024, "Provably Robust DPO: Aligning Language Models with Noisy Feedback".
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.1) -> None:
        super().__init__(beta)
        self.label_smoothing = _checked_smoothing(self, label_smoothing)

    def loss(self, pairs: Pairs) -> Tensor:
        """Return the loss of each pair; see :func:`~rlhf_lightning.functional.preference.robust_dpo_loss`."""
        return robust_dpo_loss(
            chosen_logratios=pairs.chosen,
            rejected_logratios=pairs.rejected,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )


class IPOLoss(PreferenceLoss):
    """IPO's loss, (Δ - 1/(2β))²: margins reach a target and stay there, however sure the preferences are.

    Args:
        beta: The paper's τ, above 0; higher wants a smaller margin.
        per_token: True divides each log-ratio by the length of its response first. TRL 1.16 does, and says that the
            authors did so in their experiments. The paper's formula and its proof are of whole responses, so that False
            is the default; a margin of 1/(2β) nats a *token* would also be a far larger one.

    References:
        Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", eq. 17.
    """

    def __init__(self, beta: float = 0.1, per_token: bool = False) -> None:
        super().__init__(beta)
        self.per_token = per_token

    def loss(self, pairs: Pairs) -> Tensor:
        """Return the loss of each pair; see :func:`~rlhf_lightning.functional.preference.ipo_loss`."""
        chosen, rejected = pairs.chosen, pairs.rejected
        if self.per_token:
            chosen, rejected = chosen / pairs.chosen_lengths, rejected / pairs.rejected_lengths
        return ipo_loss(chosen_logratios=chosen, rejected_logratios=rejected, beta=self.beta)


class HingeLoss(PreferenceLoss):
    """The hinge loss, max(0, 1 - βΔ): pairs whose margin has reached 1 teach nothing more.

    Args:
        beta: Inverse of the wanted difference of log-ratios in nats, above 0; higher wants a smaller one.

    References:
        Zhao et al. 2023, "SLiC-HF"; Liu et al. 2023, "Statistical Rejection Sampling Improves Preference Optimization".
    """

    def loss(self, pairs: Pairs) -> Tensor:
        """Return the loss of each pair; see :func:`~rlhf_lightning.functional.preference.hinge_loss`."""
        return hinge_loss(chosen_logratios=pairs.chosen, rejected_logratios=pairs.rejected, beta=self.beta)


def _checked_smoothing(loss: PreferenceLoss, label_smoothing: float) -> float:
    if not 0 <= label_smoothing < 0.5:
        raise UserError(
            f"{type(loss).__name__}: label_smoothing is {label_smoothing}; it must lie in [0, 0.5) (0 is off)."
        )
    return label_smoothing

"""Losses that learn from preferences without a reward model: DPO and its relatives on pairs, KTO on single responses.

Each takes one number a response: its *log-ratio* log π(y|x) - log π_ref(y|x), the sum over its tokens, in nats.
β times it is the reward that the policy implies (Rafailov et al. 2023, eq. 5, up to a term of the prompt alone).
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_lightning.functional.sequences import length_mask


def length_desensitised_logprobs(
    *, logprobs: Tensor, response_mask: Tensor, shared_lengths: Tensor, alpha: float = 1.0
) -> Tensor:
    """Return the log-probability of each response, tokens beyond a shared length weighted by alpha.

    Args:
        logprobs: Of each response token, nats, shape (batch, response).
        response_mask: True where a token counts, shape (batch, response), bool.
        shared_lengths: Tokens that count fully, for a pair the length of its shorter response, shape (batch,), int64.
        alpha: Weight of the tokens beyond, in [0, 1]; lower lets a response gain less by being long, 1 is off: the
            plain log-probability.

    Returns:
        Shape (batch,), float32, nats.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> length_desensitised_logprobs(
        ...     logprobs=torch.tensor([[-1.0, -2.0, -4.0]]),
        ...     response_mask=torch.ones(1, 3).bool(),
        ...     shared_lengths=torch.tensor([2]),
        ...     alpha=0.5,
        ... )
        tensor([-5.])

    References:
        Liu et al. 2024, "Length Desensitization in Direct Preference Optimization" (LD-DPO). The reference is weighted
        alike, so that the log-ratio of equal models is 0; so does TRL 1.16 (``ld_alpha``).
    """
    if logprobs.shape != response_mask.shape or shared_lengths.shape != logprobs.shape[:1]:
        msg = (
            f"length_desensitised_logprobs: logprobs has shape {tuple(logprobs.shape)}, response_mask "
            f"{tuple(response_mask.shape)} and shared_lengths {tuple(shared_lengths.shape)}; expected "
            "(batch, response), the same, and (batch,)."
        )
        raise ValueError(msg)
    shared = length_mask(shared_lengths, logprobs.shape[1])
    kept = torch.where(response_mask, logprobs.float(), 0.0)
    return torch.where(shared, kept, alpha * kept).sum(dim=1)


def dpo_loss(
    *, chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """Return -(1 - ε) log σ(βΔ) - ε log σ(-βΔ) of each pair, Δ being chosen minus rejected log-ratio.

    Args:
        chosen_logratios: Nats, shape (pairs,).
        rejected_logratios: Nats, shape (pairs,).
        beta: Price of a nat of divergence from the reference in units of the implied reward, above 0; higher keeps the
            policy closer to it.
        label_smoothing: ε in [0, 0.5), the share of pairs assumed to be labelled the wrong way round; the margin then
            stops growing at log((1 - ε)/ε). 0 is off: plain DPO.

    Returns:
        Shape (pairs,), float32; log 2 where both log-ratios are equal.

    Example:
        >>> dpo_loss(chosen_logratios=torch.zeros(1), rejected_logratios=torch.zeros(1))
        tensor([0.6931])

    References:
        Rafailov et al. 2023, "Direct Preference Optimization", eq. 7; the smoothing is conservative DPO, Mitchell 2023,
        "A note on DPO with noisy preferences & relationship to IPO".
    """
    margins = beta * _difference(chosen_logratios, rejected_logratios)
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)


def robust_dpo_loss(
    *, chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """Return [-(1 - ε) log σ(βΔ) + ε log σ(-βΔ)] / (1 - 2ε): where ε of the labels are wrong, DPO's loss on average.

    Args:
        chosen_logratios: Nats, shape (pairs,).
        rejected_logratios: Nats, shape (pairs,).
        beta: As in :func:`dpo_loss`.
        label_smoothing: ε in [0, 0.5), the share of pairs labelled the wrong way round; 0 is plain DPO.

    Returns:
        Shape (pairs,), float32; may be negative.

    Example:
        >>> both = {"chosen_logratios": torch.tensor([10.0]), "rejected_logratios": torch.tensor([-10.0])}
        >>> robust_dpo_loss(**both, beta=1.0, label_smoothing=0.25)
        tensor([-10.])

    References:
        Chowdhury et al. 2024, "Provably Robust DPO: Aligning Language Models with Noisy Feedback" (rDPO).
    """
    margins = beta * _difference(chosen_logratios, rejected_logratios)
    kept, flipped = -logsigmoid(margins), -logsigmoid(-margins)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo_loss(*, chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float = 0.1) -> Tensor:
    """Return (Δ - 1/(2β))² of each pair: the margin is to reach a target, not to grow for ever.

    Args:
        chosen_logratios: Nats, shape (pairs,). The paper's are those of whole responses; TRL 1.16 divides each by the
            length of its response.
        rejected_logratios: Likewise.
        beta: The paper's τ, above 0; higher wants a smaller margin.

    Returns:
        Shape (pairs,), float32, nats².

    Example:
        >>> ipo_loss(chosen_logratios=torch.tensor([3.0]), rejected_logratios=torch.tensor([0.0]), beta=0.1)
        tensor([4.])

    References:
        Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", eq. 17.
    """
    return (_difference(chosen_logratios, rejected_logratios) - 1 / (2 * beta)).square()


def hinge_loss(*, chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float = 0.1) -> Tensor:
    """Return max(0, 1 - βΔ) of each pair: pairs whose margin has reached 1 teach nothing more.

    Args:
        chosen_logratios: Nats, shape (pairs,).
        rejected_logratios: Nats, shape (pairs,).
        beta: Inverse of the wanted difference in nats, above 0; higher wants a smaller one.

    Returns:
        Shape (pairs,), float32; 1 where both log-ratios are equal.

    Example:
        >>> hinge_loss(chosen_logratios=torch.tensor([4.0]), rejected_logratios=torch.tensor([0.0]), beta=0.1)
        tensor([0.6000])

    References:
        Zhao et al. 2023, "SLiC-HF"; with log-ratios in place of log-probabilities Liu et al. 2023, "Statistical
        Rejection Sampling Improves Preference Optimization" (RSO), section 3.2.
    """
    return torch.relu(1 - beta * _difference(chosen_logratios, rejected_logratios))


def kto_reference_point(logratios: Tensor) -> Tensor:
    """Return z₀, an estimate of KL(π || π_ref): the mean log-ratio of responses to prompts of *other* rows, at least 0.

    Args:
        logratios: Of the mismatched pairs of the whole batch, nats, shape (pairs,); none gives 0.

    Returns:
        Scalar, float32, without gradient.

    Example:
        >>> kto_reference_point(torch.tensor([0.5, -0.1])), kto_reference_point(torch.tensor([-1.0]))
        (tensor(0.2000), tensor(0.))

    References:
        Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", section 4.1: biased, but of
        low cost, and it must not carry gradient.
    """
    total = logratios.detach().float().sum()
    return (total / max(1, logratios.numel())).clamp(min=0)


def kto_loss(
    *,
    logratios: Tensor,
    desirable: Tensor,
    reference_point: Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return λ_y - v of each response, v being λ_D σ(β(r - z₀)) for a good one and λ_U σ(β(z₀ - r)) for a bad one.

    Args:
        logratios: r, nats, shape (batch,).
        desirable: True for a good response, shape (batch,), bool.
        reference_point: z₀ of :func:`kto_reference_point`, a scalar.
        beta: Above 0; higher saturates sooner, so that the policy stays closer to the reference.
        desirable_weight: λ_D, at least 0.
        undesirable_weight: λ_U, at least 0; the paper wants λ_D n_D / (λ_U n_U) in [1, 3/2] for n_D good and n_U bad
            responses.

    Returns:
        Shape (batch,), float32, in [0, λ_y]; half of λ_y where the log-ratio equals the reference point.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> good = torch.tensor([True, False])
        >>> kto_loss(logratios=torch.zeros(2), desirable=good, reference_point=torch.tensor(0.0), undesirable_weight=3)
        tensor([0.5000, 1.5000])

    References:
        Ethayarajh et al. 2024, eq. 8.
    """
    if logratios.shape != desirable.shape:
        msg = f"kto_loss: logratios has shape {tuple(logratios.shape)} but desirable has {tuple(desirable.shape)}."
        raise ValueError(msg)
    gains = beta * (logratios.float() - reference_point)
    # λ(1 - σ(x)) = λ σ(-x), which loses no digits where σ(x) is near 1.
    good, bad = desirable_weight * torch.sigmoid(-gains), undesirable_weight * torch.sigmoid(gains)
    return torch.where(desirable, good, bad)


def _difference(chosen: Tensor, rejected: Tensor) -> Tensor:
    if chosen.shape != rejected.shape:
        msg = (
            f"preference loss: chosen has shape {tuple(chosen.shape)} and rejected {tuple(rejected.shape)}; both are "
            "(pairs,)."
        )
        raise ValueError(msg)
    return chosen.float() - rejected.float()

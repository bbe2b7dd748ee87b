"""What a PPO run checks of itself before time is spent on it."""

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_lightning.algorithm.critics import SeparateCritic
from rlhf_lightning.distributed import global_max, global_mean_var, world_size
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.causal_lm import response_logprobs
from rlhf_lightning.models.loading import context_length, refuse_foreign_tokens
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.rollout.collect import Rollout
from rlhf_lightning.rollout.reward_model import RewardModel
from rlhf_lightning.rollout.reward_sources import RewardSource
from rlhf_lightning.rollout.sampler import Samples

if TYPE_CHECKING:
    from rlhf_lightning.algorithm.advantages import AdvantageEstimator
    from rlhf_lightning.algorithm.experience import Experience
    from rlhf_lightning.modules.ppo import PPOModule

log = logging.getLogger("rlhf_lightning")

#: How far the first ratio may be from 1, and the first KL from 0, by precision. In float32 the two passes differ by
#: rounding alone; in bf16 one rounding of a logit near 10 is 0.03.
RATIO_TOLERANCE = {"32-true": 1e-5, "bf16-mixed": 0.2}
#: By how many nats a token the sampler's own log-probabilities may be off in the mean; its bf16 copy rounds anew.
SAMPLER_TOLERANCE = {"32-true": 1e-3, "bf16-mixed": 0.1}


def check_numbers(
    ppo_epochs: int, minibatch_size: int, max_tokens_per_microbatch: int, max_grad_norm: float | None
) -> None:
    """Refuse numbers out of range; they are the arguments of ``PPOModule``."""
    for name, value in (
        ("ppo_epochs", ppo_epochs),
        ("minibatch_size", minibatch_size),
        ("max_tokens_per_microbatch", max_tokens_per_microbatch),
    ):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")
    if max_grad_norm is not None and max_grad_norm <= 0:
        raise UserError(f"max_grad_norm is {max_grad_norm}; it must be above 0, or null for none.")


def check_configuration(module: "PPOModule") -> None:
    """Refuse settings that cannot work together.

    Raises:
        UserError: On a precision that loses updates, batch sizes that do not divide, or responses longer than the model
            can read.
    """
    precision = str(module.trainer.precision)
    if precision not in RATIO_TOLERANCE:
        raise UserError(
            f"trainer.precision is {precision}; PPO needs 32-true or bf16-mixed: in bf16 weights a step of 1e-6 "
            "rounds to nothing, and float16 needs a loss scale that manual optimization does not keep."
        )
    data = getattr(module.trainer, "datamodule", None)
    rollout_batch_size = getattr(data, "rollout_batch_size", None)
    if rollout_batch_size is not None:
        check_batch_sizes(rollout_batch_size, module.minibatch_size)
        module.kl.check_sequences(rollout_batch_size)
    max_prompt_length = getattr(data, "max_prompt_length", None)
    if max_prompt_length is not None:
        check_lengths(module, max_prompt_length)
    check_groups(module, getattr(data, "responses_per_prompt", None))
    check_tokenizers(module)
    check_critic_scale(module)
    for source in _reward_models(module.reward):
        check_scored_token(module, source)


def check_batch_sizes(rollout_batch_size: int, minibatch_size: int) -> None:
    """Refuse minibatches that do not divide the rollout, or processes that do not divide the minibatch."""
    if rollout_batch_size % minibatch_size:
        raise UserError(
            f"rollout_batch_size {rollout_batch_size} is not divisible by minibatch_size {minibatch_size}; make it a "
            "multiple, so that every optimizer step sees as many responses."
        )
    if minibatch_size % world_size():
        raise UserError(f"minibatch_size {minibatch_size} is not divisible by the {world_size()} processes.")


def check_groups(module: "PPOModule", responses_per_prompt: int | None) -> None:
    """Refuse an estimator that compares the responses to a prompt where there is only one; ``None`` is not known."""
    if module.advantages.needs_groups and responses_per_prompt is not None and responses_per_prompt < 2:
        raise UserError(
            f"{type(module.advantages).__name__} compares several responses to a prompt, but data.responses_per_prompt "
            f"is {responses_per_prompt}; make it at least 2, such as 4."
        )


def check_lengths(module: "PPOModule", max_prompt_length: int) -> None:
    """Refuse prompts and responses that together are longer than a model that is to read them can."""
    models = [("the policy", module.policy.config), ("the reference", module.reference.config)]
    critics = module.critic.modules() if module.critic is not None else ()
    models += [("the critic", part.model.config) for part in critics if isinstance(part, ScalarModel)]
    models += [(f"reward model {m.path!r}", m.scalar.model.config) for m in _reward_models(module.reward)]
    for name, config in models:
        limit, wanted = context_length(config), max_prompt_length + module.sampling.max_new_tokens
        if limit is not None and wanted > limit:
            raise UserError(
                f"data.max_prompt_length {max_prompt_length} + model.sampling.max_new_tokens "
                f"{module.sampling.max_new_tokens} = {wanted} tokens, but {name} reads at most {limit}; lower one of "
                "them."
            )


def check_critic_parts(advantages: "AdvantageEstimator", given: dict[str, object]) -> None:
    """Refuse what only a critic makes use of where the advantages need none."""
    for name, part in given.items():
        if part is not None and not advantages.needs_critic:
            raise UserError(
                f"advantages is {type(advantages).__name__}, which needs no critic, but {name} is "
                f"{type(part).__name__}; leave one of them out."
            )


def check_tokenizers(module: "PPOModule") -> None:
    """Refuse a reference or a critic of their own to which the policy's tokens mean something else."""
    names = {"reference": module.reference_name, "critic.init_from": getattr(module.critic, "init_from", None)}
    for key, name in names.items():
        if name:
            refuse_foreign_tokens(module.tokenizer, name, key=f"model.{key}")


def check_critic_scale(module: "PPOModule") -> None:
    """Say that the first values are far from the scores where a critic starts from a reward model on another scale."""
    critic, source = module.critic, module.reward
    if not isinstance(critic, SeparateCritic) or not isinstance(source, RewardModel):
        return
    if critic.init_from == source.path and critic.normalize != source.normalize:
        log.warning(
            "critic.normalize is %s, but reward.normalize is %s: the critic starts from the same reward model, and its "
            "first values are on another scale than the scores; set both alike.",
            str(critic.normalize).lower(),
            str(source.normalize).lower(),
        )


def check_scored_token(module: "PPOModule", source: RewardModel) -> None:
    """Refuse a reward model that was trained to be read at another token than the one that ends responses here.

    Where only some end otherwise, by a stop string or by another of several stop tokens, it is said.
    """
    if source.scored_token_id is None or not source.same_tokens:
        return
    if source.scored_token_id in module.stop_ids:
        others = [token_id for token_id in module.stop_ids if token_id != source.scored_token_id]
        ends = [f"at {token!r}" for token in module.tokenizer.convert_ids_to_tokens(others)]
        ends += [] if module.stop_strings is None else ["by sampling.stop_strings"]
        if ends:
            log.warning(
                "reward model %r was trained to be read at %r, but responses that end %s have no such token: it scores "
                "them at their last one, where its scores mean little.",
                source.path,
                module.tokenizer.convert_ids_to_tokens(source.scored_token_id),
                " or ".join(ends),
            )
        return
    names = module.tokenizer.convert_ids_to_tokens([source.scored_token_id, *module.stop_ids])
    raise UserError(
        f"reward model {source.path!r} was trained to be read at {names[0]!r}, but responses here end with "
        f"{' or '.join(map(repr, names[1:]))}; set sampling.stop_tokens, or stop_token of its data, alike."
    )


@torch.no_grad()
def check_first_minibatch(module: "PPOModule", rollout: Rollout, experience: "Experience") -> dict[str, Tensor]:
    """Check that before the first step the policy is what it was at rollout, and the reference what it starts from.

    Returns:
        ``check/max_ratio_error`` and ``check/approx_kl`` over the first rollout, and ``check/max_ref_kl``.

    Raises:
        UserError: If the ratio is not 1 within the tolerance of the precision.
    """
    mask = experience.response_mask
    again = torch.zeros_like(experience.old_logprobs)
    limit = module.memory.tokens

    def read(rows: Tensor) -> None:
        part = rollout.sequences.select(rows)
        with torch.enable_grad():  # the very pass of the update
            logprobs = response_logprobs(module.policy, part, temperature=module.sampling.temperature)
        again[rows, : logprobs.shape[1]] = logprobs.detach()

    plan = module.batch_plan(rollout.sequences.lengths, epoch=0)
    module.memory.each([group for minibatch in plan for group in minibatch], rollout.sequences.lengths, read)
    log_ratio = torch.where(mask, again - experience.old_logprobs, 0.0)
    gap = torch.where(mask, rollout.old_logprobs - rollout.ref_logprobs, 0.0)
    # Over all processes, so that either all of them stop or none.
    max_error, ref_kl = global_max(torch.expm1(log_ratio).abs().max()), global_max(gap.abs().max())
    approx_kl, _ = global_mean_var(torch.expm1(log_ratio) - log_ratio, mask)
    if module.memory.tokens == limit:  # else it was cut otherwise than at rollout, and rounds otherwise
        _judge(module, max_error=float(max_error), approx_kl=float(approx_kl), ref_kl=float(ref_kl))
    return {"check/max_ratio_error": max_error, "check/approx_kl": approx_kl, "check/max_ref_kl": ref_kl}


def check_sampler(module: "PPOModule", samples: Samples, rollout: Rollout) -> dict[str, Tensor]:
    """Compare what the sampler says of its tokens with what the policy says of them in one pass, and warn of a gap.

    Nothing else would show that a sampler's copy of the policy reads without its cache, or holds other weights. Tokens
    are left out whose distribution was cut on purpose: all under ``top_k`` and ``top_p``, and early ones under
    ``min_new_tokens``.

    Returns:
        ``check/sampler_gap``: the mean of their absolute difference, nats; nothing where no token is comparable.
    """
    config, mask = module.sampling, samples.tokens.new_zeros(samples.tokens.shape, dtype=torch.bool)
    if not config.top_k and config.top_p == 1:
        mask[:, config.min_new_tokens : rollout.old_logprobs.shape[1]] = True
    width = rollout.old_logprobs.shape[1]
    mask = mask[:, :width] & rollout.sequences.response_mask
    gap, _ = global_mean_var((samples.logprobs[:, :width] - rollout.old_logprobs).abs(), mask)
    if not torch.isfinite(gap):
        return {}
    tolerance = SAMPLER_TOLERANCE[str(module.trainer.precision)]
    if gap > tolerance:
        log.warning(
            "self-check: the sampler's log-probabilities differ from the policy's by %.2g nats a token (at most %g "
            "expected): %s may hold other weights, or read otherwise than the policy.",
            float(gap),
            tolerance,
            type(module.sampler).__name__,
        )
    return {"check/sampler_gap": gap}


def _judge(module: "PPOModule", *, max_error: float, approx_kl: float, ref_kl: float) -> None:
    tolerance = RATIO_TOLERANCE[str(module.trainer.precision)]
    if not max_error <= tolerance:
        raise UserError(
            f"self-check: before any step the ratio is off 1 by {max_error:.2g} (at most {tolerance:g} expected); "
            "something random or another precision is in the policy's forward pass, such as dropout."
        )
    fresh = module.counters["iterations"] == 0 and module.reference_name is None
    if fresh and not ref_kl <= tolerance:
        raise UserError(
            f"self-check: the reference is a copy of the policy, but their log-probabilities differ by {ref_kl:.2g}."
        )
    log.info(
        "self-check: max |ratio - 1| %.1e, approx_kl %.1e, max |logprob - ref_logprob| %.1e, stop tokens %s: ok",
        max_error,
        approx_kl,
        ref_kl,
        module.tokenizer.convert_ids_to_tokens(module.stop_ids),
    )


def _reward_models(source: RewardSource) -> list[RewardModel]:
    return [part for part in source.modules() if isinstance(part, RewardModel)]

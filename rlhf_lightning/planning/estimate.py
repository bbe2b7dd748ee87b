"""Memory and time of each phase of a run, part by part."""

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

from rlhf_lightning.algorithm.critics import SeparateCritic, TrunkCritic
from rlhf_lightning.data.collate import PairBatch
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.lm_head import KEEP, TILES
from rlhf_lightning.models.loading import load_config
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.modules.base import ModelModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.reference import ReferenceModule
from rlhf_lightning.modules.scoring import ScoringModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.planning.machine import Machine
from rlhf_lightning.planning.tracing import Trace, optimizer_bytes, trace
from rlhf_lightning.rollout.decoding import CachedSampler
from rlhf_lightning.rollout.reward_model import RewardModel

_HEAD_TENSORS = 3  # of a tile's logits: themselves, their exponentials or slopes, and a copy on the way
_SMALL_OPERATIONS = 15  # a layer and token step


@dataclass
class Phase:
    """One phase of an iteration.

    Attributes:
        name: Such as ``update``.
        parts: Bytes of each part.
        seconds: How long it takes.
    """

    name: str
    parts: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Setting:
    """What holds for all models of a run.

    Attributes:
        machine: Where it runs.
        mixed: True for bf16-mixed.
        processes: How many share the batch.
    """

    machine: Machine
    mixed: bool
    processes: int


@dataclass(frozen=True)
class Model:
    """A model of a run.

    Attributes:
        name: Its folder or hub name.
        trace: One pass of it.
        adapted: Whether adapters alone, and a scalar head, are trained.
    """

    name: str
    trace: Trace
    adapted: bool


def estimate(module: ModelModule, data: Any, setting: Setting) -> list[Phase]:
    """Return the phases of an iteration, or of a training step.

    Args:
        module: A module of this package, as its config describes it; its models are not loaded.
        data: Its data module, not set up.
        setting: Machine, precision and processes.

    Raises:
        UserError: If the module or the data module is of a kind that is not known here.
    """
    if isinstance(module, PPOModule) and hasattr(data, "rollout_batch_size"):
        return _iteration(module, data, setting)
    if isinstance(module, SFTModule | ScoringModule | ReferenceModule) and hasattr(data, "max_length"):
        return [_step(module, data, setting)]
    raise UserError(
        f"plan does not know {type(module).__name__} with {type(data).__name__}; it knows the modules and data modules "
        "of this package."
    )


def _iteration(module: PPOModule, data: Any, setting: Setting) -> list[Phase]:
    response = module.sampling.max_new_tokens
    length, rows = data.max_prompt_length + response, data.rollout_batch_size // setting.processes
    minibatch = max(1, module.minibatch_size // setting.processes)
    in_pass = _rows_of_a_pass(module.max_tokens_per_microbatch, minibatch, length)

    def of(name: str, scalar: bool, lora: LoRA | None = None) -> Model:
        return _model(name, load_config(name), scalar, lora, module, in_pass, length, setting)

    separate = module.critic if isinstance(module.critic, SeparateCritic) else None
    models = [of(module.model_name, False, module.lora)]
    models += [of(separate.init_from or module.model_name, True, separate.lora)] if separate else []
    trained, policy = [model.trace for model in models], models[0].trace
    read = [of(module.reference_name or module.model_name, False)]
    read += [of(part.path, True) for part in module.reward.modules() if isinstance(part, RewardModel)]
    always = _always(models, [] if module.offload_frozen else read, module, setting)
    rollout, score = Phase("rollout", dict(always)), Phase("score", _always(models, read, module, setting))
    update = Phase("update", always | _gradients(trained, setting))
    # With one process the critic's pass begins when the policy's is over.
    together = setting.processes > 1 or isinstance(module.critic, TrunkCritic)
    update.parts["activations"] = (sum if together else max)(each.kept for each in trained)
    update.parts["vocabulary head"] = _head(policy, in_pass * response, setting)
    score.parts["vocabulary head"] = _head(policy, in_pass * response, setting) / 2
    rollout.parts |= _sampling(module, policy, rows, length, setting)
    passes = rows / in_pass  # of an epoch
    head = 2.0 * rows * response * policy.embedding
    machine = setting.machine
    rollout.seconds = _decoding(policy, load_config(module.model_name), rows, response, length, setting)
    score.seconds = (passes * sum(model.trace.flops for model in (*models, *read)) + 2 * head) / machine.flops
    flops = passes * sum(_products(each, module) * each.flops for each in trained)
    flops += _head_passes(policy, in_pass * response) * head
    steps = module.ppo_epochs * rows // minibatch
    update.seconds = module.ppo_epochs * flops / machine.flops + steps * _optimizer_step(trained, setting)
    return [rollout, score, update]


def _step(module: SFTModule | ScoringModule | ReferenceModule, data: Any, setting: Setting) -> Phase:
    sides = 2 if module.batch_type is PairBatch else 1
    rows = max(1, data.batch_size // setting.processes) * sides
    in_pass = _rows_of_a_pass(module.max_tokens_per_microbatch, rows, data.max_length, sides)
    scalar = isinstance(module, ScoringModule)

    def of(name: str, config: PretrainedConfig, lora: LoRA | None = None) -> Model:
        return _model(name, config, scalar, lora, module, in_pass, data.max_length, setting)

    trained, read = of(module.model_name, module.start_config(), module.lora), list[Model]()
    leaves = getattr(module, "reference_cache", None) is not None
    if isinstance(module, ReferenceModule) and not module.reference_free and not leaves:
        name = module.reference_name or module.model_name
        read = [of(name, load_config(name))]
    model = trained.trace
    phase = Phase("step", _always([trained], read, module, setting) | _gradients([model], setting))
    phase.parts["activations"] = model.kept
    head = 0 if scalar else data.max_length
    phase.parts["vocabulary head"] = _head(model, in_pass * head, setting)
    passes = _products(model, module) * model.flops + sum(each.trace.flops for each in read)
    head_passes = _head_passes(model, in_pass * head) + len(read)
    flops = rows / in_pass * passes + 2.0 * head_passes * rows * head * model.embedding
    phase.seconds = flops / setting.machine.flops + _optimizer_step([model], setting)
    return phase


def _model(
    name: str,
    config: PretrainedConfig,
    scalar: bool,
    lora: LoRA | None,
    module: ModelModule,
    rows: int,
    length: int,
    setting: Setting,
) -> Model:
    again = module.gradient_checkpointing
    found = trace(config, scalar=scalar, rows=rows, length=length, mixed=setting.mixed, checkpointed=again, lora=lora)
    return Model(name, found, lora is not None)


def _rows_of_a_pass(budget: int, rows: int, length: int, sides: int = 1) -> int:
    """Rows of full length that go together; those of a pair are not parted."""
    return min(rows, max(1, budget // (length * sides)) * sides)


def _products(model: Trace, module: ModelModule) -> int:
    """Passes that training costs: forwards, for its inputs' slopes, for its weights', and one where it is run again."""
    return (3 if model.trained == model.parameters else 2) + module.gradient_checkpointing


def _head_passes(model: Trace, tokens: int) -> float:
    """Products of head and hidden states that training costs, the share that is computed again counted twice."""
    again = max(0.0, 1 - KEEP / max(1.0, tokens * model.embedding / model.hidden))
    return (3 if model.trained == model.parameters else 2) + again


def _always(trained: list[Model], read: list[Model], module: ModelModule, setting: Setting) -> dict[str, float]:
    numbers = sum(model.trace.trained for model in trained)
    return {
        "process": float(setting.machine.process),
        "trained weights": 4.0 * numbers,
        "optimizer state": optimizer_bytes(module.optimizer_factory) * numbers,
        "frozen weights": 4.0 * _frozen_numbers(trained, read),
    }


def _frozen_numbers(trained: list[Model], read: list[Model]) -> int:
    """Numbers of the weights that are not trained; where there are adapters, of one folder's once."""
    adapted = [model for model in trained if model.adapted]
    held = [(model.name, model.trace.parameters - model.trace.trained) for model in adapted]
    held += [(model.name, model.trace.parameters) for model in read]
    return sum(dict(held).values()) if adapted else sum(numbers for _, numbers in held)


def _gradients(trained: list[Trace], setting: Setting) -> dict[str, float]:
    """Gradients, those that a word embedding's are added up from, and what several processes exchange them in."""
    numbers = sum(each.trained for each in trained)
    largest = max(each.embedding if each.trained == each.parameters else 0 for each in trained)
    in_place = setting.processes == 1 and _device(setting) == "cpu"
    return {"gradients": 4.0 * (numbers * (2 if setting.processes > 1 else 1) + (0 if in_place else 2 * largest))}


def _head(model: Trace, tokens: int, setting: Setting) -> float:
    logits = tokens * model.embedding // model.hidden
    return 4.0 * (min(logits, KEEP) + _HEAD_TENSORS * min(logits, math.prod(TILES[_device(setting)])))


def _device(setting: Setting) -> str:
    return "cuda" if setting.machine.launch else "cpu"


def _sampling(module: PPOModule, policy: Trace, rows: int, length: int, setting: Setting) -> dict[str, float]:
    config: Any = load_config(module.model_name)
    size = 2.0 if setting.mixed else 4.0
    copy = size * policy.parameters if setting.mixed else 0.0
    sampler = module.sampler
    if _device(setting) == "cpu" and not setting.mixed and isinstance(sampler, CachedSampler) and sampler.pack_weights:
        copy = 4.0 * policy.linear + 4.0 * policy.embedding
    at_once = min(rows, getattr(sampler, "decode_batch_size", None) or rows)
    cache = size * at_once * length * policy.layers * 2 * _key_value_size(config)
    logits = 4.0 * 3 * at_once * policy.embedding / policy.hidden
    return {"copy for sampling": copy, "keys and values": cache, "vocabulary head": logits}


def _key_value_size(config: PretrainedConfig) -> int:
    """Numbers of the keys of one token in one layer."""
    heads = getattr(config, "num_attention_heads", None) or 1
    head = getattr(config, "head_dim", None) or int(getattr(config, "hidden_size", 0)) // heads
    return int(head * (getattr(config, "num_key_value_heads", None) or heads))


def _decoding(
    policy: Trace, config: PretrainedConfig, rows: int, response: int, length: int, setting: Setting
) -> float:
    """Seconds until all responses have their full length: a step reads every weight and all keys and values."""
    machine, size = setting.machine, 2.0 if setting.mixed else 4.0
    cache = size * rows * length / 2 * policy.layers * 2 * _key_value_size(config)
    reading = (size * policy.parameters + cache) / machine.bandwidth
    products = 2.0 * rows * policy.parameters / machine.flops
    launches = policy.layers * _SMALL_OPERATIONS * machine.launch
    prompts = 2.0 * rows * (length - response) * policy.parameters / machine.flops
    return prompts + response * (max(reading, products) + launches)


def _optimizer_step(trained: list[Trace], setting: Setting) -> float:
    """Seconds: AdamW reads weight, gradient and two moments, and writes three of them."""
    return 4.0 * 7 * sum(each.trained for each in trained) / setting.machine.bandwidth

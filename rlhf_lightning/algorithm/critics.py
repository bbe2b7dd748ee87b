"""Where the values come from."""

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.models.causal_lm import ResponsePass
from rlhf_lightning.models.loading import is_sequence_classifier, load_sequence_classifier
from rlhf_lightning.models.lora import LoRA, add_adapters
from rlhf_lightning.models.scalar_head import ScalarModel, score_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Critic(nn.Module, ABC):
    """Base of the critics.

    Args:
        learning_rate: Its own learning rate, at least 0; ``None`` takes the optimizer's.
        warmup_iterations: Iterations at the start in which it learns alone and the policy stays as it is; 0 is off.
    """

    #: Whether gradients of the values flow into the policy's pass too.
    reads_policy = True

    def __init__(self, learning_rate: float | None = None, warmup_iterations: int = 0) -> None:
        super().__init__()
        for name, value in (("learning_rate", learning_rate), ("warmup_iterations", warmup_iterations)):
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"{type(self).__name__}: {name} is {value}; it must be at least 0.")
        self.learning_rate, self.warmup_iterations = learning_rate, warmup_iterations

    @abstractmethod
    def setup(self, policy_name: str, policy: "PreTrainedModel") -> None:
        """Build the network; once, however often it is called.

        Args:
            policy_name: Folder or hub name of the policy.
            policy: The policy as it starts.
        """

    @abstractmethod
    def values(self, batch: SequenceBatch, policy_pass: ResponsePass) -> Tensor:
        """Return the value before each response token, shape (batch, response), float32, zero where masked.

        Args:
            batch: Prompts and responses.
            policy_pass: What the policy's own pass over them gave.
        """


class SeparateCritic(Critic):
    """A value network of its own.

    Args:
        init_from: Folder or hub name of the model it starts from: a reward model (its head is kept, so that the first
            values are already scores), or a language model (a new head that starts at zero). ``None`` takes the policy.
        learning_rate: Its own learning rate, at least 0; ``None`` takes the optimizer's.
        warmup_iterations: Iterations at the start in which it learns alone and the policy stays as it is; 0 is off.
        normalize: True begins with the reward model's scores less ``score_mean`` and divided by ``score_std`` of its
            config.json, as ``RewardModel(normalize=True)`` pays them; False with the scores as they are.
        lora: Adapters that it is trained by, in place of all its weights but the head's; ``None`` trains all weights.

    References:
        Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO": the critic starts from the reward model.
    """

    reads_policy = False

    def __init__(
        self,
        init_from: str | None = None,
        learning_rate: float | None = None,
        warmup_iterations: int = 0,
        normalize: bool = False,
        lora: LoRA | None = None,
    ) -> None:
        super().__init__(learning_rate, warmup_iterations)
        if normalize and init_from is None:
            raise UserError("SeparateCritic: normalize is true, but there is no init_from with scores to normalise.")
        self.init_from, self.normalize, self.lora = init_from, normalize, lora

    def setup(self, policy_name: str, policy: "PreTrainedModel") -> None:
        """Load the network."""
        if hasattr(self, "scalar"):
            return
        model = load_sequence_classifier(self.init_from or policy_name, new_head=True)
        if not is_sequence_classifier(model.config):
            nn.init.zeros_(model.score.weight)
        self.scalar = ScalarModel(add_adapters(model, self.lora))
        if self.normalize and self.init_from is not None:
            mean, std = score_statistics(self.init_from, asked_by="SeparateCritic")
            self.scalar.normalize(mean=mean, std=std)

    def values(self, batch: SequenceBatch, policy_pass: ResponsePass) -> Tensor:
        """Run the network over the sequences."""
        return self.scalar.values(batch)


class TrunkCritic(Critic):
    """A scalar head on the policy's own trunk, which starts at zero: no second network, no second pass.

    The value loss moves the trunk too, unless ``detach`` is set; its weight beside the policy loss then matters.

    Args:
        detach: True lets the value loss train the head alone.
        learning_rate: The head's own learning rate, at least 0; ``None`` takes the optimizer's. A new head on a trunk
            that learns slowly wants a higher one.
        warmup_iterations: Iterations at the start in which the head learns alone and the policy, its trunk included,
            stays as it is; 0 is off.

    References:
        Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.1; Schulman et al. 2017,
        "Proximal Policy Optimization Algorithms", eq. 9.
    """

    def __init__(self, detach: bool = False, learning_rate: float | None = None, warmup_iterations: int = 0) -> None:
        super().__init__(learning_rate, warmup_iterations)
        self.detach = detach

    def setup(self, policy_name: str, policy: "PreTrainedModel") -> None:
        """Build the head."""
        if hasattr(self, "head"):
            return
        embeddings = policy.get_input_embeddings()
        size = getattr(policy.config, "hidden_size", None) or embeddings.weight.shape[1]
        self.head = nn.Linear(int(size), 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def values(self, batch: SequenceBatch, policy_pass: ResponsePass) -> Tensor:
        """Read the head off the policy's hidden states."""
        hidden = policy_pass.hidden.detach() if self.detach else policy_pass.hidden
        with torch.autocast(hidden.device.type, enabled=False):
            flat = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()
        mask = batch.response_mask
        return flat.new_zeros(mask.shape).index_put(mask.nonzero(as_tuple=True), flat)

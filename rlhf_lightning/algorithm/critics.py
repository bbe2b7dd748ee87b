"""Where the values come from."""

from torch import Tensor, nn

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.models.loading import load_sequence_classifier
from rlhf_lightning.models.scalar_head import ScalarModel


class SeparateCritic(nn.Module):
    """A value network of its own.

    Args:
        init_from: Folder or hub name of the model it starts from: a reward model (its head is kept, so that the first
            values are already scores), or a language model (a new head that starts at zero). ``None`` takes the policy.
        learning_rate: Its own learning rate; ``None`` takes the optimizer's.

    References:
        Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO": the critic starts from the reward model.
    """

    def __init__(self, init_from: str | None = None, learning_rate: float | None = None) -> None:
        super().__init__()
        if learning_rate is not None and learning_rate < 0:
            raise UserError(f"SeparateCritic: learning_rate is {learning_rate}; it must be at least 0.")
        self.init_from, self.learning_rate = init_from, learning_rate

    def setup(self, policy_name: str) -> None:
        """Load the network; called once.

        Args:
            policy_name: Folder or hub name of the policy.
        """
        if hasattr(self, "scalar"):
            return
        model = load_sequence_classifier(self.init_from or policy_name, new_head=True)
        if not any("SequenceClassification" in kind for kind in model.config.architectures or []):
            nn.init.zeros_(model.score.weight)
        self.scalar = ScalarModel(model)

    def values(self, batch: SequenceBatch) -> Tensor:
        """Return the value before each response token, shape (batch, response), float32, zero where masked."""
        return self.scalar.values(batch)

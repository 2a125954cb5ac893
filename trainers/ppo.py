"""PPO is REINFORCE plus reuse: several updates on the same samples, held near the sampling policy by a clip.

The ratio of the new to the sampling policy corrects for the drift, and its clip takes the gradient away where a token
has moved far enough. At ratio 1, in the first update, the gradient is REINFORCE's. The clip does not bound KL:
``target_kl`` stops the epochs of a batch when the measured KL does.
"""

from dataclasses import dataclass

from torch import Tensor

from rlkl import losses
from rlkl.config import CreditConfig, PPOTrainer
from rlkl.trainers.reinforce import policy_gradient_need
from rlkl.types import Batch, Metrics, Need, PolicyOutput


@dataclass(frozen=True)
class PPO:
    """Schulman et al. 2017 (arXiv 1707.06347), with the defaults of lm-human-preferences (Ziegler et al. 2019)."""

    config: PPOTrainer
    credit: CreditConfig

    @property
    def epochs(self) -> int:
        """Passes over the samples of a step."""
        return self.config.epochs

    @property
    def minibatches(self) -> int:
        """Updates a pass."""
        return self.config.minibatches

    @property
    def need(self) -> frozenset[Need]:
        """What the training forward must return."""
        return policy_gradient_need(self.config.entropy_coef, self.credit)

    def loss(self, out: PolicyOutput, batch: Batch) -> tuple[Tensor, Metrics]:
        """Clipped surrogate, plus the clipped value loss and minus the entropy bonus."""
        total, metrics = losses.ppo_clip(
            out.get("logp_BT"), batch.behaviour_logp_BT, batch.adv_BT, batch.weight_BT, self.config.clip
        )
        if "entropy" in self.need:
            bonus, more = losses.entropy_bonus(out.get("entropy_BT"), batch.weight_BT)
            total, metrics = total + self.config.entropy_coef * bonus, metrics | more
        if "value" in self.need:
            error, more = losses.value(
                out.get("value_BT"),
                batch.return_BT,
                batch.mask_BT,
                batch.tokens,
                batch.behaviour_value_BT,
                self.config.value_clip,
            )
            total, metrics = total + self.config.value_coef * error, metrics | more
        return total, metrics

    def stop(self, metrics: dict[str, float]) -> bool:
        """Whether the last pass moved the policy past ``target_kl`` (global mean, nats a token)."""
        return self.config.target_kl is not None and metrics["policy/approx_kl"] > self.config.target_kl

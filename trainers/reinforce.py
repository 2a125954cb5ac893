"""REINFORCE is the bare policy gradient: one update on fresh samples, advantage times log-prob.

Everything that people attach to it is a choice elsewhere: the baseline, horizon and whitening in ``credit``, the
KL penalty in ``kl``. Here are only an optional entropy bonus and, where the credit asks for values, their loss.
"""

from dataclasses import dataclass

from torch import Tensor

from rlkl import losses
from rlkl.config import CreditConfig, ReinforceTrainer
from rlkl.types import Batch, Metrics, Need, PolicyOutput


def policy_gradient_need(entropy_coef: float, credit: CreditConfig) -> frozenset[Need]:
    """What the training forward of a policy gradient must return: the bonus and the value only where they train."""
    needed: set[Need] = {"logp"}
    if entropy_coef > 0:
        needed.add("entropy")
    if credit.needs_value:
        needed.add("value")
    return frozenset(needed)


@dataclass(frozen=True)
class Reinforce:
    """Williams 1992, on the policy's own samples."""

    config: ReinforceTrainer
    credit: CreditConfig

    epochs = 1
    minibatches = 1

    @property
    def need(self) -> frozenset[Need]:
        """What the training forward must return."""
        return policy_gradient_need(self.config.entropy_coef, self.credit)

    def loss(self, out: PolicyOutput, batch: Batch) -> tuple[Tensor, Metrics]:
        """Minus the surrogate whose gradient is that of the expected return (see ``rlkl.losses``)."""
        total, metrics = losses.policy_gradient(out.get("logp_BT"), batch.adv_BT, batch.weight_BT)
        if "entropy" in self.need:
            bonus, more = losses.entropy_bonus(out.get("entropy_BT"), batch.weight_BT)
            total, metrics = total + self.config.entropy_coef * bonus, metrics | more
        if "value" in self.need:
            error, more = losses.value(out.get("value_BT"), batch.return_BT, batch.mask_BT, batch.tokens)
            total, metrics = total + self.config.value_coef * error, metrics | more
        return total, metrics

    def stop(self, metrics: dict[str, float]) -> bool:
        """Never: there is one pass."""
        return False

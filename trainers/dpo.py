"""DPO is REINFORCE without a reward: of two completions of a prompt, the preferred one is made likelier than the other.

Its optimum under Bradley-Terry preferences is that of the KL-regularised reward, pi0 exp(r/beta): it holds the KL
penalty itself, as beta times log pi/pi0 in the place of the reward. Pairs are data, or the policy's own samples
ranked by the run's rewards (online DPO, Guo et al. 2024, arXiv 2402.04792; see ``rlkl.pairs``).
"""

from dataclasses import dataclass

from torch import Tensor

from rlkl import losses
from rlkl.types import Batch, Metrics, Need, PolicyOutput


@dataclass(frozen=True)
class DPO:
    """Rafailov et al. 2023 (arXiv 2305.18290). ``beta`` in reward a nat of a sequence."""

    beta: float

    epochs = 1
    minibatches = 1
    need: frozenset[Need] = frozenset({"logp", "ref_logp"})

    def loss(self, out: PolicyOutput, batch: Batch) -> tuple[Tensor, Metrics]:
        """Logistic loss of the margins; rows come as chosen, rejected, chosen, rejected, ..."""
        first_P, second_P = batch.get("pair_B").view(-1, 2).unbind(1)
        assert bool(((second_P == first_P + 1) & (first_P % 2 == 0) | (first_P < 0)).all()), "a pair was torn apart"
        return losses.dpo(out.get("logp_BT"), out.get("ref_logp_BT"), batch.weight_BT, self.beta)

    def stop(self, metrics: dict[str, float]) -> bool:
        """Never: there is one pass."""
        return False

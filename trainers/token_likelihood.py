"""Token likelihood is no reinforcement: marked tokens are made likelier or less likely where they stand.

A person who says "that token is wrong" is believed directly, without a reward that has to be explored and without
credit to spread. ``w``, the annotation of a token, is the sum over its reward window (``credit.horizon``; 1 = its own).
Supervised fine-tuning is this trainer with every token marked +1.
"""

from dataclasses import dataclass

from torch import Tensor

from rlkl import likelihood
from rlkl.config import TokenLikelihoodTrainer
from rlkl.types import Batch, Metrics, Need, PolicyOutput


@dataclass(frozen=True)
class TokenLikelihood:
    """The losses of ``rlkl.likelihood`` on annotated tokens. ``beta`` is that of losses which hold it themselves."""

    config: TokenLikelihoodTrainer
    beta: float

    epochs = 1
    minibatches = 1

    @property
    def need(self) -> frozenset[Need]:
        """What the training forward must return."""
        needed: set[Need] = {"logp"}
        if self.config.loss in ("npo", *self.config.holding_beta):
            needed.add("ref_logp")
        if self.config.loss == "contrastive":
            needed.add("alt_logp")
        if self.config.learned_offset:
            needed.add("value")
        return frozenset(needed)

    def loss(self, out: PolicyOutput, batch: Batch) -> tuple[Tensor, Metrics]:
        """The chosen loss over the annotated tokens."""
        logp_BT, w_BT, weight_BT = out.get("logp_BT"), batch.get("annotation_BT"), batch.weight_BT
        match self.config.loss:
            case "signed":
                return likelihood.signed(logp_BT, w_BT, weight_BT)
            case "unlikelihood":
                return likelihood.unlikelihood(logp_BT, w_BT, weight_BT)
            case "contrastive":
                return likelihood.contrastive(logp_BT, out.get("alt_logp_BT"), w_BT, weight_BT)
        ref_BT = out.get("ref_logp_BT")
        match self.config.loss:
            case "npo":
                return likelihood.npo(logp_BT, ref_BT, w_BT, weight_BT, self.config.kappa)
            case "rwr":
                return likelihood.rwr(logp_BT, ref_BT, batch.behaviour_logp_BT, w_BT, weight_BT, self.beta)
            case "binary":
                return likelihood.binary(logp_BT, ref_BT, self._offset(out, w_BT), w_BT, weight_BT, self.beta)
        return likelihood.regression(logp_BT, ref_BT, self._offset(out, w_BT), w_BT, weight_BT, self.beta)

    def _offset(self, out: PolicyOutput, w_BT: Tensor) -> Tensor:
        """v: learned a state, learned a prompt (its value at the prompt's last token), or 0."""
        if self.config.offset == "none":
            return w_BT.new_zeros(w_BT.shape)
        value_BT = out.get("value_BT")
        return value_BT if self.config.offset == "state" else value_BT[:, :1].expand_as(value_BT)

    def stop(self, metrics: dict[str, float]) -> bool:
        """Never: there is one pass."""
        return False

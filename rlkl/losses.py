"""Pure losses, one function a formula.

Every loss is a plain sum of ``weight_BT * term`` and returns ``(loss, {name: (sum, count)})``. The weights
hold the normaliser of the global batch (see :class:`rlkl.types.Batch`), so accumulating over micro-batches
equals one big batch. Reported values are means over sequences of the token sums, whatever the normaliser,
so that runs with different normalisers can be read side by side.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rlkl.types import Metrics


def sequence_mean(term_BT: Tensor, weight_BT: Tensor) -> tuple[Tensor, Tensor]:
    """``(sum, count)`` of the mean over sequences of the token sums of ``term_BT`` where a token trains."""
    total = (term_BT * (weight_BT > 0)).sum().detach()
    return total, torch.full_like(total, weight_BT.shape[0])


def policy_gradient(
    logp_BT: Float[Tensor, "B T"], adv_BT: Float[Tensor, "B T"], weight_BT: Float[Tensor, "B T"]
) -> tuple[Float[Tensor, ""], Metrics]:
    r"""REINFORCE: :math:`-\sum_t w_t A_t \log\pi(a_t|s_t)` (Williams 1992).

    ``adv_BT`` is treated as data. The gradient is that of :math:`-J` when ``A_t`` is an unbiased
    advantage and the tokens were drawn from the policy itself.
    """
    term_BT = -adv_BT.detach() * logp_BT
    return (weight_BT * term_BT).sum(), {"loss/policy": sequence_mean(term_BT, weight_BT)}


def value(
    value_BT: Float[Tensor, "B T"],
    return_BT: Float[Tensor, "B T"],
    mask_BT: Tensor,
    tokens: Float[Tensor, ""],
    behaviour_value_BT: Float[Tensor, "B T"] | None = None,
    clip: float | None = None,
) -> tuple[Float[Tensor, ""], Metrics]:
    r"""Value regression: token mean of :math:`\tfrac12\max[(V-G)^2, (\mathrm{clip}(V, V_{old}\pm c)-G)^2]`.

    Without ``clip`` the maximum falls away. The clipped form is Schulman et al. 2017 as run in
    lm-human-preferences. ``tokens`` is the number of policy tokens in the global batch.

    Raises:
        ValueError: ``clip`` without ``behaviour_value_BT``.
    """
    error_BT = (value_BT - return_BT) ** 2
    if clip is not None:
        if behaviour_value_BT is None:
            raise ValueError("value clip: needs the values at sampling; give behaviour_value_BT")
        near_BT = value_BT.clamp(behaviour_value_BT - clip, behaviour_value_BT + clip)
        error_BT = torch.maximum(error_BT, (near_BT - return_BT) ** 2)
    total = 0.5 * (error_BT * mask_BT).sum()
    return total / tokens, {"loss/value": (total.detach(), mask_BT.sum().to(total.dtype))}


def entropy_bonus(
    entropy_BT: Float[Tensor, "B T"], weight_BT: Float[Tensor, "B T"]
) -> tuple[Float[Tensor, ""], Metrics]:
    r"""Minus the token entropies, :math:`-\sum_t w_t H(\pi(\cdot|s_t))`, nats a sequence.

    Its gradient is local: how a token changes the entropy of later states is not in it.
    """
    loss = -(weight_BT * entropy_BT).sum()
    return loss, {"policy/entropy": sequence_mean(entropy_BT, weight_BT)}

"""Pure losses, one function a formula.

Every loss is a plain sum of ``weight_BT * term`` and returns ``(loss, {name: (sum, count)})``. The weights
hold the normaliser of the global batch (see :class:`rlkl.types.Batch`), so accumulating over micro-batches
equals one big batch. Reported values are means over sequences of the token sums, whatever the normaliser,
so that runs with different normalisers can be read side by side.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlkl.types import Metrics


def sequence_mean(term_BT: Tensor, weight_BT: Tensor) -> tuple[Tensor, Tensor]:
    """``(sum, count)`` of the mean over sequences of the token sums of ``term_BT`` where a token trains."""
    total = (term_BT * (weight_BT > 0)).sum().detach()
    return total, (weight_BT > 0).any(-1).sum().to(total.dtype)


def policy_gradient(
    logp_BT: Float[Tensor, "B T"], adv_BT: Float[Tensor, "B T"], weight_BT: Float[Tensor, "B T"]
) -> tuple[Float[Tensor, ""], Metrics]:
    r"""REINFORCE: :math:`-\sum_t w_t A_t \log\pi(a_t|s_t)` (Williams 1992).

    ``adv_BT`` is treated as data. The gradient is that of :math:`-J` when ``A_t`` is an unbiased
    advantage and the tokens were drawn from the policy itself.
    """
    term_BT = -adv_BT.detach() * logp_BT
    return (weight_BT * term_BT).sum(), {"loss/policy": sequence_mean(term_BT, weight_BT)}


def ppo_clip(
    logp_BT: Float[Tensor, "B T"],
    behaviour_logp_BT: Float[Tensor, "B T"],
    adv_BT: Float[Tensor, "B T"],
    weight_BT: Float[Tensor, "B T"],
    clip: float,
) -> tuple[Float[Tensor, ""], Metrics]:
    r"""PPO's surrogate :math:`-\sum_t w_t\min(\rho_t A_t,\mathrm{clip}(\rho_t,1\pm c)A_t)` (Schulman et al. 2017).

    :math:`\rho_t=\pi/\pi_{old}` at the sampled token. Reported beside the loss: the share of tokens on which the clip
    binds; ``policy/approx_kl``, the k3 estimate :math:`\rho-1-\log\rho` of KL(old||new), nats a token; and the range
    of the ratio.
    """
    train_BT = weight_BT > 0
    log_ratio_BT = (logp_BT - behaviour_logp_BT.detach()) * train_BT
    ratio_BT = log_ratio_BT.exp()
    adv_BT = adv_BT.detach()
    plain_BT, clipped_BT = ratio_BT * adv_BT, ratio_BT.clamp(1 - clip, 1 + clip) * adv_BT
    term_BT = -torch.minimum(plain_BT, clipped_BT)
    tokens = train_BT.sum().to(term_BT.dtype)
    with torch.no_grad():
        k3_BT = torch.expm1(log_ratio_BT) - log_ratio_BT
        metrics = {
            "loss/policy": sequence_mean(term_BT, weight_BT),
            "policy/clip_fraction": ((clipped_BT < plain_BT).sum().to(term_BT.dtype), tokens),
            "policy/approx_kl": (k3_BT.sum(), tokens),
            "policy/ratio_min": (ratio_BT.amin(), tokens),
            "policy/ratio_max": (ratio_BT.amax(), tokens),
        }
    return (weight_BT * term_BT).sum(), metrics


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


def dpo(
    logp_BT: Float[Tensor, "B T"],
    ref_logp_BT: Float[Tensor, "B T"],
    weight_BT: Float[Tensor, "B T"],
    beta: float,
) -> tuple[Float[Tensor, ""], Metrics]:
    r"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290).

    .. math:: -\sum_k w_k\log\sigma(\beta[\sum_t u_t(\text{chosen}_k)-\sum_t u_t(\text{rejected}_k)])

    with :math:`u=\log\pi/\pi_0` over the tokens that weigh something. Even rows are chosen, each followed by its
    rejected one; all tokens of a pair weigh the same. Reported beside the loss, means over pairs: the margin (the
    argument of :math:`\sigma`, in reward) and the share of pairs in which it is positive, where 0 counts half.
    """
    train_BT = weight_BT > 0
    u_B = ((logp_BT - ref_logp_BT) * train_BT).sum(-1)
    margin_P = beta * (u_B[0::2] - u_B[1::2])
    term_P, weight_P, paired_P = -logsigmoid(margin_P), weight_BT[0::2].amax(-1), train_BT[0::2].any(-1)
    pairs = paired_P.sum().to(term_P.dtype)
    metrics = {
        "loss/preference": ((term_P * paired_P).sum().detach(), pairs),
        "preference/margin": ((margin_P * paired_P).sum().detach(), pairs),
        "preference/accuracy": ((margin_P.sign() * paired_P + paired_P).sum().detach() / 2, pairs),
    }
    return (weight_P * term_P).sum(), metrics

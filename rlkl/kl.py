r"""The KL penalty: what is estimated, where it is put, and what gradient that gives.

With :math:`u_t=\log\pi(a_t|s_t)-\log\pi_0(a_t|s_t)` and :math:`\rho=\pi_0/\pi` at the sampled token:
``k1`` :math:`=-\log\rho=u`, ``k2`` :math:`=\tfrac12\log^2\rho`, ``k3`` :math:`=\rho-1-\log\rho`.

Value and gradient are two questions: an estimator may have the right value and, differentiated or paid as a
reward, the gradient of something else. ``rlkl.config.GRADIENT`` says what each (placement, estimator) follows
in expectation, on-policy, and ``REFUSED`` why the rest is not offered; ``tests/test_kl_oracle.py`` enumerates both.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlkl.config import KLConfig
from rlkl.losses import sequence_mean
from rlkl.reduce import global_sum
from rlkl.types import Batch, Metrics, Need, PolicyOutput, Rollout

OFFLINE = ("exact_local", "exact_forward")
"""Estimators that mean something on tokens which the policy did not draw; the score term of ``exact`` does not."""


def log_ratio(logp: Float[Tensor, "B T"], ref_logp: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    r""":math:`u_t`, nats. As a value this is ``k1``."""
    return logp - ref_logp


def k2(logp: Float[Tensor, "B T"], ref_logp: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    r""":math:`\tfrac12 u_t^2` (Schulman 2020, "Approximating KL divergence"), nats."""
    return 0.5 * log_ratio(logp, ref_logp) ** 2


def k3(logp: Float[Tensor, "B T"], ref_logp: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    r""":math:`e^{-u_t}-1+u_t \ge 0` (Schulman 2020), nats."""
    u_BT = log_ratio(logp, ref_logp)
    return torch.expm1(-u_BT) + u_BT


def rao_blackwell(
    kl_BT: Float[Tensor, "B T"], logp_BT: Float[Tensor, "B T"], weight_BT: Float[Tensor, "B T"]
) -> Float[Tensor, ""]:
    r"""Sum of exact token KLs whose gradient is exact too (Amini et al. 2025, arXiv 2504.10637).

    :math:`\sum_t w_t KL(s_t) + \sum_t(\sum_{j>t} w_j KL(s_j))_{\mathrm{detached}}\log\pi_t`; the second
    term has value zero here, so the returned value is the KL estimate itself. Tokens of weight zero (written
    by an environment) are in neither sum: their law is not the policy's to change.
    """
    token_BT = weight_BT * kl_BT
    later_BT = (token_BT.flip(-1).cumsum(-1).flip(-1) - token_BT).detach() * (weight_BT > 0)
    return token_BT.sum() + (later_BT * (logp_BT - logp_BT.detach())).sum()


def needs(cfg: KLConfig) -> set[Need]:
    """What the training forward must return for this penalty."""
    if cfg.placement != "loss" or cfg.beta == 0:
        return set()
    if cfg.estimator == "exact_forward":
        return {"kl_forward"}
    if cfg.estimator == "exact_local":
        return {"kl"}
    return {"kl", "logp"} if cfg.estimator == "exact" else {"logp", "ref_logp"}


def check_origin(cfg: KLConfig, origin: Literal["policy", "reference", "data"]) -> None:
    """Refuse estimators that need the policy's own samples on tokens that it did not draw.

    Raises:
        ValueError: ``k1``, ``k2`` or ``k3`` in any form, or ``exact``, on ``origin != "policy"``.
    """
    if origin != "policy" and cfg.estimator not in OFFLINE and (cfg.beta > 0 or cfg.target is not None):
        what = "its score term is wrong" if cfg.estimator == "exact" else "estimates nothing"
        raise ValueError(
            f"kl.estimator={cfg.estimator}: {what} on tokens that the policy did not draw "
            f"(origin={origin}); use kl.placement=loss with one of {', '.join(OFFLINE)}"
        )


def penalty(cfg: KLConfig, out: PolicyOutput, batch: Batch) -> tuple[Float[Tensor, ""], Metrics]:
    """The KL estimate that is put in the loss, before it is multiplied by beta; 0 for ``placement=reward``.

    It shares the normaliser of the policy loss, so beta is in nats a sequence (a token, under a token mean).
    """
    weight_BT = batch.weight_BT if batch.kl_weight_BT is None else batch.kl_weight_BT
    if not needs(cfg):
        return weight_BT.new_zeros(()), {}
    if cfg.estimator == "exact":
        kl_BT, logp_BT = out.get("kl_BT"), out.get("logp_BT")
        return rao_blackwell(kl_BT, logp_BT, weight_BT), {"loss/kl": sequence_mean(kl_BT, weight_BT)}
    if cfg.estimator == "k2_sequence":
        train_BT = weight_BT > 0
        u_B = (log_ratio(out.get("logp_BT"), out.get("ref_logp_BT")) * train_BT).sum(-1)
        total_B = 0.5 * u_B**2
        loss = (weight_BT.amax(-1) * total_B).sum()
        return loss, {"loss/kl": (total_B.sum().detach(), torch.full_like(loss.detach(), len(u_B)))}
    term_BT = _token_term(cfg.estimator, out, batch)
    return (weight_BT * term_BT).sum(), {"loss/kl": sequence_mean(term_BT, weight_BT)}


def _token_term(estimator: str, out: PolicyOutput, batch: Batch) -> Tensor:
    if estimator == "exact_local":
        return out.get("kl_BT")
    if estimator == "exact_forward":
        return out.get("kl_forward_BT")
    logp_BT, ref_BT = out.get("logp_BT"), out.get("ref_logp_BT")
    if estimator == "k2":
        return k2(logp_BT, ref_BT)
    if estimator == "k3":
        return k3(logp_BT, ref_BT)
    ratio_BT = (logp_BT - batch.behaviour_logp_BT).exp()
    return ratio_BT * (log_ratio(logp_BT, ref_BT) if estimator == "k1_ratio" else k3(logp_BT, ref_BT))


def measured(rollout: Rollout, out: PolicyOutput) -> float:
    r"""``kl/penalty``: global-batch mean of masked :math:`\sum_t u_t`, nats a sequence. It steers beta."""
    u_BT = log_ratio(out.get("logp_BT"), out.get("ref_logp_BT")) * rollout.policy_mask_BT
    total, count = global_sum(torch.stack([u_BT.sum().double(), u_BT.new_tensor(len(rollout)).double()]))
    return float(total / count)


def adapt(beta: float, kl: float, target: float, gain: float = 0.1, clip: float = 0.2) -> float:
    r"""Adaptive coefficient (Ziegler et al. 2019, section 2.2).

    :math:`e=\mathrm{clip}((KL-KL_{target})/KL_{target},\pm 0.2)`, :math:`\beta\leftarrow\beta(1+0.1e)`;
    ``kl`` and ``target`` in nats a sequence.
    """
    error = max(-clip, min(clip, (kl - target) / target))
    return beta * (1 + gain * error)

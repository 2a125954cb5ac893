r"""Token-level likelihood losses: pure, one function a formula.

``w`` is the annotation of a token (+ good, - bad), :math:`p=\pi(b|s)` the policy's probability of the marked token,
:math:`q=\pi_0(b|s)` the reference's. Every function returns ``(loss, metrics)`` like those of ``rlkl.losses``;
``weight_BT`` is 1 / annotated tokens of the global batch where a token is annotated and 0 elsewhere, so beta is in
nats an annotated token. What each loss converges to is tested on problems that can be enumerated
(``tests/test_token_likelihood.py``).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from rlkl.types import Metrics

Loss = tuple[Float[Tensor, ""], Metrics]


def signed(logp_BT: Float[Tensor, "B T"], w_BT: Float[Tensor, "B T"], weight_BT: Float[Tensor, "B T"]) -> Loss:
    r""":math:`-\sum w\log p`: unbounded below for :math:`w<0`.

    Reverse KL does not bound it. Forward KL does iff :math:`\beta\pi_0(b)>|w_b|` for every bad token; then
    :math:`p=(w+\beta\pi_0)/(W+\beta)`, :math:`W=\sum w`.
    """
    return _reported(-w_BT * logp_BT, weight_BT)


def unlikelihood(logp_BT: Float[Tensor, "B T"], w_BT: Float[Tensor, "B T"], weight_BT: Float[Tensor, "B T"]) -> Loss:
    r"""Good tokens :math:`-w\log p`, bad ones :math:`-|w|\log(1-p)` (Welleck et al. 2019, arXiv 1908.04319).

    Bounded; with exact reverse KL :math:`\mathrm{logit}\,p=\mathrm{logit}\,q-m/(\beta(1-p))` for a share m of bad data.
    """
    good_BT, bad_BT = _split(w_BT)
    # log(1-p) from log p, bounded where p rounds to one; the bound is no part of the gradient, or such a token would
    # be pressed by nothing.
    bounded_BT = logp_BT + (logp_BT.clamp(max=-1e-7) - logp_BT).detach()
    log_rest_BT = torch.log(-torch.expm1(bounded_BT))
    return _reported(-good_BT * logp_BT - bad_BT * log_rest_BT, weight_BT)


def npo(
    logp_BT: Float[Tensor, "B T"],
    ref_logp_BT: Float[Tensor, "B T"],
    w_BT: Float[Tensor, "B T"],
    weight_BT: Float[Tensor, "B T"],
    kappa: float,
) -> Loss:
    r"""Bad tokens :math:`|w|\frac2\kappa\log(1+(p/q)^\kappa)` (Zhang et al. 2024, arXiv 2404.05868), good ones
    :math:`-w\log p`. With exact reverse KL and kappa = 1 :math:`\mathrm{logit}\,p=\mathrm{logit}\,q-2m/(\beta(p+q))`.
    """
    good_BT, bad_BT = _split(w_BT)
    pressed_BT = 2 / kappa * softplus(kappa * (logp_BT - ref_logp_BT))
    return _reported(-good_BT * logp_BT + bad_BT * pressed_BT, weight_BT)


def binary(
    logp_BT: Float[Tensor, "B T"],
    ref_logp_BT: Float[Tensor, "B T"],
    offset_BT: Float[Tensor, "B T"],
    w_BT: Float[Tensor, "B T"],
    weight_BT: Float[Tensor, "B T"],
    beta: float,
) -> Loss:
    r"""BCE of :math:`\sigma(\beta\log(p/\pi_0)+v)` against the soft label :math:`\sigma(w)` (the KTO/BCO family).

    With v learned a state and several actions annotated a state the optimum is Gibbs,
    :math:`p\propto\pi_0e^{w/\beta}`, :math:`v=\beta\log Z`.
    """
    logit_BT = beta * (logp_BT - ref_logp_BT) + offset_BT
    term_BT = binary_cross_entropy_with_logits(logit_BT, torch.sigmoid(w_BT), reduction="none")
    return _reported(term_BT, weight_BT)


def regression(
    logp_BT: Float[Tensor, "B T"],
    ref_logp_BT: Float[Tensor, "B T"],
    offset_BT: Float[Tensor, "B T"],
    w_BT: Float[Tensor, "B T"],
    weight_BT: Float[Tensor, "B T"],
    beta: float,
) -> Loss:
    r""":math:`\tfrac12(w-v-\beta\log p/\pi_0)^2` (DRO-V, Richemond et al. 2024, arXiv 2405.19107).

    Gibbs when several actions a state are annotated. With one annotated token a prefix a v of the state absorbs the
    signal; without an offset :math:`p=q\,e^{w/\beta}` for w < 0.
    """
    return _reported(0.5 * (w_BT - offset_BT - beta * (logp_BT - ref_logp_BT)) ** 2, weight_BT)


def rwr(
    logp_BT: Float[Tensor, "B T"],
    ref_logp_BT: Float[Tensor, "B T"],
    behaviour_logp_BT: Float[Tensor, "B T"],
    w_BT: Float[Tensor, "B T"],
    weight_BT: Float[Tensor, "B T"],
    beta: float,
) -> Loss:
    r"""Likelihood weighted by :math:`e^{w/\beta}` (reward-weighted regression, Peters & Schaal 2007).

    Gibbs on samples of the reference. On the policy's own samples it would iterate to collapse, so the weight is
    multiplied by :math:`\pi_0/\pi_{behaviour}`, which is 1 on the reference's.
    """
    importance_BT = torch.exp(w_BT / beta + ref_logp_BT - behaviour_logp_BT)
    return _reported(-importance_BT.detach() * logp_BT, weight_BT)


def contrastive(
    logp_BT: Float[Tensor, "B T"],
    alt_logp_BT: Float[Tensor, "B T"],
    w_BT: Float[Tensor, "B T"],
    weight_BT: Float[Tensor, "B T"],
) -> Loss:
    r"""Bad tokens against one that the model samples there: :math:`|w|\log(1+p/p_{alt})`; good ones :math:`-w\log p`.

    ``alt_logp_BT`` are log-probs of another token, drawn from the policy at the same state.
    """
    good_BT, bad_BT = _split(w_BT)
    return _reported(-good_BT * logp_BT + bad_BT * softplus(logp_BT - alt_logp_BT), weight_BT)


def _split(w_BT: Tensor) -> tuple[Tensor, Tensor]:
    return w_BT.clamp(min=0), (-w_BT).clamp(min=0)


def _reported(term_BT: Tensor, weight_BT: Tensor) -> Loss:
    marked_BT = weight_BT > 0
    total = (term_BT * marked_BT).sum().detach()
    return (weight_BT * term_BT).sum(), {"loss/likelihood": (total, marked_BT.sum().to(total.dtype))}

r"""Ground truth by enumeration: every completion of a small causal LM, and the expectations over them.

``enumerate_completions`` makes a Rollout of *all* completions ("atoms"). On it everything the samplers only
estimate is a finite sum: the objective :math:`J=E_\pi[r]-\beta KL(\pi\|\pi_0)`, its gradient, both KLs, the optimum
:math:`\pi^*\propto\pi_0 e^{r/\beta}`, soft values, and the expected gradient and trace variance of any estimator
that is run through the library's own forward, credit, KL and losses (:func:`estimator`).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from rlkl.policy import Policy
from rlkl.sampling import given
from rlkl.types import End, Rollout

LIMIT = 100_000


def enumerate_completions(
    prompt_ids: Sequence[int],
    vocab_size: int,
    length: int,
    eos_ids: Sequence[int] = (),
    temperature: float = 1.0,
) -> Rollout:
    """All completions of one prompt: ``length`` tokens, or fewer where one of ``eos_ids`` ends it.

    Raises:
        ValueError: there are more than 100,000 of them.
    """
    open_: list[tuple[int, ...]] = [()]
    done: list[tuple[int, ...]] = []
    for _ in range(length):
        grown = [(*prefix, token) for prefix in open_ for token in range(vocab_size)]
        done += [y for y in grown if y[-1] in eos_ids]
        open_ = [y for y in grown if y[-1] not in eos_ids]
        if len(done) + len(open_) > LIMIT:
            raise ValueError(f"enumeration: over {LIMIT} completions; take a smaller vocabulary or length")
    atoms = done + open_
    ends = [int(End.EOS)] * len(done) + [int(End.LIMIT)] * len(open_)
    end_B = torch.tensor(ends)
    prompts, group_B = [prompt_ids] * len(atoms), torch.zeros_like(end_B)
    return given(prompts, atoms, length, end_B=end_B, group_B=group_B, temperature=temperature)


def sequence_logp(policy: Policy, atoms: Rollout) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Log-probs (nats, at the atoms' temperature) of every completion under policy and reference."""
    out = policy(atoms, {"logp", "ref_logp"})
    return out.get("logp_BT").sum(-1), out.get("ref_logp_BT").sum(-1)


def objective(
    logp_N: Float[Tensor, "N"], ref_N: Float[Tensor, "N"], reward_N: Float[Tensor, "N"], beta: float
) -> Float[Tensor, ""]:
    r""":math:`J=\sum_y\pi(y)[r(y)-\beta(\log\pi-\log\pi_0)]`, differentiable."""
    return (logp_N.exp() * (reward_N - beta * (logp_N - ref_N))).sum()


def kl(logp_N: Float[Tensor, "N"], other_N: Float[Tensor, "N"]) -> Float[Tensor, ""]:
    """KL of the sequence laws, nats: ``kl(policy, reference)`` is reverse, swapped it is forward."""
    return (logp_N.exp() * (logp_N - other_N)).sum()


def optimum(
    ref_N: Float[Tensor, "N"], reward_N: Float[Tensor, "N"], beta: float
) -> tuple[Float[Tensor, "N"], Float[Tensor, ""]]:
    r""":math:`\log\pi^*=\log\pi_0+r/\beta-\log Z` and :math:`\log Z` (Korbak et al. 2022, arXiv 2205.11275)."""
    energy_N = ref_N + reward_N / beta
    log_z = energy_N.logsumexp(0)
    return energy_N - log_z, log_z


def soft_values(
    atoms: Rollout, ref_logp_NT: Float[Tensor, "N T"], reward_NT: Float[Tensor, "N T"], beta: float
) -> Float[Tensor, "N T1"]:
    r"""Optimal soft values :math:`V^*_t=\beta\log E_{\pi_0}[e^{(r_t+V^*_{t+1})/\beta}]` along every atom.

    ``[N, T+1]``: column t belongs to the state before token t. At tokens that are not the policy's the
    expectation stays outside the log-sum-exp (``ref_logp_NT`` then holds the environment's log-probs).
    """
    return _backup(atoms, ref_logp_NT, reward_NT, beta)


def values(atoms: Rollout, logp_NT: Float[Tensor, "N T"], reward_NT: Float[Tensor, "N T"]) -> Float[Tensor, "N T1"]:
    r"""Ordinary values :math:`V_t=E_\pi[\sum_{k\ge t} r_k\mid s_t]` along every atom, ``[N, T+1]``."""
    return _backup(atoms, logp_NT, reward_NT, None)


def _backup(atoms: Rollout, logp_NT: Tensor, reward_NT: Tensor, beta: float | None) -> Tensor:
    tokens_NT = torch.where(torch.arange(logp_NT.shape[1]) < atoms.length_B[:, None], atoms.tokens_BT, -1)
    total = tokens_NT.shape[1]
    value_NT1 = reward_NT.new_zeros(len(atoms), total + 1)
    for t in reversed(range(total)):
        _, child_N = torch.unique(tokens_NT[:, : t + 1], dim=0, return_inverse=True)
        parent_N = torch.zeros_like(child_N)
        if t:
            _, parent_N = torch.unique(tokens_NT[:, :t], dim=0, return_inverse=True)
        first_C = torch.full((int(child_N.max()) + 1,), len(atoms)).scatter_reduce(
            0, child_N, torch.arange(len(atoms)), "amin"
        )
        parent_C, logp_C = parent_N[first_C], logp_NT[first_C, t]
        q_C = reward_NT[first_C, t] + value_NT1[first_C, t + 1]
        parents = int(parent_N.max()) + 1
        plain_P = q_C.new_zeros(parents).index_add(0, parent_C, logp_C.exp() * q_C)
        value_P = plain_P
        if beta is not None:
            best_P = q_C.new_full((parents,), -math.inf).scatter_reduce(0, parent_C, q_C, "amax")
            mass_P = q_C.new_zeros(parents).index_add(0, parent_C, (logp_C + (q_C - best_P[parent_C]) / beta).exp())
            ours_P = torch.zeros(parents, dtype=torch.bool)
            ours_P[parent_C] = atoms.policy_mask_BT[first_C, t]
            value_P = torch.where(ours_P, best_P + beta * mass_P.log(), plain_P)
        value_NT1[:, t] = value_P[parent_N]
    return value_NT1


@dataclass(frozen=True)
class Estimate:
    """Moments of a gradient estimator: its mean ``[D]``, and the trace of its covariance."""

    gradient: Tensor
    trace_variance: float


def estimator(policy: Policy, atoms: Rollout, loss: Callable[[Rollout], Tensor], samples: int = 1) -> Estimate:
    """Exact mean and trace variance of ``grad loss(batch)`` over batches of i.i.d. samples of one prompt.

    Every multiset of ``samples`` atoms is visited, so ``loss`` must not depend on the order of the samples.
    The law of the samples is the policy's own at the atoms' temperature.
    """
    with torch.no_grad():
        logp_N = policy(atoms, {"logp"}).get("logp_BT").sum(-1)
    mean: Tensor | None = None
    square = 0.0
    for chosen in itertools.combinations_with_replacement(range(len(atoms)), samples):
        orders = math.factorial(samples)
        for n in range(len(atoms)):
            orders //= math.factorial(chosen.count(n)) if n in chosen else 1
        index = torch.tensor(chosen)
        probability = orders * float(logp_N[index].sum().exp())
        batch = replace(atoms.rows(index), sample_id_B=torch.arange(samples))
        gradient = flat_gradient(policy, loss(batch))
        mean = probability * gradient + (0 if mean is None else mean)
        square += probability * float(gradient @ gradient)
    assert mean is not None
    return Estimate(mean, square - float(mean @ mean))


def flat_gradient(policy: Policy, loss: Tensor) -> Float[Tensor, "D"]:
    """The gradient of ``loss`` in all trained parameters as one vector."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    if not loss.requires_grad:
        return torch.cat([p.new_zeros(p.numel()) for p in parameters])
    parts = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    pairs = zip(parts, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def log_z_by_importance(
    ref_draws_reward_N: Float[Tensor, "N"], beta: float
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    r"""log Z from rewards of samples of the reference, with the effective sample size of the weights.

    :math:`\hat Z=\frac1N\sum e^{r/\beta}`; :math:`ESS=(\sum w)^2/\sum w^2`.
    """
    log_w_N = ref_draws_reward_N / beta
    log_z = log_w_N.logsumexp(0) - math.log(len(log_w_N))
    return log_z, (2 * log_w_N.logsumexp(0) - (2 * log_w_N).logsumexp(0)).exp()

r"""Credit assignment: token rewards to advantages.

With k1 in the reward, for a reward window ``h`` and a KL window ``h_K`` counted in *policy* tokens:

.. math:: G_t=\sum_{k<h}\gamma^k r_{t+k}-\beta\sum_{k<h_K}\gamma^k u_{t+k},\qquad A_t=G_t-b_t

or GAE (Schulman et al. 2016) on :math:`\tilde r_t=r_t-\beta u_t`. Tokens that an environment wrote are stepped
over. Everything is computed in float64 on ``[B, T]`` data and returned in the dtype of the log-probs.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlkl.config import CreditConfig, KLConfig
from rlkl.kl import log_ratio
from rlkl.reduce import global_max, global_sum, masked_mean, masked_std
from rlkl.types import Batch, End, PolicyOutput, Rollout, TokenRewards


def compact(mask_BT: Bool[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
    """Gather index that moves policy tokens to the front in order, and the mask of the compacted rows."""
    order_BT = torch.argsort((~mask_BT).int(), dim=-1, stable=True)
    steps = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return order_BT, steps < mask_BT.sum(-1, keepdim=True)


def discounted(x_BT: Float[Tensor, "B T"], gamma: float, window: int | None = None) -> Float[Tensor, "B T"]:
    r"""Windowed discounted sums :math:`\sum_{k<h}\gamma^k x_{t+k}` (to the end for ``window=None``)."""
    total_BT = torch.zeros_like(x_BT)
    running_B = torch.zeros_like(x_BT[:, 0])
    for t in reversed(range(x_BT.shape[1])):
        running_B = x_BT[:, t] + gamma * running_B
        total_BT[:, t] = running_B
    if window is None or window >= x_BT.shape[1]:
        return total_BT
    beyond_BT = torch.zeros_like(total_BT)
    beyond_BT[:, :-window] = total_BT[:, window:]
    return total_BT - gamma**window * beyond_BT


def kl_returns(
    u_BT: Float[Tensor, "B T"],
    scored_BT: Bool[Tensor, "B T"],
    gamma: float,
    horizon: int | None,
    window: str,
) -> Float[Tensor, "B T"]:
    """The KL part of the return, before beta, for a KL window of ``own | same | full | anchored``.

    ``anchored`` uses the reward's window at tokens whose reward window holds a scored position and the own
    token elsewhere.
    """
    if window == "own":
        return u_BT
    if window == "full":
        return discounted(u_BT, gamma)
    same_BT = discounted(u_BT, gamma, horizon)
    if window == "same":
        return same_BT
    assert window == "anchored", window
    holds_BT = discounted(scored_BT.to(u_BT.dtype), 1.0, horizon) > 0.5
    return torch.where(holds_BT, same_BT, u_BT)


def gae(
    reward_BT: Float[Tensor, "B T"],
    value_BT: Float[Tensor, "B T"],
    last_B: Float[Tensor, "B"],
    mask_BT: Bool[Tensor, "B T"],
    gamma: float,
    lambda_: float,
) -> Float[Tensor, "B T"]:
    r"""Generalised advantage estimation: :math:`\sum_k(\gamma\lambda)^k\delta_{t+k}`,
    :math:`\delta_t=\tilde r_t+\gamma V_{t+1}-V_t` (Schulman et al. 2016, arXiv 1506.02438).

    Rows are compacted; ``last_B`` stands for the value after the last token (0 for a terminated episode).
    """
    value_BT = value_BT * mask_BT
    next_BT = torch.cat([value_BT[:, 1:], torch.zeros_like(value_BT[:, :1])], dim=1)
    final_BT = mask_BT & ~torch.cat([mask_BT[:, 1:], torch.zeros_like(mask_BT[:, :1])], dim=1)
    next_BT = torch.where(final_BT, last_B[:, None], next_BT)
    delta_BT = (reward_BT + gamma * next_BT - value_BT) * mask_BT
    return discounted(delta_BT, gamma * lambda_)


def others_mean(x_BT: Float[Tensor, "B T"], group_B: Tensor) -> Float[Tensor, "B T"]:
    """Mean over the *other* samples of the same group (leave-one-out; Kool et al. 2019).

    Raises:
        ValueError: a group has a single sample, which leaves nothing to average.
    """
    _, inverse_B, count = torch.unique(group_B, return_inverse=True, return_counts=True)
    if int(count.min()) < 2:
        raise ValueError(
            "credit.baseline=leave_one_out: a prompt has 1 sample; set rollout.samples_per_prompt to 2 or more"
        )
    total = x_BT.new_zeros(len(count), x_BT.shape[1]).index_add_(0, inverse_B, x_BT)
    mean_BT: Tensor = (total[inverse_B] - x_BT) / (count[inverse_B, None] - 1)
    return mean_BT


def batch_mean_without_self(x_BT: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Mean over the other samples of the *global* batch.

    Raises:
        ValueError: the global batch has one sample.
    """
    count = global_sum(x_BT.new_tensor(float(x_BT.shape[0])))
    if count < 2:
        raise ValueError("credit.baseline=batch_mean: the batch has 1 sample; sample 2 or more a step")
    width = x_BT.shape[1]  # ranks may hold completions of other lengths
    widest_T = torch.nn.functional.pad(
        x_BT.sum(0), (0, int(global_max(torch.tensor(width, device=x_BT.device))) - width)
    )
    return (global_sum(widest_T)[:width] - x_BT) / (count - 1)


def group_norm(x_BT: Float[Tensor, "B T"], group_B: Tensor, eps: float = 1e-6) -> Float[Tensor, "B T"]:
    r"""GRPO's advantage :math:`(x-\mathrm{mean}_G)/(\mathrm{std}_G+\epsilon)` (Shao et al. 2024, arXiv 2402.03300).

    Biased: the self-inclusive mean scales the gradient by (G-1)/G, the division reweights prompts. The
    standard deviation is the sample one (n-1), as implementations have it.
    """
    count = (group_B[:, None] == group_B).sum(-1)[:, None]
    others_BT = others_mean(x_BT, group_B)
    centred_BT = (x_BT - others_BT) * (count - 1) / count
    same = (group_B[:, None] == group_B).to(x_BT.dtype)
    return centred_BT / ((same @ centred_BT**2 / (count - 1)).sqrt() + eps)


def _after_the_end(return_BT: Tensor, mask_BT: Tensor, hold_B: Tensor) -> Tensor:
    """Returns as a baseline for longer samples: nothing is left after the end, or (``hold_B``) the last value.

    Holding makes the baseline of a terminal reward the sequence-level one. Other samples' values are
    independent of a sample's own tokens, so both are unbiased, as long as the choice is each sample's own:
    made for the batch, it would let a sample's tokens choose its baseline.
    """
    last_B1 = (mask_BT.sum(-1, keepdim=True) - 1).clamp(min=0)
    held_B1 = return_BT.gather(1, last_B1) * hold_B[:, None]
    return torch.where(mask_BT, return_BT, held_B1)


def _condition(value_BT: Tensor, rewards: TokenRewards, cfg: CreditConfig) -> Tensor:
    """Centre (by the other samples' mean) and whiten (by the global standard deviation) scored rewards."""
    scored_BT = rewards.scored_BT.to(value_BT.device)
    if cfg.centre_rewards:
        own = torch.stack([(value_BT * scored_BT).sum(-1), scored_BT.sum(-1).to(value_BT.dtype)])
        total, count = global_sum(own.sum(-1))[:, None] - own
        value_BT = value_BT - (total / count.clamp(min=1))[:, None] * scored_BT
    if cfg.whiten_rewards:
        value_BT = value_BT / (masked_std(value_BT, scored_BT) + 1e-8)
    return value_BT


def assign(
    rollout: Rollout,
    rewards: TokenRewards,
    out: PolicyOutput,
    cfg: CreditConfig,
    kl: KLConfig,
    beta: float,
    ema: float | None = None,
) -> tuple[Batch, float | None]:
    """One rollout with its rewards to the batch that the losses read, and the updated EMA baseline.

    ``out`` is the policy at sampling. ``beta`` enters only with ``kl.placement=reward``. ``ema`` is the
    baseline of earlier batches (``None`` before the first, which then has baseline 0).

    Raises:
        ValueError: a reward on a token that the policy did not write; a baseline without enough samples.
    """
    mask_BT = rollout.policy_mask_BT
    if bool((rewards.scored_BT & ~mask_BT).any()) or bool((rewards.value_BT * ~mask_BT).any()):
        raise ValueError("reward: a token that the policy did not write is rewarded; pay its last policy token")
    order_BT, kept_BT = compact(mask_BT)
    dense_BT = _condition(rewards.value_BT.double(), rewards, cfg)
    r_BT, scored_BT = dense_BT.gather(1, order_BT), rewards.scored_BT.gather(1, order_BT)
    u_BT = torch.zeros_like(r_BT)
    if kl.placement == "reward":
        raw_BT = log_ratio(out.get("logp_BT"), out.get("ref_logp_BT")).detach().double() * mask_BT
        u_BT = beta * raw_BT.gather(1, order_BT)

    value_BT = None if out.value_BT is None else out.value_BT.detach().double().gather(1, order_BT) * kept_BT
    last_B = r_BT.new_zeros(len(rollout))
    if cfg.bootstrap_truncated:
        last_B = out.get("bootstrap_B").detach().double() * (rollout.end_B == End.LIMIT)

    if cfg.advantage == "gae":
        assert value_BT is not None
        adv_BT = gae(r_BT - u_BT, value_BT, last_B, kept_BT, cfg.gamma, cfg.lambda_)
        return_BT = adv_BT + value_BT
    else:
        final_BT = kept_BT & (kept_BT.cumsum(-1) == kept_BT.sum(-1, keepdim=True))
        paid_BT = r_BT + cfg.gamma * last_B[:, None] * final_BT
        return_BT = discounted(paid_BT, cfg.gamma, cfg.horizon)
        return_BT = return_BT - kl_returns(u_BT, scored_BT, cfg.gamma, cfg.horizon, kl.resolved_window(cfg.horizon))
        terminal_B = ~(scored_BT & ~final_BT).any(-1)
        hold_B = terminal_B if cfg.horizon is None else torch.zeros_like(terminal_B)
        adv_BT, ema = _subtract_baseline(return_BT * kept_BT, kept_BT, value_BT, rollout, cfg, ema, hold_B)

    if cfg.whiten_advantages:
        adv_BT = (adv_BT - masked_mean(adv_BT, kept_BT)) / (masked_std(adv_BT, kept_BT) + 1e-8)
    return _batch(rollout, out, cfg, adv_BT * kept_BT, return_BT * kept_BT, order_BT), ema


def _subtract_baseline(
    return_BT: Tensor,
    kept_BT: Tensor,
    value_BT: Tensor | None,
    rollout: Rollout,
    cfg: CreditConfig,
    ema: float | None,
    hold_B: Tensor,
) -> tuple[Tensor, float | None]:
    padded_BT = _after_the_end(return_BT, kept_BT, hold_B)
    if cfg.baseline == "none":
        return return_BT, ema
    if cfg.baseline == "batch_mean":
        return return_BT - batch_mean_without_self(padded_BT), ema
    if cfg.baseline == "leave_one_out":
        return return_BT - others_mean(padded_BT, rollout.group_B), ema
    if cfg.baseline == "group_norm":
        return group_norm(padded_BT, rollout.group_B), ema
    if cfg.baseline == "value":
        assert value_BT is not None
        return return_BT - value_BT, ema
    assert cfg.baseline == "ema", cfg.baseline
    mean = float(masked_mean(return_BT, kept_BT))
    updated = mean if ema is None else cfg.ema_decay * ema + (1 - cfg.ema_decay) * mean
    return return_BT - (0.0 if ema is None else ema), updated


def _batch(
    rollout: Rollout,
    out: PolicyOutput,
    cfg: CreditConfig,
    adv_BT: Tensor,
    return_BT: Tensor,
    order_BT: Tensor,
) -> Batch:
    """Undo the compaction and fix the normaliser of the global batch."""
    mask_BT, logp_BT = rollout.policy_mask_BT, out.get("logp_BT").detach()
    lengths_B = mask_BT.sum(-1).to(logp_BT.dtype)
    sequences, tokens = global_sum(torch.stack([lengths_B.new_tensor(float(len(rollout))), lengths_B.sum()]))
    if cfg.normaliser == "sequence":
        weight_BT = mask_BT / sequences
    elif cfg.normaliser == "token_mean":
        weight_BT = mask_BT / tokens.clamp(min=1)
    else:
        assert cfg.normaliser == "sequence_mean", cfg.normaliser
        weight_BT = mask_BT / (lengths_B.clamp(min=1)[:, None] * sequences)
    spread = torch.zeros_like(adv_BT)
    return Batch(
        adv_BT=spread.scatter(1, order_BT, adv_BT).to(logp_BT.dtype),
        return_BT=spread.scatter(1, order_BT, return_BT).to(logp_BT.dtype),
        mask_BT=mask_BT,
        weight_BT=weight_BT.to(logp_BT.dtype),
        tokens=tokens,
        group_B=rollout.group_B,
        behaviour_logp_BT=logp_BT,
        behaviour_value_BT=None if out.value_BT is None else out.value_BT.detach(),
        annotation_BT=rollout.annotation_BT,
        pair_B=rollout.pair_B,
    )


def likelihood(rollout: Rollout, rewards: TokenRewards, out: PolicyOutput, cfg: CreditConfig) -> Batch:
    r"""Annotations to the batch that likelihood losses read: :math:`w_t=\sum_{k<h}\gamma^k w_{t+k}`.

    The rollout's own annotation, which may look ahead, comes before rewards. A token trains where its window holds
    an annotated one; the normaliser is the number of those in the global batch. Behaviour log-probs are the
    policy's on its own samples and the reference's otherwise. A batch without an annotated token has no weight at all,
    its KL neither: it would be divided by nothing.
    """
    mask_BT = rollout.policy_mask_BT
    given_BT, marked_BT = rewards.value_BT, rewards.scored_BT
    if rollout.annotation_BT is not None:
        given_BT, marked_BT = rollout.annotation_BT, rollout.get("annotated_BT")
    order_BT, kept_BT = compact(mask_BT)
    w_BT = discounted((given_BT * marked_BT).double().gather(1, order_BT), cfg.gamma, cfg.horizon)
    holds_BT = discounted(marked_BT.double().gather(1, order_BT), 1.0, cfg.horizon) > 0.5
    trains_BT = torch.zeros_like(mask_BT).scatter(1, order_BT, holds_BT & kept_BT)
    behaviour_BT = out.get("logp_BT" if rollout.origin == "policy" else "ref_logp_BT").detach()
    tokens = global_sum(trains_BT.sum().to(behaviour_BT.dtype))
    w_BT = torch.zeros_like(w_BT).scatter(1, order_BT, w_BT * kept_BT).to(behaviour_BT.dtype)
    return Batch(
        adv_BT=torch.zeros_like(behaviour_BT),
        return_BT=w_BT,
        mask_BT=trains_BT,
        weight_BT=trains_BT / tokens.clamp(min=1),
        tokens=tokens.clamp(min=1),
        group_B=rollout.group_B,
        behaviour_logp_BT=behaviour_BT,
        annotation_BT=w_BT,
        pair_B=rollout.pair_B,
        kl_weight_BT=mask_BT * (tokens > 0) / tokens.clamp(min=1),
    )

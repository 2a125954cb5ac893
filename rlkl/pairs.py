r"""Samples of a prompt against each other: preference pairs, and the best ones to imitate.

``pair_B`` of a rollout says who is in which: ``2k`` is the chosen completion of pair k, ``2k+1`` the rejected one, -1
is in no pair; numbers are global over processes, and both halves of a pair are on the same process.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlkl.evaluate import chunks, outputs
from rlkl.reduce import global_sum
from rlkl.types import Batch, PolicyOutput, Rollout, TokenRewards


def ranked(rollout: Rollout, rewards: TokenRewards) -> Rollout:
    """Samples 2i and 2i+1 as pair i, the one with the higher total reward chosen; ties are in no pair.

    Rewards decide without noise, so the fixed point that DPO has under Bradley-Terry preferences
    (pi0 exp(r/beta), normalised) does not hold here: margins may grow for ever.
    """
    order_B = rollout.sample_id_B.argsort()
    ids_P2 = rollout.sample_id_B[order_B].view(-1, 2)
    assert bool((ids_P2[:, 1] == ids_P2[:, 0] + 1).all() and (ids_P2[:, 0] % 2 == 0).all()), "half a pair is elsewhere"
    score_P2 = rewards.value_BT.sum(-1)[order_B].view(-1, 2)
    second_P = (score_P2[:, 1] > score_P2[:, 0]).long()
    pair_P2 = torch.stack([ids_P2[:, 0] + second_P, ids_P2[:, 0] + 1 - second_P], 1)
    pair_P2 = pair_P2.where(score_P2[:, :1] != score_P2[:, 1:], -1)
    return replace(rollout, pair_B=torch.empty_like(rollout.sample_id_B).scatter(0, order_B, pair_P2.flatten()))


def imitated(rollout: Rollout, rewards: TokenRewards, best: int) -> Rollout:
    """The ``best`` samples of every prompt by their total reward with all tokens marked +1, those of the others none.

    Of equals the first drawn is taken: samples of a prompt are drawn alike, so that favours none.
    """
    score_B = rewards.value_BT.sum(-1)
    kept_B = torch.zeros_like(score_B, dtype=torch.bool)
    for group in set(rollout.group_B.tolist()):
        ours = (rollout.group_B == group).nonzero().squeeze(1)
        kept_B[ours[score_B[ours].argsort(descending=True, stable=True)[:best]]] = True
    marked_BT = rollout.policy_mask_BT & kept_B[:, None]
    return replace(rollout, annotation_BT=marked_BT.to(score_B.dtype), annotated_BT=marked_BT)


def assign(rollout: Rollout, out: PolicyOutput) -> Batch:
    """The batch that a preference loss reads: a token weighs 1 / (pairs of the global batch), 0 where in no pair.

    There are no advantages. ``out`` is the policy before the update.
    """
    pair_B, mask_BT = rollout.get("pair_B"), rollout.policy_mask_BT
    logp_BT = out.get("logp_BT").detach()
    paired_BT = mask_BT & (pair_B >= 0)[:, None]
    pairs, tokens = global_sum(torch.stack([(pair_B >= 0).sum() / 2, mask_BT.sum().float()]).to(logp_BT.dtype))
    return Batch(
        adv_BT=torch.zeros_like(logp_BT),
        return_BT=torch.zeros_like(logp_BT),
        mask_BT=mask_BT,
        weight_BT=paired_BT.to(logp_BT.dtype) / pairs.clamp(min=1),
        tokens=tokens,
        group_B=rollout.group_B,
        behaviour_logp_BT=logp_BT,
        pair_B=pair_B,
    )


def adjacent(pair_B: Tensor) -> tuple[Tensor, float]:
    """Rows of all pairs, chosen and rejected in turn, and what their weights are multiplied by.

    Without any pair: one row twice, of weight 0, so that gradients of processes can meet.
    """
    rows = pair_B.argsort()[int((pair_B < 0).sum()) :].cpu()
    return (rows, 1.0) if len(rows) else (torch.zeros(2, dtype=torch.long), 0.0)


@torch.no_grad()
def measure(policy: Any, rollout: Rollout, beta: float, micro_batch: int = 64) -> dict[str, float]:
    """``preference/eval/accuracy`` and ``margin`` of stored pairs, whose rows are chosen and rejected in turn.

    Means over the pairs of all processes, with their standard errors (NaN for a single pair); a margin of 0 is half
    right. ``micro_batch`` is even.
    """
    u_B = torch.zeros(0, dtype=torch.float64, device=rollout.tokens_BT.device)
    parts = outputs(policy, rollout, {"logp", "ref_logp"}, micro_batch)
    for out, rows in zip(parts, chunks(len(rollout), micro_batch), strict=True):
        change_BT = (out.get("logp_BT") - out.get("ref_logp_BT")) * rollout.policy_mask_BT[rows]
        u_B = torch.cat([u_B, change_BT.double().sum(-1)])
    margin_P = beta * (u_B[0::2] - u_B[1::2])
    values: dict[str, float] = {}
    for name, x_P in (("accuracy", (margin_P.sign() + 1) / 2), ("margin", margin_P)):
        count, total, square = global_sum(torch.stack([torch.ones_like(x_P).sum(), x_P.sum(), (x_P**2).sum()])).tolist()
        mean = total / count
        spread = max(square / count - mean**2, 0.0)
        key = f"preference/eval/{name}"
        values |= {key: mean, f"{key}_stderr": math.sqrt(spread / (count - 1)) if count > 1 else math.nan}
    return values

"""Evaluation on fixed held-out prompts at temperature 1: canonical KL, rewards, diversity.

The randomness is the same at every evaluation, so that two evaluations differ by their policies alone.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from rlkl import sharding
from rlkl.policy import Policy
from rlkl.reduce import global_sum
from rlkl.sampling import EVALUATE, Prompts, sample
from rlkl.statistics import diversity
from rlkl.types import End, Need, PolicyOutput, Rollout, TokenRewards


@dataclass(frozen=True)
class Evaluation:
    """Metrics, and what they were computed on."""

    metrics: dict[str, float]
    rollout: Rollout
    rewards: TokenRewards
    kl_BT: Tensor
    logp_BT: Tensor
    ref_logp_BT: Tensor


@torch.no_grad()
def evaluate(
    policy: Policy,
    reward: Callable[[Rollout], TokenRewards] | None,
    prompts: Prompts,
    *,
    samples_per_prompt: int,
    max_new_tokens: int,
    eos_ids: list[int],
    stop: Sequence[str] = (),
    seed: int,
    micro_batch: int = 64,
) -> Evaluation:
    """Evaluate a policy against its reference.

    ``kl/sequence`` is the mean over prompts of the sum of exact token KLs along the policy's own samples, nats a
    sequence: unbiased for the sequence KL and of far lower variance than k1. Standard errors are over prompts.
    Without a ``reward`` there is nothing of rewards in the result.
    """
    rollout = sample(
        policy,
        prompts,
        samples_per_prompt=samples_per_prompt,
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        stop=stop,
        seed=seed,
        step=0,
        stream=EVALUATE,
        micro_batch=4 * micro_batch,
    )
    parts = outputs(policy, rollout, {"kl", "entropy", "logp", "ref_logp"}, micro_batch)
    kl_BT, entropy_BT, logp_BT, ref_logp_BT = (join(parts, f"{x}_BT") for x in ("kl", "entropy", "logp", "ref_logp"))
    rewards = reward(rollout) if reward else TokenRewards(torch.zeros_like(kl_BT), torch.zeros_like(kl_BT).bool())
    sums = [rollout.length_B.sum(), kl_BT.sum(), entropy_BT.sum(), (rollout.end_B != End.LIMIT).sum()]
    counts = [rollout.length_B.new_tensor(len(rollout)), rollout.length_B.new_tensor(rewards.queries)]
    tokens, kl, entropy, terminated, sequences, queries = global_sum(
        torch.stack([x.double() for x in (*sums, *counts)])
    ).tolist()
    metrics = {
        **over_prompts("kl/sequence", kl_BT.sum(-1), rollout),
        "kl/token": kl / tokens,
        "policy/eval/entropy": entropy / tokens,
        "policy/eval/length": tokens / sequences,
        "policy/eval/terminated": terminated / sequences,
        "reward/eval/queries": queries,
        **_diversity(gather_object(rollout.completion_ids())),
    }
    for name, share_BT in rewards.shares.items():
        metrics |= over_prompts(f"reward/eval/{name}", share_BT.sum(-1), rollout)
    return Evaluation(metrics, rollout, rewards, kl_BT, logp_BT, ref_logp_BT)


def by_prompt(result: Evaluation) -> dict[str, Any]:
    """An evaluation prompt by prompt, and its KL token by token: a row of evaluations.jsonl, of all processes.

    ``prompts`` are fingerprints of their texts, by which the runs of a comparison are paired; ``kl`` (nats a sequence)
    and ``reward/<source>`` are means over a prompt's samples. ``kl_position[t]`` is the mean exact KL of token t over
    the ``reached[t]`` samples that have one.
    """
    rollout = result.rollout
    order, group_B, count = torch.unique(rollout.group_B, return_inverse=True, return_counts=True)
    sums = {"kl": result.kl_BT, **{f"reward/{name}": share_BT for name, share_BT in result.rewards.shares.items()}}
    first = [rollout.group_B.tolist().index(g) for g in order.tolist()]
    mine = {
        "prompts": [hashlib.sha256(rollout.columns["prompt"][i].encode()).hexdigest()[:12] for i in first],
        **{
            name: (x_BT.new_zeros(len(count)).index_add(0, group_B, x_BT.sum(-1)) / count).tolist()
            for name, x_BT in sums.items()
        },
    }
    parts = gather_object([(mine, result.kl_BT.double().sum(0).tolist(), rollout.policy_mask_BT.sum(0).tolist())])
    kls, reached = ([sum(x) for x in itertools.zip_longest(*(p[k] for p in parts), fillvalue=0)] for k in (1, 2))
    return {
        **{name: [x for part, *_ in parts for x in part[name]] for name in mine},
        "kl_position": [kl / n for kl, n in zip(kls, reached, strict=True) if n],
        "reached": [n for n in reached if n],
    }


def _diversity(completions: list[list[int]]) -> dict[str, float]:
    """How much the completions of an evaluation differ from each other."""
    shares = {f"policy/eval/distinct_{n}": diversity.distinct(completions, n) for n in (1, 2, 3)}
    return {**shares, "policy/eval/self_bleu": diversity.self_bleu(completions)}


def over_prompts(name: str, x_B: Tensor, rollout: Rollout) -> dict[str, float]:
    """Mean over prompts, with its standard error over prompts (NaN for a single prompt)."""
    _, group_B, count = torch.unique(rollout.group_B, return_inverse=True, return_counts=True)
    mean_G = x_B.new_zeros(len(count)).index_add(0, group_B, x_B) / count
    prompts, total, square = global_sum(
        torch.stack([mean_G.new_tensor(float(len(mean_G))), mean_G.sum(), (mean_G**2).sum()]).double()
    ).tolist()
    mean = total / prompts
    spread = max(square / prompts - mean**2, 0.0)
    return {name: mean, f"{name}_stderr": math.sqrt(spread / (prompts - 1)) if prompts > 1 else math.nan}


def chunks(total: int, size: int) -> list[Tensor]:
    """Row indices in consecutive pieces."""
    return [torch.arange(start, min(start + size, total)) for start in range(0, total, size)]


def outputs(policy: Any, rollout: Rollout, need: set[Need], size: int) -> list[PolicyOutput]:
    """What a policy says of consecutive micro-batches."""
    each = ((policy(rollout.rows(i), need), mine) for i, mine in sharding.together(policy, chunks(len(rollout), size)))
    return [out for out, mine in each if mine]


def join(parts: list[PolicyOutput], name: str) -> Tensor:
    """One field of the outputs of consecutive micro-batches."""
    return torch.cat([part.get(name) for part in parts])

"""Several sources to one TokenRewards: the weighted sum, with every source's share kept."""

from collections.abc import Callable, Mapping

import torch

from rlkl.types import Rollout, TokenRewards

Reward = Callable[[Rollout], TokenRewards]


def combine(sources: Mapping[str, tuple[Reward, float]], rollout: Rollout) -> TokenRewards:
    """``sum_k weight_k * r_k``; a position is scored where any source scores it; queries add up."""
    parts = {name: (reward(rollout), weight) for name, (reward, weight) in sources.items()}
    shares = {name: weight * part.value_BT for name, (part, weight) in parts.items()}
    scored_BT = torch.stack([part.scored_BT for part, _ in parts.values()]).any(0)
    queries = sum(part.queries for part, _ in parts.values())
    return TokenRewards(torch.stack(list(shares.values())).sum(0), scored_BT, shares, queries)

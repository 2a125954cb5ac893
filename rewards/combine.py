"""Several sources to one reward: their weighted sum, with what every source gave kept apart."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from rlkl.types import Rollout, TokenRewards

Reward = Callable[[Rollout], TokenRewards]


class WeightedSum:
    """``sum_k weight_k * r_k``; a position is scored where any source scores it; queries add up.

    A source of weight 0 is only watched: it teaches nothing, so it scores no position for credit, and its queries are
    not counted.
    """

    def __init__(self, sources: Mapping[str, tuple[Reward, float]]) -> None:
        self.sources = sources

    def __call__(self, rollout: Rollout) -> TokenRewards:
        """The sum; ``shares`` hold what each source gave, before its weight."""
        if not self.sources:  # preferences need none
            none_BT = torch.zeros_like(rollout.policy_mask_BT)
            return TokenRewards(none_BT.to(torch.get_default_dtype()), none_BT)
        parts = {name: reward(rollout) for name, (reward, _) in self.sources.items()}
        weighted = [weight * parts[name].value_BT for name, (_, weight) in self.sources.items()]
        counted = [part.scored_BT if self.sources[n][1] else part.scored_BT & False for n, part in parts.items()]
        return TokenRewards(
            value_BT=torch.stack(weighted).sum(0),
            scored_BT=torch.stack(counted).any(0),
            shares={name: part.value_BT for name, part in parts.items()},
            queries=sum(parts[name].queries for name, (_, weight) in self.sources.items() if weight),
        )

    def annotate(self, rollout: Rollout) -> Rollout:
        """The rollout with whole spans as token weights, from the sources that have them; else as it is."""
        marked = [(w, r.annotate(rollout)) for r, w in self.sources.values() if w and hasattr(r, "annotate")]
        if not marked:
            return rollout
        return replace(
            rollout,
            annotation_BT=torch.stack([weight * part.annotation_BT for weight, part in marked]).sum(0),
            annotated_BT=torch.stack([part.annotated_BT for _, part in marked]).any(0),
        )

    def bind(self, policy: Callable[..., Any]) -> None:
        """Give the sources that score by the run's reference the policy that holds it."""
        for reward, _ in self.sources.values():
            if hasattr(reward, "bind"):
                reward.bind(policy)

    def at(self, step: int) -> None:
        """Tell the sources that follow a schedule which training step it is; 0 is before the first."""
        for reward, _ in self.sources.values():
            if hasattr(reward, "at"):
                reward.at(step)

    def probe(self, rollout: Rollout) -> None:
        """Let the sources that could look ahead prove that they do not; no queries are counted.

        Raises:
            ValueError: a reward reads later tokens.
        """
        for reward, _ in self.sources.values():
            if hasattr(reward, "probe"):
                reward.probe(rollout)

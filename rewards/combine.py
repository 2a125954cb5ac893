"""Several sources to one reward: their weighted sum, with what every source gave kept apart.

A source is called with a rollout and gives its rewards. What else it may have is optional, and called where it has it:

======================================  ===============================================================================
``check(tokenizer)``                    is the policy's tokenizer one that it can read?
``bind(policy)``                        the policy, whose reference it may score by
``probe(rollout)``                      prove on a few samples, before the start, that it is causal
``at(step)``                            which training step it is
``annotate(rollout)``                   whole spans as token weights, for likelihood
``prepare(samples, seed)``              learn before the first step; ``samples(k)`` draws the k-th batch, from 0, of the
                                        untrained policy's completions of training prompts
``learn(rollout, step)``                learn from a training step's samples, after the policy's update
``state_dict()``, ``load_state_dict()`` what it has learned: key -> tensor, or what JSON holds
======================================  ===============================================================================

``prepare`` and ``learn`` return numbers that are the same on every process, which all call them: ``labels`` and
``queries`` that were asked for are counted; ``anew``, where it is not 0, says that scores have other units from now on;
others are logged as ``reward/learn/<source>/<name>``.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from rlkl.rewards.spread import Spread
from rlkl.types import Rollout, TokenRewards

Reward = Callable[[Rollout], TokenRewards]
COUNTED = ("labels", "queries")


class WeightedSum:
    """``sum_k weight_k * clip_k(r_k) / std_k``; a position is scored where any source scores it; queries add up.

    ``clips`` are the sources whose rewards are clipped, each at its bound. Of those in ``spreads`` the running
    standard deviation divides what they give: that of all training samples so far, this batch included, or of those
    since the source learned anew, whose scores have other units then; before the first, the batch's own. A source of
    weight 0 is only watched: it teaches nothing, so it scores no position for credit, and its queries and labels are
    not counted.
    """

    def __init__(
        self,
        sources: Mapping[str, tuple[Reward, float]],
        clips: Mapping[str, float] | None = None,
        spreads: Mapping[str, Spread] | None = None,
    ) -> None:
        self.sources = sources
        self.clips = clips or {}
        self.spreads = spreads or {}

    def __call__(self, rollout: Rollout, training: bool = False) -> TokenRewards:
        """The sum; ``shares`` hold what each source gave, clipped. Samples of ``training`` enter the statistics."""
        if not self.sources:  # preferences need none
            none_BT = torch.zeros_like(rollout.policy_mask_BT)
            return TokenRewards(none_BT.to(torch.get_default_dtype()), none_BT)
        parts = {name: reward(rollout) for name, (reward, _) in self.sources.items()}
        shares = {name: self._clipped(name, part.value_BT) for name, part in parts.items()}
        factors = {name: self._factor(name, share_BT, training) for name, share_BT in shares.items()}
        asked = [part for name, part in parts.items() if self.sources[name][1]]
        counted = [part.scored_BT & bool(self.sources[name][1]) for name, part in parts.items()]
        return TokenRewards(
            value_BT=torch.stack([factors[name] * share_BT for name, share_BT in shares.items()]).sum(0),
            scored_BT=torch.stack(counted).any(0),
            shares=shares,
            factors=factors,
            queries=sum(part.queries for part in asked),
            labels=sum(part.labels for part in asked),
        )

    def share(self, name: str, rollout: Rollout) -> Tensor:
        """What one source gives, clipped, ``[B, T]``."""
        return self._clipped(name, self.sources[name][0](rollout).value_BT)

    def annotate(self, rollout: Rollout) -> Rollout:
        """The rollout with whole spans as token weights, from the sources that have them; else as it is.

        They are clipped as rewards are, and divided by the same standard deviations.
        """
        marked = {n: r.annotate(rollout) for n, (r, w) in self.sources.items() if w and hasattr(r, "annotate")}
        if not marked:
            return rollout
        weights = [
            self.sources[name][1] / self._std(name) * self._clipped(name, part.get("annotation_BT"))
            for name, part in marked.items()
        ]
        return replace(
            rollout,
            annotation_BT=torch.stack(weights).sum(0),
            annotated_BT=torch.stack([part.get("annotated_BT") for part in marked.values()]).any(0),
        )

    def bind(self, policy: Callable[..., Any]) -> None:
        """Give the sources that score by the run's reference the policy that holds it."""
        for reward, _ in self.sources.values():
            if hasattr(reward, "bind"):
                reward.bind(policy)

    def at(self, step: int) -> dict[str, float]:
        """Tell the sources that follow a schedule which training step it is; 0 is before the first.

        Returns:
            What they then go by, as metrics.
        """
        told = [reward.at(step) for reward, _ in self.sources.values() if hasattr(reward, "at")]
        return {name: x for metrics in told for name, x in metrics.items()}

    def probe(self, rollout: Rollout) -> None:
        """Let the sources that could look ahead prove that they do not; no queries are counted.

        Raises:
            ValueError: a reward reads later tokens.
        """
        for reward, _ in self.sources.values():
            if hasattr(reward, "probe"):
                reward.probe(rollout)

    def prepare(self, samples: Callable[[int], Rollout], seed: int) -> dict[str, float]:
        """Let the sources that learn do so before the first step; counts and metrics.

        Raises:
            RunError: a labeller or a training failed.
        """
        return self._taught("prepare", samples, seed)

    def learn(self, rollout: Rollout, step: int) -> dict[str, float]:
        """Let them learn from the samples of a training step; counts and metrics.

        Raises:
            RunError: as above.
        """
        return self._taught("learn", rollout, step)

    @property
    def spent(self) -> dict[str, int]:
        """Source -> labels that it has learned from in this run."""
        return {name: getattr(reward, "spent", 0) for name, (reward, _) in self.sources.items()}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What every source has learned, and the statistics of those that are whitened: source -> key -> value."""
        state: dict[str, dict[str, Any]] = {}
        for name, (reward, _) in self.sources.items():
            own = reward.state_dict() if hasattr(reward, "state_dict") else {}
            spread = {"spread": asdict(self.spreads[name])} if name in self.spreads else {}
            if own or spread:
                state[name] = {**own, **spread}
        return state

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what :meth:`state_dict` gave."""
        for name, held in state.items():
            own = {key: value for key, value in held.items() if key != "spread"}
            if "spread" in held:
                vars(self.spreads[name]).update(held["spread"])
            if own:
                source: Any = self.sources[name][0]
                source.load_state_dict(own)

    def _taught(self, how: str, *given: Any) -> dict[str, float]:
        values: dict[str, float] = dict.fromkeys(COUNTED, 0.0)
        for name, (reward, weight) in self.sources.items():
            if hasattr(reward, how):
                learned = getattr(reward, how)(*given)
                if learned.pop("anew", 0) and name in self.spreads:
                    vars(self.spreads[name]).update(asdict(Spread()))
                for key, value in learned.items():
                    if key not in COUNTED:
                        values[f"reward/learn/{name}/{key}"] = value
                    elif weight:
                        values[key] += value
        return values

    def _clipped(self, name: str, value_BT: Tensor) -> Tensor:
        clip = self.clips.get(name)
        return value_BT if clip is None else value_BT.clamp(-clip, clip)

    def _factor(self, name: str, share_BT: Tensor, training: bool) -> float:
        """What a source's rewards are multiplied by."""
        if name in self.spreads:
            sum_B = share_BT.sum(-1)
            if training:
                self.spreads[name].add(sum_B)
            elif not self.spreads[name].count:
                before = Spread()
                before.add(sum_B)
                return self.sources[name][1] / before.std
        return self.sources[name][1] / self._std(name)

    def _std(self, name: str) -> float:
        return self.spreads[name].std if name in self.spreads else 1.0

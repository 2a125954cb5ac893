"""Where rewards come from: causal ``[B, T]`` rewards, whatever the source. Imported as ``rlkl.rewards`` only."""

if __name__ != "rlkl.rewards":
    raise ImportError(f"{__name__}: import this package as rlkl.rewards")

from collections.abc import Mapping
from typing import Any

from rlkl.config import LearnedSource, Source
from rlkl.rewards.annotations import AnnotationReward
from rlkl.rewards.combine import WeightedSum
from rlkl.rewards.counterfactual import CounterfactualReward
from rlkl.rewards.function import FunctionReward
from rlkl.rewards.learned import LearnedReward
from rlkl.rewards.overseer import OverseerReward
from rlkl.rewards.spread import Spread
from rlkl.rewards.taught import TaughtReward


def learned(name: str, config: LearnedSource) -> LearnedReward | TaughtReward:
    """A reward model, ready-made or taught in the course of the run."""
    return LearnedReward(name, config) if config.labeller is None else TaughtReward(name, config)


REWARDS: dict[str, Any] = {
    "function": FunctionReward,
    "annotations": AnnotationReward,
    "learned": learned,
    "counterfactual": CounterfactualReward,
    "overseer": OverseerReward,
}


def build(configs: Mapping[str, Source]) -> WeightedSum:
    """The reward of a run from its ``rewards:`` section.

    Raises:
        ValueError: a source cannot be used as configured.
    """
    sources = {name: (REWARDS[c.type](name, c), c.weight) for name, c in configs.items()}
    clips = {n: c.clip for n, c in configs.items() if c.clip is not None and not getattr(sources[n][0], "clips", False)}
    return WeightedSum(sources, clips, {name: Spread() for name, c in configs.items() if c.whiten})


def check(reward: WeightedSum, tokenizer: Any) -> None:
    """Let the sources that read token ids check that the policy's tokenizer gives them the same meaning.

    Raises:
        ValueError: it does not.
    """
    for source, _ in reward.sources.values():
        if hasattr(source, "check"):
            source.check(tokenizer)


def judges(reward: WeightedSum) -> WeightedSum | None:
    """The sources of a reward that can judge new samples, those that read stored spans left out; None without any."""
    able = {name: pair for name, pair in reward.sources.items() if not getattr(pair[0], "stored", False)}
    return WeightedSum(able, reward.clips, reward.spreads) if able else None


__all__ = ["REWARDS", "WeightedSum", "build", "check", "judges"]

"""Whether a run has reached a cap of ``train.budget``: a function of what it has used, so a resumed run ends alike."""

from collections.abc import Iterator

import torch

from rlkl.config.budget import asked, drawn, judged, learned
from rlkl.lane import Lane
from rlkl.reduce import global_max


def reached(lane: Lane) -> str | None:
    """The first cap that one more step could pass, or None; before the first step none is."""
    caps, rest = lane.config.train.budget, lane.step
    if not rest:
        return None
    count = lane.config.rollout.prompts
    stored = 0 if lane.stored is None else lane.stored.used(rest + 1, count) - count
    after = {
        "tokens": lane.generated + drawn(lane.config),
        "queries": lane.queries + asked(lane.config) + stored,
        "labels": lane.labels + judged(lane.config) + stored + learned(lane.config, rest + 1, lane.reward.spent),
        "steps": rest + 1,
        "seconds": lane.seconds * (rest + 1) / rest,
    }
    passed = (name for name, much in after.items() if (cap := getattr(caps, name)) is not None and much > cap)
    return next(passed, None)


def told(lane: Lane, bound: str | None) -> Iterator[str]:
    """What the terminal says where a cap ends a run."""
    if bound is not None:
        cap = getattr(lane.config.train.budget, bound)
        yield f"ended after step {lane.step} of {lane.config.train.steps}: train.budget.{bound}={cap:.12g}"


def together(seconds: float, device: torch.device) -> float:
    """The seconds of the slowest process, so that all of them end at the same step."""
    return float(global_max(torch.tensor(seconds, device=device)))

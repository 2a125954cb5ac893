"""Sources of rewards that learn, before the first step and in the course of a run, and what they ask for."""

import time
from collections.abc import Callable

from rlkl import RunError, Stopped
from rlkl.lane import Lane, draw
from rlkl.sampling import PREPARE
from rlkl.types import Rollout

QUIET = 10.0
"""Seconds between two lines of progress before the first step."""


def prepare(lane: Lane, asked: Callable[[], int] = int, say: Callable[[str], object] = str) -> dict[str, float]:
    """Let them learn from samples of the untrained policy, ``say`` how far they are: metrics and counts, if any did.

    Raises:
        RunError: a labeller or a training failed.
        Stopped: ``asked()`` gave an exit code; of what they learned nothing is kept.
    """
    wanted = sum(source.taught[0] for source in lane.config.rewards.values())
    each, said = lane.config.rollout.prompts * lane.config.samples, time.monotonic()

    def samples(k: int) -> Rollout:
        nonlocal said
        if k and (now := time.monotonic()) - said >= QUIET:
            said = now
            say(f"before the first step: asked about {k * each:,} samples so far; {wanted:,} labels are wanted")
        if code := asked():
            raise Stopped("stopped before the first step", code, said=lane.rank != 0)
        prompts = lane.train_prompts.batch(k + 1, lane.config.rollout.prompts)
        return draw(lane, prompts.part(lane.rank, lane.ranks), k, PREPARE)

    try:
        learned = lane.reward.prepare(samples, lane.config.seed)
    except RunError as error:
        raise type(error)(f"before the first step: {error}") from error
    counts = count(lane, learned, 0, 0, 0)
    return {**counts, **learned} if learned else {}


def learn(lane: Lane, rollout: Rollout, step: int) -> dict[str, float]:
    """Let them learn from the samples of a training step: metrics, and the counts ``queries`` and ``labels``.

    Raises:
        RunError: as above.
    """
    try:
        return lane.reward.learn(rollout, step)
    except RunError as error:
        raise type(error)(f"step {step}: {error}") from error


def count(lane: Lane, learned: dict[str, float], queries: float, labels: float, step: int) -> dict[str, float]:
    """Add what was asked for, also by sources that learned, whose counts are taken out; the counts so far."""
    lane.queries += int(queries + learned.pop("queries"))
    lane.labels += int(labels + learned.pop("labels"))
    used = 0 if lane.stored is None else lane.stored.used(step, lane.config.rollout.prompts)
    return {"reward/queries": float(lane.queries + used), "reward/labels": float(lane.labels + used)}

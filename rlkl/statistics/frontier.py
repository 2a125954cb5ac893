"""A run as a line of reward against the root of KL, in which rewards start out close to linear (Gao et al. 2022).

A line goes straight from one evaluation to the next in the root of KL, and at every KL counts where it *first* gets
there. Before its first evaluation it is level. KL in nats a sequence; negative estimates count as 0.
"""

import math
from collections.abc import Sequence


def crossing(kls: Sequence[float], target: float) -> tuple[int, float] | None:
    """Where a run first gets to a KL: the index of the evaluation behind it, and the share of the way to there.

    None where it never gets there.
    """
    for i, kl in enumerate(kls):
        if kl >= target:
            if i == 0:
                return 0, 1.0
            low, high = (math.sqrt(max(x, 0.0)) for x in kls[i - 1 : i + 1])
            return i, (math.sqrt(target) - low) / (high - low)
    return None


def at_kl(kls: Sequence[float], rewards: Sequence[float], target: float) -> float | None:
    """The reward where a run first gets to a KL; None where it never does."""
    place = crossing(kls, target)
    if place is None:
        return None
    i, share = place
    return rewards[i] if i == 0 else rewards[i - 1] + share * (rewards[i] - rewards[i - 1])


def at_reward(kls: Sequence[float], rewards: Sequence[float], target: float) -> float | None:
    """The KL at which a run first gets to a reward, in nats; None where it never does."""
    roots = [math.sqrt(max(kl, 0.0)) for kl in kls]
    for i, reward in enumerate(rewards):
        if reward >= target:
            if i == 0:
                return roots[0] ** 2
            share = (target - rewards[i - 1]) / (reward - rewards[i - 1])
            return (roots[i - 1] + share * (roots[i] - roots[i - 1])) ** 2
    return None


def at_spent(spent: Sequence[float], rewards: Sequence[float], target: float) -> float | None:
    """The reward where a run has spent so much (tokens, labels), linearly; None where it never does.

    What it reached without spending more counts: a reward model may take all its labels before the first step.
    """
    if not spent or spent[-1] < target:
        return None
    i = max((k for k, x in enumerate(spent) if x <= target), default=0)
    if i + 1 == len(spent) or spent[i] >= target:
        return rewards[i]
    share = (target - spent[i]) / (spent[i + 1] - spent[i])
    return rewards[i] + share * (rewards[i + 1] - rewards[i])


def area(kls: Sequence[float], rewards: Sequence[float], limit: float) -> float:
    r"""Mean height :math:`\frac1{\sqrt L}\int_0^{\sqrt L}R(d)\,dd` of the line up to a KL, in the unit of the reward.

    A line that ends short of the limit is level from its furthest evaluation on: whoever may spend L nats need not.

    Args:
        kls: of the evaluations, nats, in their order.
        rewards: of the same evaluations.
        limit: L, nats.

    Raises:
        ValueError: the limit is not above 0.
    """
    if not limit > 0:
        raise ValueError(f"area: limit={limit:g} nats; give a KL above 0")
    roots, end, so_far, total = [math.sqrt(max(kl, 0.0)) for kl in kls], math.sqrt(limit), 0.0, 0.0
    for i, root in enumerate(roots):
        if root <= so_far:
            continue
        before, start = (rewards[i], 0.0) if i == 0 else (rewards[i - 1], roots[i - 1])
        slope = (rewards[i] - before) / (root - start)
        left, right = so_far, min(root, end)
        middle = before + slope * ((left + right) / 2 - start)
        total, so_far = total + middle * (right - left), right
        if so_far == end:
            return total / end
    furthest = roots.index(max(roots))  # the first to get there, as everywhere on the line
    return (total + rewards[furthest] * (end - so_far)) / end


def share(value: float, low: float, high: float) -> float | None:
    """How far a value is from ``low`` (0) to ``high`` (1); None where they are equal."""
    return None if high == low else (value - low) / (high - low)

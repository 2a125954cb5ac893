"""Two arms against each other: of other seeds, of other prompts, and of all pairs at once."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from rlkl.statistics.intervals import FEWEST, LEVEL, Floats, Interval, bounds, finite, interval, level


class Difference(NamedTuple):
    """A difference of means, its interval and the two-sided p-value of no difference, both None where there is none."""

    difference: float
    interval: Interval | None
    p: float | None


def difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    r"""Welch's t: :math:`\bar b-\bar a\pm t_\nu\sqrt{s_a^2/n_a+s_b^2/n_b}`, in the unit of the values.

    No interval and no test of fewer than 3 seeds in an arm, or where no seed differs in either.

    Raises:
        ValueError: a value is not finite.
    """
    one, other = finite(a), finite(b)
    value = float(other.mean() - one.mean())
    if min(len(one), len(other)) < FEWEST or (level(one) and level(other)):
        return Difference(value, None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of an arm whose seeds are equal
        test = stats.ttest_ind(other, one, equal_var=False)
    low, high = test.confidence_interval(LEVEL)
    return Difference(value, Interval(float(low), float(high)), float(test.pvalue))


def paired(changes: Sequence[float]) -> Difference:
    r"""The mean change of seeds, :math:`\bar d\pm t_{n-1}s_d/\sqrt n`, in the unit of the values; p of its t test.

    No interval and no test of fewer than 3 seeds, or where they are all equal.

    Raises:
        ValueError: a value is not finite.
    """
    row = finite(changes)
    if len(row) < FEWEST or level(row):
        return Difference(float(row.mean()), None, None)
    return Difference(float(row.mean()), interval(changes), float(stats.ttest_1samp(row, 0.0).pvalue))


def improvement(a: Sequence[float], b: Sequence[float]) -> float:
    r"""Probability of improvement :math:`P(B>A)+\tfrac12P(B=A)` over all pairs of seeds (Agarwal et al. 2021).

    Raises:
        ValueError: a value is not finite.
    """
    above_AB = finite(b)[None, :] - finite(a)[:, None]
    return float(((above_AB > 0) + 0.5 * (above_AB == 0)).mean())


def improvement_interval(a: Sequence[float], b: Sequence[float]) -> Interval | None:
    r"""The 95 % interval of the probability of improvement; None of fewer than 3 seeds in an arm.

    Newcombe's (2006, method 5): all :math:`\theta` with :math:`(\hat\theta-\theta)^2\le z^2V(\theta)`,
    :math:`V=\theta(1-\theta)\,[1+(m-1)(\frac{1-\theta}{2-\theta}+\frac{\theta}{1+\theta})]/(n_an_b)`,
    :math:`m=(n_a+n_b)/2`. It keeps a width where all seeds of an arm are above all of the other; a bootstrap, which
    draws only what it has seen, does not.

    Raises:
        ValueError: a value is not finite.
    """
    if min(len(a), len(b)) < FEWEST:
        return None
    return newcombe(improvement(a, b), len(a), len(b))


def newcombe(theta: float, n: int, m: int) -> Interval:
    """The interval of :func:`improvement_interval` from the estimate and the numbers of seeds."""
    z, mid = float(stats.norm.ppf(0.5 + LEVEL / 2)), (n + m) / 2

    def gap(x: float) -> float:
        spread = x * (1 - x) * (1 + (mid - 1) * ((1 - x) / (2 - x) + x / (1 + x))) / (n * m)
        return abs(theta - x) - z * math.sqrt(spread)

    edge = 1e-9  # at 0 and 1 the variance is 0 and the gap has a root that bounds nothing
    low = 0.0 if theta == 0 else float(optimize.brentq(gap, 0.0, min(theta, 1 - edge)))
    high = 1.0 if theta == 1 else float(optimize.brentq(gap, max(theta, edge), 1.0))
    return Interval(low, high)


def prompts(a: Mapping[str, float], b: Mapping[str, float]) -> Difference | None:
    """Of the same runs on other prompts: the mean over prompts of the paired differences b - a, by their names.

    BCa over prompts, p of the paired t test. Seeds play no part: this is what another choice of held-out prompts could
    change. None of fewer than 3 prompts in common.

    Raises:
        ValueError: a value is not finite.
    """
    both = sorted(set(a) & set(b))
    if len(both) < FEWEST:
        return None
    change_P = finite([b[name] - a[name] for name in both])
    low, high = bounds(change_P, "bca", "mean")
    p = float(stats.ttest_1samp(change_P, 0.0).pvalue) if not level(change_P) else None
    return Difference(float(change_P.mean()), Interval(float(low), float(high)), p)


def holm(p: Sequence[float]) -> list[float]:
    r"""Holm's adjusted p-values (1979): :math:`\max_{j\le i}\min(1,(m-j+1)\,p_{(j)})`, in the order given.

    Raises:
        ValueError: a p-value is not between 0 and 1.
    """
    row = finite(p)
    if ((row < 0) | (row > 1)).any():
        raise ValueError(f"holm: p={row[(row < 0) | (row > 1)][0]:g} is no p-value; give values from 0 to 1")
    order = np.argsort(row, kind="stable")
    steps: Floats = np.maximum.accumulate(np.minimum(1.0, row[order] * np.arange(len(row), 0, -1)))
    adjusted = np.empty_like(steps)
    adjusted[order] = steps
    return [float(x) for x in adjusted]


def pair(a: str, b: str, one: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Two arms by what their seeds gave, the second less the first: Welch's test, and the probability of improvement.

    Raises:
        ValueError: a value is not finite.
    """
    return {
        "a": a,
        "b": b,
        "n": [len(one), len(other)],
        **difference(one, other)._asdict(),
        "improvement": improvement(one, other),
        "improvement_interval": improvement_interval(one, other),
    }


def corrected(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Comparisons that answer one question together: each with ``p_holm``, Holm's of its ``p``; None where that is."""
    tested = iter(holm([pair["p"] for pair in pairs if pair["p"] is not None]))
    return [{**pair, "p_holm": None if pair["p"] is None else next(tested)} for pair in pairs]

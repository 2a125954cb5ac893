"""How often 95 % intervals of few seeds hold what they are about: measured by simulation, and printed beside them.

``python -m benchmarks.coverage`` measures; ``MEASURED`` is what it gave.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats

from rlkl.statistics.intervals import LEVEL, Floats, Method, Of, bounds
from rlkl.statistics.pairwise import newcombe

SEEDS = (3, 4, 5, 7, 10, 20)
RESAMPLES = 1999
"""Of a bootstrap that is measured: a fifth of those of one that is reported, 4000 times."""


class Law(NamedTuple):
    """What a seed may give: its quantile function, mean and interquartile mean."""

    quantile: Callable[[Floats], Floats]
    mean: float
    iqm: float


def _collapse(u: Floats) -> Floats:
    """One seed in five collapses to 0-0.2, the others are even between 0.8 and 1.2."""
    return np.where(u < 0.2, u, 0.8 + 0.5 * (u - 0.2))


LAWS = {
    "normal": Law(stats.norm.ppf, 0.0, 0.0),
    "skewed": Law(stats.expon.ppf, 1.0, 2 * (0.5 - 0.75 * np.log(0.75) + 0.25 * np.log(0.25))),
    "collapse": Law(_collapse, 0.82, 0.95),
}
"""Laws of a seed: a bell, an exponential, and one of which a fifth of the seeds collapse."""


DEFAULT: Method = "t"
"""Of 3 seeds the only one that holds as often as it says; of 20 as good as the others."""


def _row(*shares: float) -> dict[int, float]:
    return dict(zip(SEEDS, shares, strict=True))


MEASURED: dict[str, dict[str, dict[int, float]]] = {
    "mean, t": {
        "normal": _row(0.956, 0.95625, 0.9525, 0.95575, 0.95225, 0.94775),
        "skewed": _row(0.8935, 0.88975, 0.885, 0.894, 0.90775, 0.91725),
        "collapse": _row(0.86725, 0.806, 0.75775, 0.79825, 0.88775, 0.925),
    },
    "iqm, t": {
        "normal": _row(0.95475, 0.92125, 0.892, 0.9255, 0.92675, 0.93175),
        "skewed": _row(0.9355, 0.90775, 0.87325, 0.9105, 0.91525, 0.9165),
        "collapse": _row(0.94725, 0.9125, 0.89425, 0.934, 0.937, 0.94775),
    },
    "difference, welch": {
        "normal": _row(0.96575, 0.9615, 0.95575, 0.95775, 0.951, 0.9545),
        "skewed": _row(0.9755, 0.9725, 0.97425, 0.9725, 0.96375, 0.9585),
        "collapse": _row(0.982, 0.9855, 0.9795, 0.97575, 0.96275, 0.959),
    },
    "difference, paired t": {
        "normal": _row(0.95525, 0.9435, 0.94775, 0.9535, 0.95225, 0.95775),
        "skewed": _row(0.96525, 0.96325, 0.96525, 0.96275, 0.9595, 0.95725),
        "collapse": _row(0.9785, 0.979, 0.979, 0.969, 0.95525, 0.95625),
        "normal, 4 combinations": _row(0.957, 0.944, 0.95775, 0.94875, 0.95675, 0.94525),
        "skewed, 4 combinations": _row(0.95525, 0.9525, 0.9545, 0.95525, 0.95275, 0.94825),
        "collapse, 4 combinations": _row(0.95825, 0.952, 0.9545, 0.948, 0.9505, 0.93975),
    },
    "improvement, newcombe": {
        "P = 0.5": _row(0.90325, 0.94475, 0.94175, 0.953, 0.94925, 0.953),
        "P = 0.75": _row(0.974, 0.9575, 0.97225, 0.97275, 0.95325, 0.96225),
        "P = 0.95": _row(0.9565, 0.95075, 0.968, 0.961, 0.96625, 0.97125),
    },
}
"""Of what comparisons report; benchmarks/baselines/coverage.json has the bootstraps too."""


def measured(name: str, n: int) -> tuple[int, dict[str, float]]:
    """How often an interval held, by law, at n seeds or at the next fewer that were simulated; with their number.

    Raises:
        ValueError: fewer seeds than were simulated.
    """
    if n < SEEDS[0]:
        raise ValueError(f"coverage: n={n}; it was measured from {SEEDS[0]} seeds on")
    seeds = max(k for k in SEEDS if k <= n)
    return seeds, {law: by[seeds] for law, by in MEASURED[name].items()}


def coverage(method: Method, n: int, law: str = "normal", trials: int = 4000, of: Of = "mean", seed: int = 0) -> float:
    """The share of simulated sets of n seeds whose interval holds the mean or interquartile mean of the law.

    Raises:
        ValueError: fewer than 2 seeds, or no such law.
    """
    if n < 2 or law not in LAWS:
        raise ValueError(f"coverage: n={n}, law={law}; give 2 seeds or more, and one of {', '.join(LAWS)}")
    made = LAWS[law]
    truth = made.mean if of == "mean" else made.iqm
    held = []
    for values_TN in _pieces(made, (trials, n), seed):
        low_T, high_T = bounds(values_TN, method, of, RESAMPLES)
        held.append((low_T <= truth) & (truth <= high_T))
    return float(np.concatenate(held).mean())


def coverage_of_difference(n: int, law: str = "normal", trials: int = 4000, seed: int = 0) -> float:
    """The share of simulated pairs of arms of n seeds whose Welch interval holds the difference, which is 0.

    Its complement is how often the test at 5 % finds a difference where there is none.
    """
    held = []
    for values_TN in _pieces(LAWS[law], (trials, 2 * n), seed):
        low_T, high_T = stats.ttest_ind(
            values_TN[:, :n], values_TN[:, n:], axis=-1, equal_var=False
        ).confidence_interval(LEVEL)
        held.append((low_T <= 0) & (high_T >= 0))
    return float(np.concatenate(held).mean())


def coverage_of_paired(n: int, law: str = "normal", cells: int = 1, trials: int = 4000, seed: int = 0) -> float:
    """The share of simulated pairs of a factor's values whose Student interval over n seeds holds the difference, 0.

    Both values follow the law in each of ``cells`` combinations of the other factors, independently; a seed gives the
    mean of its differences over them. Were one value level and the other of the law, it would be ``mean, t``.
    """
    held = []
    for values_TN in _pieces(LAWS[law], (trials, 2 * cells * n), seed):
        one_TCN, other_TCN = np.moveaxis(values_TN.reshape(-1, 2, cells, n), 1, 0)
        low_T, high_T = bounds((other_TCN - one_TCN).mean(1), "t", "mean")
        held.append((low_T <= 0) & (high_T >= 0))
    return float(np.concatenate(held).mean())


def coverage_of_improvement(n: int, truth: float, trials: int = 4000, bootstrap: bool = False, seed: int = 0) -> float:
    """The share of simulated pairs of arms of n normal seeds whose interval holds the probability of improvement.

    ``bootstrap`` takes seeds of each arm with replacement (Agarwal et al. 2021) in place of Newcombe's interval.
    """
    shift = float(stats.norm.ppf(truth)) * np.sqrt(2)
    held = 0
    rng = np.random.default_rng(seed)
    for values_TN in _pieces(LAWS["normal"], (trials, 2 * n), seed):
        for row in values_TN:
            wins_AB = (row[None, n:] + shift > row[:n, None]).astype(np.float64)
            if bootstrap:
                a_RN, b_RN = rng.integers(0, n, (2, 999, n))
                drawn_R = wins_AB[a_RN[:, :, None], b_RN[:, None, :]].mean((1, 2))
                low, high = np.quantile(drawn_R, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
            else:
                low, high = newcombe(float(wins_AB.mean()), n, n)
            held += bool(low <= truth <= high)
    return held / trials


def _pieces(law: Law, shape: tuple[int, int], seed: int) -> list[Floats]:
    """Simulated values in pieces of 250 rows, the resamples of which differ only in the values."""
    drawn = law.quantile(np.random.default_rng(seed).random(shape))
    return np.array_split(drawn, max(1, shape[0] // 250))

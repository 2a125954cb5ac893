"""Mean and interquartile mean of few seeds, and intervals around them. How often each interval holds: ``coverage``."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LEVEL = 0.95
FEWEST = 3
"""Seeds below which nothing is said about other seeds."""
RESAMPLES = 9999

Floats = NDArray[np.float64]
Statistic = Callable[..., Floats]
Of = Literal["mean", "iqm"]
Method = Literal["t", "bca", "percentile"]


class Interval(NamedTuple):
    """Bounds in the unit of the values."""

    low: float
    high: float


def mean(values: ArrayLike, axis: int = -1) -> Floats:
    """Arithmetic mean along an axis, in the unit of the values."""
    return np.asarray(np.asarray(values, dtype=np.float64).mean(axis=axis))


def iqm(values: ArrayLike, axis: int = -1) -> Floats:
    r"""Interquartile mean :math:`2\int_{1/4}^{3/4}Q(u)\,du` of the empirical quantile function, along an axis.

    (Agarwal et al. 2021, arXiv 2108.13264.) A value counts by how much of its n-th lies between the quartiles, so
    that 3 or 5 values have one too: of 3 sorted values it is ``(x1 + 4 x2 + x3) / 6``.
    """
    sorted_ = np.sort(np.asarray(values, dtype=np.float64), axis=axis)
    edges = np.linspace(0.0, 1.0, sorted_.shape[axis] + 1).clip(0.25, 0.75)
    return np.asarray(np.tensordot(np.moveaxis(sorted_, axis, -1), 2 * np.diff(edges), axes=1))


STATISTICS: dict[Of, Statistic] = {"mean": mean, "iqm": iqm}


def t_bounds(values_TN: Floats, of: Of) -> tuple[Floats, Floats]:
    r""":math:`\hat\theta\pm t_{n-1}\,s/\sqrt n`, s the standard deviation of the jackknife's pseudo-values, row by row.

    The pseudo-values are :math:`n\hat\theta-(n-1)\hat\theta_{-i}` (Tukey 1958); of a mean they are the values, and this
    is Student's interval.
    """
    n = values_TN.shape[-1]
    others_NM = np.array([[j for j in range(n) if j != i] for i in range(n)])
    whole_T = STATISTICS[of](values_TN)
    pseudo_TN = n * whole_T[..., None] - (n - 1) * STATISTICS[of](values_TN[..., others_NM])
    half_T = stats.t.ppf(0.5 + LEVEL / 2, n - 1) * pseudo_TN.std(-1, ddof=1) / np.sqrt(n)
    return whole_T - half_T, whole_T + half_T


def bootstrap_bounds(
    values_TN: Floats, of: Of, method: Literal["bca", "percentile"], resamples: int = RESAMPLES
) -> tuple[Floats, Floats]:
    """BCa (Efron 1987) or percentile bootstrap, row by row; of equal values, that value. Always the same resamples.

    BCa has no acceleration where the statistic is the same without any one of the values; the percentiles stand there.
    """
    values_TN = np.sort(values_TN, axis=-1)  # so that the order of seeds plays no part in which are drawn
    equal_T = level(values_TN)
    spread_TN = np.where(equal_T[..., None], np.arange(values_TN.shape[-1], dtype=np.float64), values_TN)
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        found = stats.bootstrap(
            (spread_TN,),
            STATISTICS[of],
            axis=-1,
            vectorized=True,
            confidence_level=LEVEL,
            n_resamples=resamples,
            batch=max(1, 2_000_000 // values_TN.size),
            method={"bca": "BCa", "percentile": "percentile"}[method],
            rng=np.random.default_rng(0),
        ).confidence_interval
    low_T, high_T = (np.where(equal_T, values_TN[..., 0], bound) for bound in found)
    if method == "bca" and (lost_T := np.isnan(low_T) | np.isnan(high_T)).any():
        plain = bootstrap_bounds(values_TN, of, "percentile", resamples)
        low_T, high_T = (np.where(lost_T, p, x) for p, x in zip(plain, (low_T, high_T), strict=True))
    return low_T, high_T


def level(values_TN: Floats) -> NDArray[np.bool_]:
    """Whether the values of a row are equal but for rounding."""
    return np.asarray(np.ptp(values_TN, axis=-1) <= 1e-12 * np.maximum(1.0, np.abs(values_TN).max(-1)))


def bounds(values_TN: Floats, method: Method, of: Of, resamples: int = RESAMPLES) -> tuple[Floats, Floats]:
    """Lower and upper bounds, row by row."""
    return t_bounds(values_TN, of) if method == "t" else bootstrap_bounds(values_TN, of, method, resamples)


def interval(values: Sequence[float], method: Method = "t", of: Of = "mean") -> Interval | None:
    """The 95 % interval around the mean or interquartile mean of what seeds gave; None of fewer than 3.

    Equal values give an interval of no width, which says that they are equal and no more.

    Raises:
        ValueError: a value is not finite.
    """
    row = finite(values)
    if len(row) < FEWEST:
        return None
    low, high = bounds(row, method, of)
    return Interval(float(low), float(high))


def finite(values: Any) -> Floats:
    """The values as an array.

    Raises:
        ValueError: one is not finite.
    """
    row = np.asarray(values, dtype=np.float64)
    if not np.isfinite(row).all():
        raise ValueError(f"statistics: {row[~np.isfinite(row)][0]} among the values; leave diverged runs out")
    return row

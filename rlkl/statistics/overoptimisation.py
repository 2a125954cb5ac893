"""Two laws of over-optimisation (Gao et al. 2022, arXiv 2210.10760), fitted side by side; neither is asserted."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlkl.statistics.intervals import Floats, finite


class Fit(NamedTuple):
    """Coefficients of ``R = d (alpha - beta f(d))``, and how well they do.

    ``rms`` is the root mean square of the residuals in the unit of the reward, ``r2`` the share of the variance of R
    that is explained (None where there is no variance), ``n`` the points, ``peak_kl`` the KL in nats of the maximum
    (None where the fit has none), ``residuals`` R less the fit, in the order of the points.
    """

    alpha: float
    beta: float
    rms: float
    r2: float | None
    n: int
    peak_kl: float | None
    residuals: list[float]


def quadratic(kls: Sequence[float], rewards: Sequence[float]) -> Fit | None:
    r"""Least squares of :math:`R=d(\alpha-\beta d)`, :math:`d=\sqrt{KL}`: the law of best-of-n there."""
    root, reward = _points(kls, rewards)
    solved = _solve(root, reward, -root * root)
    if solved is None:
        return None
    alpha, beta, fit = solved
    return _fit(alpha, beta, fit, reward, (alpha / (2 * beta)) ** 2 if alpha > 0 and beta > 0 else None)


def logarithmic(kls: Sequence[float], rewards: Sequence[float]) -> Fit | None:
    r"""Least squares of :math:`R=d(\alpha-\beta\log d)`, :math:`d=\sqrt{KL}`: the law of RL there."""
    root, reward = _points(kls, rewards)
    solved = _solve(root, reward, -root * np.log(np.where(root > 0, root, 1.0)))
    if solved is None:
        return None
    alpha, beta, fit = solved
    peak = 2 * (alpha / beta - 1) if beta > 0 else math.inf
    return _fit(alpha, beta, fit, reward, math.exp(peak) if peak < 50 else None)


def _points(kls: Sequence[float], rewards: Sequence[float]) -> tuple[Floats, Floats]:
    """Roots of KL, and gains: rewards less that of the reference.

    Raises:
        ValueError: not as many of one as of the other, or not finite.
    """
    if len(kls) != len(rewards):
        raise ValueError(f"fit: {len(kls)} KLs and {len(rewards)} rewards; give as many of one as of the other")
    return np.sqrt(finite(kls).clip(min=0.0)), finite(rewards)


def _solve(root: Floats, reward: Floats, second: Floats) -> tuple[float, float, Floats] | None:
    """The two coefficients and the fitted rewards; None where the points do not determine them."""
    design = np.stack([root, second], axis=-1)
    solution, _, rank, _ = np.linalg.lstsq(design, reward)
    if rank < 2:
        return None
    return float(solution[0]), float(solution[1]), design @ solution


def _fit(alpha: float, beta: float, fit: Floats, reward: Floats, peak_kl: float | None) -> Fit:
    residuals = reward - fit
    spread = float(((reward - reward.mean()) ** 2).sum())
    r2 = 1 - float((residuals**2).sum()) / spread if spread else None
    return Fit(alpha, beta, float(np.sqrt((residuals**2).mean())), r2, len(reward), peak_kl, residuals.tolist())

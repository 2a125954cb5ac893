"""How well scores agree with people, on held-out records; 95 % intervals by resampling records."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
BINS = 10
Floats = NDArray[np.float64]
Places = NDArray[np.int64]
Measured = dict[str, Any]


def average_precision(score_N: Floats, bad_N: NDArray[np.bool_]) -> float:
    """``sum_k (R_k - R_{k-1}) P_k`` over the distinct scores from the lowest: precision P and recall R of "bad".

    Equal scores enter together, so their order means nothing. A score that knows nothing has the base rate.

    Raises:
        ValueError: nothing is bad.
    """
    if not bad_N.any():
        raise ValueError("average precision: nothing is marked bad; it needs at least one")
    order_N = np.argsort(score_N, kind="stable")
    sorted_N = score_N[order_N]
    last_K = np.flatnonzero(np.append(sorted_N[1:] != sorted_N[:-1], True))
    hits_K = np.cumsum(bad_N[order_N])[last_K]
    return float(np.sum(np.diff(hits_K, prepend=0) / hits_K[-1] * hits_K / (last_K + 1)))


def interval(groups: Sequence[Any], measure: Callable[[Places], float], seed: int) -> list[float]:
    """The 2.5 % and 97.5 % quantiles of a measure over resampled groups (records), whose members stay together.

    ``measure`` is given the places of the chosen members. Resamples on which it is not finite are left out.
    """
    place: dict[Any, list[int]] = {}
    for i, group in enumerate(groups):
        place.setdefault(group, []).append(i)
    members = [np.asarray(p) for p in place.values()]
    draws = np.random.Generator(np.random.Philox(seed)).integers(len(members), size=(RESAMPLES, len(members)))
    values = np.array([measure(np.concatenate([members[i] for i in draw])) for draw in draws])
    return [float(q) for q in np.quantile(values[np.isfinite(values)], [0.025, 0.975])]


def pairs(margin_N: Floats, groups: Sequence[Any], seed: int) -> Measured:
    """Accuracy, mean margin, log-loss and calibration of margins s(chosen) - s(rejected).

    A margin of 0 is half right. ``log_loss = -mean log sigmoid(margin)``, ln 2 for a score that knows nothing. The
    model's confidence in its choice is sigmoid(\\|margin\\|); ``ece`` is the mean over pairs of \\|confidence -
    accuracy\\| of their bin, of ten equal ones from 0.5 to 1.
    """
    right_N = (margin_N > 0) + 0.5 * (margin_N == 0)
    loss_N = np.logaddexp(0, -margin_N)
    sure_N = 1 / (1 + np.exp(-np.abs(margin_N)))
    bin_N = np.minimum(((sure_N - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins = [
        {
            "from": 0.5 + b / (2 * BINS),
            "pairs": int((bin_N == b).sum()),
            "confidence": float(sure_N[bin_N == b].mean()),
            "accuracy": float(right_N[bin_N == b].mean()),
        }
        for b in sorted(set(bin_N.tolist()))
    ]
    gaps = [b["pairs"] * abs(b["confidence"] - b["accuracy"]) for b in bins]
    found = {"accuracy": right_N, "margin": margin_N, "log_loss": loss_N}
    return {
        "pairs": len(margin_N),
        "records": len(set(groups)),
        **{name: float(x_N.mean()) for name, x_N in found.items()},
        "ece": float(sum(gaps) / len(margin_N)),
        "interval": {name: interval(groups, _mean(x_N), seed) for name, x_N in found.items()},
        "bins": bins,
    }


def tokens(score_N: Floats, target_N: Floats, groups: Sequence[Any], seed: int, unit: str = "tokens") -> Measured:
    """Average precision of low scores for the tokens, or sentences, with a target below 0, and the mean squared error.

    ``base_rate`` is the share of such units, the average precision of chance; ``variance`` of the targets is the
    error of the best constant. Without such units average precision is None.
    """
    bad_N = target_N < 0

    def precision(i: Places) -> float:
        return average_precision(score_N[i], bad_N[i]) if bad_N[i].any() else float("nan")

    error_N = (score_N - target_N) ** 2
    found: Measured = {unit: len(score_N), "records": len(set(groups)), "base_rate": float(bad_N.mean())}
    found |= {"squared_error": float(error_N.mean()), "variance": float(target_N.var())}
    intervals = {"squared_error": interval(groups, _mean(error_N), seed)}
    if bad_N.any():
        intervals |= {
            "base_rate": interval(groups, _mean(bad_N), seed),
            "average_precision": interval(groups, precision, seed),
            "lift": interval(groups, lambda i: precision(i) - float(bad_N[i].mean()), seed),
        }
    precise = precision(np.arange(len(score_N))) if bad_N.any() else None
    lift = None if precise is None else precise - found["base_rate"]
    return {**found, "average_precision": precise, "lift": lift, "interval": intervals}


def _mean(value_N: Any) -> Callable[[Places], float]:
    return lambda i: float(value_N[i].mean())

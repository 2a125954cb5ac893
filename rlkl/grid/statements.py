"""What is stated of the arms of a comparison: summary.json. Equal runs give the same, to the byte.

A *cell* sums up one quantity over the runs of an arm: ``n``, ``mean``, ``min``, ``max``, ``iqm``, and the 95 %
intervals of mean and IQM, null of fewer than 3 runs. Wall time is stated apart (:func:`timing`): it is never equal.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from rlkl.config import Config
from rlkl.grid.factors import Tree, effects
from rlkl.grid.plan import Plan
from rlkl.grid.results import COLLAPSE, COUNTS, Result, timed
from rlkl.statistics import coverage, frontier, intervals, overoptimisation, pairwise
from rlkl.statistics.intervals import LEVEL, Of

GOLD_SHARES = (0.25, 0.5, 0.75)
"""Ways from the reference's gold to the most of any evaluation, at which the KL of arms is set side by side."""
CONSTANT = 1e-9
"""Gold whose range is below this share of its size does not vary but for rounding."""
Results = Mapping[str, Result]


def proxy(config: Config, gold: str) -> dict[str, float]:
    """What a run is trained on, source by source with its weight; nothing where that is gold itself."""
    weights = {name: source.weight for name, source in config.rewards.items() if source.weight}
    return {} if list(weights) == [gold] and weights[gold] > 0 else weights


def places(match: float | None) -> list[float]:
    """Nats at which arms are set side by side, where a run gets there: 1, 2, 5 and ``match_kl``."""
    return sorted({1.0, 2.0, 5.0, *([match] if match else [])})


def summary(plan: Plan, results: Results, exact: Sequence[Mapping[str, Any]] | None = None) -> Tree:
    """What summary.json holds. ``exact``: KL and gold of the optimal policies, where they can be enumerated."""
    mine = {arm: [results[run.config.name] for run in runs] for arm, runs in plan.arms.items()}
    match, done = plan.config.match_kl, [r for r in results.values() if r.error is None]
    heights = _heights(done, match, exact)
    at = {kl: _matched_kl(mine, kl) for kl in places(match)}
    at = {kl: place for kl, place in at.items() if any(place["arms"].values())}
    table = at[match] if match in at else {"pairs": [], "factors": []} if match else _compared(mine, _end, None)
    return {
        "name": plan.config.name,
        "gold": plan.gold,
        "match_kl": match,
        "proxy": {arm: list(proxy(runs[0].config, plan.gold)) for arm, runs in plan.arms.items()},
        "statistics": {"level": LEVEL, "coverage": coverage.MEASURED},
        "arms": {arm: _arm(runs, heights) for arm, runs in mine.items()},
        **{name: table[name] for name in ("pairs", "factors")},
        "matched": {
            "kl": list(at.values()),
            "gold": _matched_gold(mine, done),
            **{name: _matched_spent(mine, done, name) for name in COUNTS},
        },
        "area": heights,
        "exact": [dict(point) for point in exact] if exact else None,
        "runs": {
            name: {"arm": r.arm, "seed": r.seed, "folder": r.folder, "error": r.error}
            | {**_timeless(r.values), "area": _area(r, heights), "evaluations": r.frontier}
            for name, r in results.items()
        },
    }


def timing(plan: Plan, results: Results) -> Tree:
    """What timing.json holds: seconds of training with its evaluations, at the table's place, and columns of time."""
    columns = [name for name in plan.config.columns if timed(name)]
    arms = {}
    for arm, runs in plan.arms.items():
        counted = [r for r in (results[run.config.name] for run in runs) if r.counted]
        arms[arm] = {"seconds": cell([r.seconds for r in counted])}
        arms[arm] |= {name: cell([r.values[name] for r in counted]) for name in columns}
    return {"arms": arms, "runs": {name: r.seconds for name, r in results.items()}}


def cell(values: Sequence[float | None]) -> Tree | None:
    """What runs gave for one quantity, with its 95 % intervals; None where nothing is known."""
    known = [x for x in values if x is not None]
    if not known:
        return None
    return {
        "n": len(known),
        "mean": sum(known) / len(known),
        "min": min(known),
        "max": max(known),
        "iqm": float(intervals.iqm(known)),
        "interval": _interval(known, "mean"),
        "iqm_interval": _interval(known, "iqm"),
    }


def _interval(values: Sequence[float], of: Of) -> Tree | None:
    """The interval with the coverage that was measured at as many seeds, or at the next fewer that were simulated."""
    found = intervals.interval(values, coverage.DEFAULT, of)
    if found is None:
        return None
    seeds, measured = coverage.measured(f"{of}, {coverage.DEFAULT}", len(values))
    held = {"seeds": seeds, "normal": measured["normal"], "least": min(measured.values())}
    return {**found._asdict(), "method": coverage.DEFAULT, "coverage": held}


def _arm(runs: Sequence[Result], heights: Tree | None) -> Tree:
    """One arm: at the table's place, and over all evaluations of its finished runs."""
    counted, done = [r for r in runs if r.counted], [r for r in runs if r.error is None]
    names = list(_timeless(counted[0].values)) if counted else []
    areas = [_area(r, heights) for r in done]
    shares = [
        None if x is None or heights is None else frontier.share(x, heights["low"], heights["high"]) for x in areas
    ]
    return {
        "runs": len(runs),
        "finished": len(done),
        "counted": len(counted),
        **{name: cell([r.values[name] for r in counted]) for name in names},
        "area": cell(areas),
        "area_share": cell(shares),
        "fits": {name: _fits(done, name) for name in ("gold", "proxy")},
        "collapse": {
            name: {when: cell([r.ends[name][k] for r in done]) for k, when in enumerate(("before", "after"))}
            for name in COLLAPSE
        },
        "kl_position": _profile(done),
    }


def _heights(done: Sequence[Result], match: float | None, exact: Sequence[Mapping[str, Any]] | None) -> Tree | None:
    """Up to which KL areas go, and which count as 0 and 1: those of reference and exact frontier, or the range.

    The limit is the matched KL, or else the median over finished runs of the furthest each gets. The least would let
    one run that barely moves decide, the most one that flies off.
    """
    if not done:
        return None
    limit = match or median(max(r.line("kl")) for r in done)
    if limit <= 0:
        return None
    if exact:
        points = sorted((point["kl"], point["gold"]) for point in exact)
        kls, golds = [kl for kl, _ in points], [gold for _, gold in points]
        return {"limit": limit, "normaliser": "exact", "low": golds[0], "high": frontier.area(kls, golds, limit)}
    golds = [gold for r in done for gold in r.line("gold")]
    return {"limit": limit, "normaliser": "range", "low": min(golds), "high": max(golds)}


def _area(r: Result, heights: Tree | None) -> float | None:
    if heights is None or r.error is not None:
        return None
    return frontier.area(r.line("kl"), r.line("gold"), heights["limit"])


def _fits(done: Sequence[Result], name: str) -> Tree | None:
    """Both laws of over-optimisation on all evaluations of all runs, each less what it was at its reference."""
    if not done or any(None in r.line(name) for r in done):
        return None
    kls = [kl for r in done for kl in r.line("kl")]
    gains = [value - r.line(name)[0] for r in done for value in r.line(name)]
    both = {
        "quadratic": overoptimisation.quadratic(kls, gains),
        "logarithmic": overoptimisation.logarithmic(kls, gains),
    }
    return {law: fit._asdict() if fit else None for law, fit in both.items()}


def _profile(done: Sequence[Result]) -> Tree | None:
    """KL by position at the end, over the samples of all runs."""
    known = [r.profile for r in done if r.profile]
    if not known:
        return None
    columns = [[x for x in column if x] for column in itertools.zip_longest(*known)]
    reached = [sum(n for _, n in column) for column in columns]
    return {
        "kl": [sum(kl * n for kl, n in c) / total for c, total in zip(columns, reached, strict=True)],
        "reached": reached,
    }


def _end(r: Result) -> float | None:
    return r.values["gold"] if r.counted else None


def _matched_kl(mine: Mapping[str, Sequence[Result]], kl: float) -> Tree:
    """Gold where runs first get to a KL."""

    def at(r: Result) -> float | None:
        return frontier.at_kl(r.line("kl"), r.line("gold"), kl) if r.error is None else None

    return {
        "at": kl,
        "arms": {arm: cell([at(r) for r in runs]) for arm, runs in mine.items()},
        **_compared(mine, at, kl),
    }


def _matched_gold(mine: Mapping[str, Sequence[Result]], done: Sequence[Result]) -> list[Tree]:
    """KL at which runs first get to some levels of gold, between the reference's and the most of any evaluation."""
    if not done:
        return []
    low, high = sum(r.line("gold")[0] for r in done) / len(done), max(max(r.line("gold")) for r in done)
    if high - low <= CONSTANT * max(abs(low), abs(high)):
        return []
    places = 2 - math.floor(math.log10(high - low))  # three digits of the range, however far from 0 it is
    levels = dict.fromkeys(round(low + share * (high - low), places) for share in GOLD_SHARES)

    def at(level: float) -> Callable[[Result], float | None]:
        return lambda r: frontier.at_reward(r.line("kl"), r.line("gold"), level)

    return [_row(level, mine, at(level)) for level in levels]


def _matched_spent(mine: Mapping[str, Sequence[Result]], done: Sequence[Result], name: str) -> list[Tree]:
    """Gold where runs have spent as much as the one that spends the least in all."""
    least = min((r.line(name)[-1] for r in done), default=0.0)
    if least <= 0:
        return []
    return [_row(least, mine, lambda r: frontier.at_spent(r.line(name), r.line("gold"), least))]


def _row(at: float, mine: Mapping[str, Sequence[Result]], value: Callable[[Result], float | None]) -> Tree:
    return {
        "at": at,
        "arms": {arm: cell([value(r) for r in runs if r.error is None]) for arm, runs in mine.items()},
    }


def _compared(mine: Mapping[str, Sequence[Result]], value: Callable[[Result], float | None], kl: float | None) -> Tree:
    """All pairs of arms, with Holm's p-values over them: each place is a question of its own; and every factor."""
    return {"pairs": pairwise.corrected(_pairs(mine, value, kl)), "factors": effects(mine, value)}


def _pairs(
    mine: Mapping[str, Sequence[Result]], value: Callable[[Result], float | None], kl: float | None
) -> list[Tree]:
    """Every two arms, the later less the earlier: of other seeds, and of other prompts."""
    golds = {arm: {r.seed: x for r in runs if (x := value(r)) is not None} for arm, runs in mine.items()}
    prompts = {
        arm: {r.seed: r.gold_by_prompt(kl) for r in runs if r.seed in golds[arm] and r.error is None}
        for arm, runs in mine.items()
    }
    return [
        pairwise.pair(a, b, list(golds[a].values()), list(golds[b].values()))
        | {"prompts": _by_prompt(prompts[a], prompts[b])}
        for a, b in itertools.combinations([arm for arm in mine if golds[arm]], 2)
    ]


def _by_prompt(a: Mapping[int, Mapping[str, float]], b: Mapping[int, Mapping[str, float]]) -> Tree | None:
    """The difference over prompts that two arms share, of the means over the seeds that both have."""
    both: dict[str, list[tuple[float, float]]] = {}
    for seed in sorted(set(a) & set(b)):
        for name in set(a[seed]) & set(b[seed]):
            both.setdefault(name, []).append((a[seed][name], b[seed][name]))
    means = [{name: sum(x[k] for x in xs) / len(xs) for name, xs in both.items()} for k in (0, 1)]
    found = pairwise.prompts(*means)
    return found and {"n": len(both), "difference": found.difference, "interval": found.interval}


def _timeless(values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: value for name, value in values.items() if not timed(name)}

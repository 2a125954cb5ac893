"""The figures of the page: one panel each, so that they stand side by side or below each other."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlkl.grid import tables
from rlkl.plots import square_ticks
from rlkl.report import facets, svg
from rlkl.report.load import Data
from rlkl.report.matched import rough
from rlkl.report.svg import INK, SOFT, Style
from rlkl.report.words import number
from rlkl.statistics import intervals
from rlkl.statistics.frontier import at_kl

Line = tuple[Sequence[float], Sequence[float]]
Draw = Callable[[Any, Mapping[str, Any]], list[str]]
GRID = 40
"""Points of a mean line over the KL that all its runs reach."""
MOST_POINTS, LEAST_POINTS, OF_A_FIGURE = 200, 40, 3000
"""Points of a line at most, those that it may always have, and those of all lines of a figure together."""
MOST_MARKS = 12
"""Points of a line of a panel of over-optimisation that have a mark; it has five times as many."""
KL_LABEL = "KL to the reference, nats a sequence (√ scale)"
ROOT = (lambda x: np.clip(x, 0, None) ** 0.5, lambda x: np.asarray(x) ** 2)


@dataclass(frozen=True)
class Figure:
    """A panel: ``title`` and what is to be seen in it, in words."""

    title: str
    alt: str
    picture: str


def called(data: Data) -> str:
    """Gold, with the name of its reward where that is another."""
    return "gold" if data.gold == "gold" else f"{data.gold} (gold)"


def frontier(data: Data, styles: Mapping[str, Style], what: str, label: str) -> list[Figure]:
    """Gold or proxy against the root of KL: thin lines are runs, thick ones means over runs, with 95 % intervals."""
    runs = _runs(data, "kl", what)
    if not runs:
        return []
    title = f"{label[0].upper()}{label[1:]} against KL"

    def draw(axis: Any, mine: Mapping[str, Sequence[Line]]) -> list[str]:
        most = max(0.0, *(max(kls) for lines in mine.values() for kls, _ in lines)) or 1.0
        if what == "gold" and data.summary.get("exact"):
            near = [
                [point for point in data.summary.get(name) or [] if point["kl"] <= most * 1.05]
                for name in ("exact", "exact_horizons")
            ]
            _exact(axis, *near)
        said = []
        for arm, lines in mine.items():
            _thin(axis, lines, styles[arm], _most(runs))
            reach = max(0.0, min(max(kls) for kls, _ in lines))
            grid = (np.linspace(0, math.sqrt(reach), GRID) ** 2).clip(max=reach)
            curves = [[at_kl(kls, values, x) if x else values[0] for x in grid] for kls, values in lines]
            _mean(axis, grid, curves, styles[arm], len(mine) <= facets.MOST, _most(runs), what)
            end = rough(float(np.mean([kls[-1] for kls, _ in lines])))
            said.append(f"{_counted(data, arm)} {_from_to(lines)} at {end}")
        match = data.summary.get("match_kl")
        if match and match <= most:
            axis.axvline(match, color=SOFT, linestyle="--", linewidth=1)
        axis.set_xscale("function", functions=ROOT)
        axis.set_xlim(0, most * 1.05)
        axis.set_xticks(square_ticks(most))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(xlabel=KL_LABEL, ylabel=label)
        return said

    alt = f"{title}. Means over runs, first to last evaluation"
    return _panels(data, runs, what, (5.6, 3.9), title, alt, draw, shared=what == "gold")


def curve(
    data: Data, styles: Mapping[str, Style], name: str, x: tuple[str, str], key: str, label: str, title: str
) -> list[Figure]:
    """A quantity of every evaluation against ``x``: steps, labels or tokens, with what the axis says."""
    from matplotlib.ticker import MaxNLocator

    runs = _runs(data, x[0], key)
    most = max((xs[-1] for lines in runs.values() for xs, _ in lines), default=1.0)

    def draw(axis: Any, mine: Mapping[str, Sequence[Line]]) -> list[str]:
        said = []
        for arm, lines in mine.items():
            _thin(axis, lines, styles[arm], _most(runs))
            if len({len(xs) for xs, _ in lines}) == 1:
                middle = np.mean([xs for xs, _ in lines], axis=0)
                _mean(axis, middle, [ys for _, ys in lines], styles[arm], len(mine) <= facets.MOST, _most(runs), key)
            said.append(f"{_counted(data, arm)} {_from_to(lines)}")
        if key == "kl":  # as elsewhere; a run that goes far flattens no other
            axis.set_yscale("function", functions=ROOT)
            axis.set_yticks(square_ticks(max([1e-9, *(y for lines in runs.values() for _, ys in lines for y in ys)])))
            axis.set_ylim(bottom=0)
        axis.set(xlabel=x[1], ylabel=label)
        axis.set_xlim(0, most * 1.05)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        return said

    return _panels(data, runs, name, (4.7, 3.3), title, f"{title}. Means over runs, first to last", draw)


def _panels(
    data: Data,
    runs: Mapping[str, Any],
    name: str,
    size: tuple[float, float],
    title: str,
    alt: str,
    draw: Draw,
    shared: bool = True,
) -> list[Figure]:
    """A panel, or small multiples with the same heights (``shared``), filled by ``draw``, which says what is there."""
    made = []
    for label, arms in facets.panels(data.arms, facets.factor(data.arms)).items():
        mine = {arm: runs[arm] for arm in arms if arm in runs}
        if mine:
            figure, axis = svg.axes(*(size if not label else (4.7, 3.5)))
            made.append((label, figure, axis, draw(axis, mine)))
    if made and shared:
        low, high = zip(*(axis.get_ylim() for _, _, axis, _ in made), strict=True)
        for _, _, axis, _ in made:
            axis.set_ylim(min(low), max(high))
    return [
        Figure(
            f"{title}{', ' if label else ''}{label}",
            f"{alt}{', ' if label else ''}{label}: {'; '.join(said)}.",
            svg.embed(figure, f"{name}{k or ''}"),
        )
        for k, (label, figure, _, said) in enumerate(made)
    ]


def overoptimisation(data: Data, arm: str, style: Style, k: int) -> Figure | None:
    """Gains of gold and proxy of one arm against the root of KL, each of its largest, with Gao's two fits of gold."""
    runs = {key: _runs(data, "kl", key).get(arm, []) for key in ("gold", "proxy")}
    if not runs["gold"] or not runs["proxy"]:
        return None
    figure, axis = svg.axes()
    size = {key: max(abs(y - ys[0]) for _, ys in lines for y in ys) or 1.0 for key, lines in runs.items()}
    for key, lines in runs.items():
        looks = (
            {"marker": "o", "linestyle": "-", "linewidth": 1}
            if key == "gold"
            else {"marker": "^", "linestyle": (0, (2, 2)), "markerfacecolor": "none", "linewidth": 1}
        )
        for kls, values in lines:
            xs, gains = kept(kls, (np.array(values) - values[0]) / size[key], 5 * MOST_MARKS)
            every = -(-len(xs) // MOST_MARKS)
            axis.plot(_root(xs), gains, color=svg.ARMS[style.colour], markersize=4, markevery=every, **looks)
    said = [f"{key} {number(_ends(lines, -1) - _ends(lines, 0))}" for key, lines in runs.items()]
    fits = (data.summary["arms"][arm].get("fits") or {}).get("gold") or {}
    grid = np.linspace(1e-3, max(float(_root(kls).max()) for kls, _ in runs["gold"]), 60)
    for law, dash in (("quadratic", (0, (6, 2))), ("logarithmic", (0, (1, 1.5)))):
        if fit := fits.get(law):
            slope = grid if law == "quadratic" else np.log(grid)
            fitted = grid * (fit["alpha"] - fit["beta"] * slope) / size["gold"]
            axis.plot(grid, fitted, color=INK, linewidth=1.2, linestyle=dash)
            top = peak(law, fit, [kl for kls, _ in runs["gold"] for kl in kls])
            where = f"peaks at {rough(top)}" if top is not None else "has no peak in the KL seen"
            said.append(f"{law} fit of gold {where}, R² {number(fit['r2'])}")
    axis.set(xlabel="√KL, √nats", ylabel="gain, share of its largest")
    axis.set_xlim(left=0)
    return Figure(arm, f"{_counted(data, arm)}, gains at the end: {'; '.join(said)}.", svg.embed(figure, f"over{k}"))


def peak(law: str, fit: Mapping[str, Any], kls: Sequence[float]) -> float | None:
    """The KL of a fit's maximum, in nats, where evaluations surround it; the logarithmic law begins above 0."""
    low = min((kl for kl in kls if kl > 0), default=math.inf) if law == "logarithmic" else min(kls, default=math.inf)
    found = fit["peak_kl"]
    return found if found is not None and low <= found <= max(kls) else None


def profile(data: Data, styles: Mapping[str, Style]) -> list[Figure]:
    """KL of the next token by its position in the completion, at the last evaluation."""
    known = {arm: row["kl_position"] for arm, row in data.summary["arms"].items() if row.get("kl_position")}
    shown = {arm: _reached(found) for arm, found in known.items()}
    longest = max(map(len, shown.values()), default=1)

    def draw(axis: Any, mine: Mapping[str, Sequence[float]]) -> list[str]:
        said = []
        for arm, kls in mine.items():
            axis.plot(range(1, len(kls) + 1), kls, linewidth=1.6, **styles[arm].line)
            top = int(np.argmax(kls))
            said.append(f"{_counted(data, arm)} is highest at token {top + 1} with {number(kls[top])} nats a token")
        axis.set(xlabel="token of the completion (while 1 in 20 samples gets there)", ylabel="KL, nats a token")
        axis.set_xlim(1, max(longest, 2))
        axis.set_ylim(bottom=0)
        return said

    return _panels(data, shown, "profile", (5.6, 3.3), "KL by position", "KL by position at the last evaluation", draw)


def _reached(found: Mapping[str, Any]) -> list[float]:
    """KL of the tokens that one sample in 20 has."""
    share = np.array(found["reached"]) / found["reached"][0]
    return list(found["kl"][: int((share >= 0.05).sum()) or 1])


def _counted(data: Data, arm: str) -> str:
    """An arm, with how many of its runs count where some do not."""
    runs, done = len(data.plan.arms[arm]), len(data.of(arm))
    return arm if done == runs else f"{arm} ({done} of {runs} runs)"


def _exact(axis: Any, points: Sequence[Mapping[str, Any]], horizons: Sequence[Mapping[str, Any]]) -> None:
    """The optimal policies where they can be listed, and what finite horizons reach."""
    points = sorted(points, key=lambda point: point["kl"])
    axis.plot([p["kl"] for p in points], [p["gold"] for p in points], color=SOFT, linewidth=1.2, linestyle=(0, (2, 2)))
    for last in points[-1:]:
        axis.annotate("exact optimum", (last["kl"], last["gold"]), color=SOFT, fontsize=8, ha="right", va="bottom")
    for point in horizons:
        axis.plot(point["kl"], point["gold"], marker="+", markersize=11, color=SOFT)
        text = f" h={point['horizon'] or 'whole'}"
        axis.annotate(text, (point["kl"], point["gold"]), color=SOFT, fontsize=8, va="top")


def _runs(data: Data, x: str, key: str) -> dict[str, list[Line]]:
    """Arm -> a line a run: a quantity of its evaluations against another; metrics by their names in metrics.jsonl."""
    found: dict[str, list[Line]] = {}
    for arm in data.arms:
        for member in data.of(arm):
            rows = member.evaluations if "/" in key else data.summary["runs"][member.name]["evaluations"]
            points = [(row[x], row[key]) for row in rows if row.get(key) is not None and row.get(x) is not None]
            if len(points) > 1:
                found.setdefault(arm, []).append(tuple(zip(*points, strict=True)))  # type: ignore[arg-type]
    return found


def _root(kls: Sequence[float]) -> Any:
    return np.sqrt(np.clip(kls, 0, None))


def kept(xs: Any, ys: Any, most: int) -> tuple[Any, Any]:
    """Some ``most`` points of a line: the first, the last, and of every stretch between the least and the greatest."""
    places = _kept(ys, most)
    return np.asarray(xs)[places], np.asarray(ys)[places]


def _kept(ys: Any, most: int) -> list[int]:
    if len(ys) <= most:
        return list(range(len(ys)))
    found = {0, len(ys) - 1}
    for part in np.array_split(np.arange(len(ys)), most // 2 - 1):
        inside = np.asarray(ys)[part]
        found |= {int(part[inside.argmin()]), int(part[inside.argmax()])}
    return sorted(found)


def _thin(axis: Any, lines: Sequence[Line], style: Style, most: int) -> None:
    for xs, ys in lines:
        axis.plot(*kept(xs, ys, most), linewidth=0.8, alpha=0.45 if len(lines) > 1 else 1, **style.line)
        axis.plot(xs[-1:], ys[-1:], marker=style.marker, markersize=4, **style.line)


def _most(runs: Mapping[str, Sequence[Line]]) -> int:
    """Points of a line, of as many as there are in a figure."""
    return min(MOST_POINTS, max(LEAST_POINTS, OF_A_FIGURE // sum(map(len, runs.values()))))


def _mean(
    axis: Any, xs: Any, curves: Sequence[Sequence[float | None]], style: Style, bands: bool, most: int, name: str
) -> None:
    """The mean over runs, with its 95 % interval where there are at least three and ``bands`` are wanted.

    The interval is cut at what the quantity called ``name`` can be.
    """
    columns = [[y for y in column if y is not None] for column in zip(*curves, strict=True)]
    means = [float(np.mean(column)) for column in columns]
    places = _kept(means, most)
    xs = np.asarray(xs)[places]
    if len(curves) > 1:
        axis.plot(xs, [means[k] for k in places], linewidth=2.2, **style.line)
    found = [intervals.interval(columns[k]) for k in places] if bands else []
    if found and all(found):
        low, high = ([tables.cut(name, one[k]) for one in found if one] for k in (0, 1))
        fill = {key: value for key, value in style.line.items() if key != "linestyle"}
        axis.fill_between(xs, low, high, alpha=0.14, linewidth=0, **fill)


def _from_to(lines: Sequence[Line]) -> str:
    """The first and the last mean over runs, in words."""
    ends = _ends(lines, 0), _ends(lines, -1)
    return " to ".join(number(x, ends) for x in ends)


def _ends(lines: Sequence[Line], place: int) -> float:
    """The mean over runs at their first (0) or last (-1) evaluation."""
    return float(np.mean([ys[place] for _, ys in lines]))

"""The figures of the page: one panel each, so that they stand side by side or below each other."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlkl.plots import square_ticks
from rlkl.report import svg
from rlkl.report.load import Data
from rlkl.report.svg import INK, SOFT, Style
from rlkl.report.words import number
from rlkl.statistics import intervals
from rlkl.statistics.frontier import at_kl

Line = tuple[Sequence[float], Sequence[float]]
GRID = 40
"""Points of a mean line over the KL that all its runs reach."""
MOST_BANDS = 8
"""Arms beyond which intervals would cover each other."""
KL_LABEL = "KL to the reference, nats a sequence (√ scale)"


@dataclass(frozen=True)
class Figure:
    """A panel: ``title`` and what is to be seen in it, in words."""

    title: str
    alt: str
    picture: str


def called(data: Data) -> str:
    """Gold, with the name of its reward where that is another."""
    return "gold" if data.gold == "gold" else f"{data.gold} (gold)"


def frontier(data: Data, styles: Mapping[str, Style], what: str, label: str) -> Figure | None:
    """Gold or proxy against the root of KL: thin lines are runs, thick ones means over runs, with 95 % intervals."""
    runs = _runs(data, "kl", what)
    if not runs:
        return None
    figure, axis = svg.axes(5.6, 3.9)
    most = max(max(kls) for lines in runs.values() for kls, _ in lines) or 1.0
    if what == "gold" and data.summary.get("exact"):
        near = [
            [point for point in data.summary.get(name) or [] if point["kl"] <= most * 1.05]
            for name in ("exact", "exact_horizons")
        ]
        _exact(axis, *near)
    said = []
    for arm, lines in runs.items():
        _thin(axis, lines, styles[arm])
        reach = min(max(kls) for kls, _ in lines)
        grid = (np.linspace(0, math.sqrt(reach), GRID) ** 2).clip(max=reach)
        curves = [[at_kl(kls, values, x) if x else values[0] for x in grid] for kls, values in lines]
        _mean(axis, grid, curves, styles[arm], len(runs) <= MOST_BANDS)
        said.append(
            f"{arm} {number(_ends(lines, 0))} to {number(_ends(lines, -1))} at "
            f"{number(float(np.mean([kls[-1] for kls, _ in lines])))} nats"
        )
    match = data.summary.get("match_kl")
    if match:
        axis.axvline(match, color=SOFT, linestyle="--", linewidth=1)
    axis.set_xscale("function", functions=(lambda x: np.clip(x, 0, None) ** 0.5, lambda x: np.asarray(x) ** 2))
    axis.set_xlim(0, most * 1.05)
    axis.set_xticks(square_ticks(most))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel=KL_LABEL, ylabel=label)
    title = f"{label[0].upper()}{label[1:]} against KL"
    return Figure(
        title, f"{title}. Means over runs, first to last evaluation: {'; '.join(said)}.", svg.embed(figure, what)
    )


def curve(
    data: Data, styles: Mapping[str, Style], name: str, x: tuple[str, str], key: str, label: str, title: str
) -> Figure | None:
    """A quantity of every evaluation against ``x``: steps, labels or tokens, with what the axis says."""
    from matplotlib.ticker import MaxNLocator

    runs = _runs(data, x[0], key)
    if not runs:
        return None
    figure, axis = svg.axes()
    said = []
    for arm, lines in runs.items():
        _thin(axis, lines, styles[arm])
        if len({len(xs) for xs, _ in lines}) == 1:
            _mean(
                axis,
                np.mean([xs for xs, _ in lines], axis=0),
                [list(ys) for _, ys in lines],
                styles[arm],
                len(runs) <= MOST_BANDS,
            )
        said.append(f"{arm} {number(_ends(lines, 0))} to {number(_ends(lines, -1))}")
    axis.set(xlabel=x[1], ylabel=label)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    return Figure(title, f"{title}. Means over runs, first to last: {'; '.join(said)}.", svg.embed(figure, name))


def overoptimisation(data: Data, arm: str, style: Style, k: int) -> Figure | None:
    """Gains of gold and proxy of one arm against the root of KL, each of its largest, with Gao's two fits of gold."""
    runs = {key: _runs(data, "kl", key).get(arm, []) for key in ("gold", "proxy")}
    if not runs["gold"] or not runs["proxy"]:
        return None
    figure, axis = svg.axes()
    size = {key: max(abs(y - ys[0]) for _, ys in lines for y in ys) or 1.0 for key, lines in runs.items()}
    for key, lines in runs.items():
        looks = (
            {"marker": "o", "linestyle": "-"}
            if key == "gold"
            else {"marker": "^", "linestyle": (0, (2, 2)), "markerfacecolor": "none"}
        )
        for kls, values in lines:
            gains = (np.array(values) - values[0]) / size[key]
            axis.plot(_root(kls), gains, color=svg.ARMS[style.colour], markersize=4, linewidth=1, **looks)
    said = [f"{key} {number(_ends(lines, -1) - _ends(lines, 0))}" for key, lines in runs.items()]
    fits = (data.summary["arms"][arm].get("fits") or {}).get("gold") or {}
    grid = np.linspace(1e-3, max(float(_root(kls).max()) for kls, _ in runs["gold"]), 60)
    for law, dash in (("quadratic", (0, (6, 2))), ("logarithmic", (0, (1, 1.5)))):
        if fit := fits.get(law):
            slope = grid if law == "quadratic" else np.log(grid)
            fitted = grid * (fit["alpha"] - fit["beta"] * slope) / size["gold"]
            axis.plot(grid, fitted, color=INK, linewidth=1.2, linestyle=dash)
            said.append(f"{law} fit of gold peaks at {number(fit['peak_kl'])} nats, R² {number(fit['r2'])}")
    axis.set(xlabel="√KL, √nats", ylabel="gain, share of its largest")
    axis.set_xlim(left=0)
    return Figure(arm, f"{arm}, gains at the end: {'; '.join(said)}.", svg.embed(figure, f"over{k}"))


def profile(data: Data, styles: Mapping[str, Style]) -> Figure | None:
    """KL of the next token by its position in the completion, at the last evaluation."""
    known = {arm: row["kl_position"] for arm, row in data.summary["arms"].items() if row.get("kl_position")}
    if not known:
        return None
    figure, axis = svg.axes(5.6, 3.3)
    said = []
    for arm, found in known.items():
        share = np.array(found["reached"]) / found["reached"][0]
        shown = int((share >= 0.05).sum()) or 1
        axis.plot(range(1, shown + 1), found["kl"][:shown], linewidth=1.6, **styles[arm].line)
        top = int(np.argmax(found["kl"][:shown]))
        said.append(f"{arm} is highest at token {top + 1} with {number(found['kl'][top])} nats")
    axis.set(xlabel="token of the completion (while 1 in 20 samples gets there)", ylabel="KL, nats a token")
    axis.set_xlim(left=1)
    axis.set_ylim(bottom=0)
    return Figure(
        "KL by position", f"KL by position at the last evaluation: {'; '.join(said)}.", svg.embed(figure, "profile")
    )


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


def _thin(axis: Any, lines: Sequence[Line], style: Style) -> None:
    for xs, ys in lines:
        axis.plot(xs, ys, linewidth=0.8, alpha=0.45 if len(lines) > 1 else 1, **style.line)
        axis.plot(xs[-1:], ys[-1:], marker=style.marker, markersize=4, **style.line)


def _mean(axis: Any, xs: Any, curves: Sequence[Sequence[float | None]], style: Style, bands: bool) -> None:
    """The mean over runs, with its 95 % interval where there are at least three and ``bands`` are wanted."""
    columns = [[y for y in column if y is not None] for column in zip(*curves, strict=True)]
    if len(curves) > 1:
        axis.plot(xs, [float(np.mean(column)) for column in columns], linewidth=2.2, **style.line)
    found = [intervals.interval(column) for column in columns]
    if all(found) and bands:
        low, high = zip(*((one.low, one.high) for one in found if one), strict=True)
        fill = {key: value for key, value in style.line.items() if key != "linestyle"}
        axis.fill_between(xs, low, high, alpha=0.14, linewidth=0, **fill)


def _ends(lines: Sequence[Line], place: int) -> float:
    """The mean over runs at their first (0) or last (-1) evaluation."""
    return float(np.mean([ys[place] for _, ys in lines]))

"""The summary of a comparison for people: on the terminal, as Markdown, and as CSV."""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from rlkl.grid import cost, fair
from rlkl.grid.plan import Plan, metric
from rlkl.grid.results import COLLAPSE, COUNTS, Result

Tree = Mapping[str, Any]
COLUMNS = ("n", "mean", "low", "high", "iqm", "iqm_low", "iqm_high", "min", "max", "coverage_normal", "coverage_least")
BOUNDS = {
    **dict.fromkeys(("kl", "kl_end", "kl/sequence", *COUNTS, *COUNTS.values(), "seconds"), (0.0, math.inf)),
    **{name: (0.0, 1.0 if "distinct" in name or "bleu" in name else math.inf) for name in COLLAPSE},
}
"""What a quantity can be: nats, counts and lengths are not below 0, shares lie between 0 and 1."""


def cut(name: str, x: float) -> float:
    """A value, or an end of an interval, of a quantity at the nearest that it can be."""
    low, high = BOUNDS.get(metric(name), (-math.inf, math.inf))
    return min(max(x, low), high)


def spread(name: str, cell: Tree) -> tuple[float, float]:
    """The interval of a cell, or the range of fewer than 3 runs, as far as the quantity can be."""
    inside = cell.get("interval") or {"low": cell["min"], "high": cell["max"]}
    return cut(name, inside["low"]), cut(name, inside["high"])


def terminal(plan: Plan, summary: Tree, timing: Tree) -> Table:
    """A row an arm: means over seeds; gold and KL with their interval, or of fewer than 3 seeds with their range."""
    match = plan.config.match_kl
    end = f"at {match:g} nats" if match else "at the end"
    title = f"{plan.config.name}: {plan.gold} {end}, mean over seeds {_spread_said(summary)}"
    out = Table(title=title, title_justify="left")
    heads = ["arm", "runs", f"{plan.gold} before", f"{plan.gold} after" if not match else f"{plan.gold} {end}"]
    heads += ["kl/sequence" if not match else "kl/sequence at the end", "tokens", "labels", "seconds"]
    for head in [*heads, *plan.config.columns]:
        out.add_column(head, justify="left" if head == "arm" else "right", overflow="fold")
    names = ["gold_before", "gold", "kl_end", "tokens", "labels", "seconds", *plan.config.columns]
    for arm, row in summary["arms"].items():
        runs = f"{row['finished']}/{row['runs']}"
        if row["counted"] < row["finished"]:
            runs += f", {row['counted']} at {match:g} nats"
        cells = {**row, **timing["arms"][arm]}
        out.add_row(arm, runs, *(_cell(name, cells.get(name)) for name in names))
    return out


def never(plan: Plan, results: Mapping[str, Result]) -> list[str]:
    """A line for each run that does not get to the matched KL."""
    return [
        f"{name}: never gets to {plan.config.match_kl:g} nats (at most "
        f"{max(point['kl'] for point in r.frontier):.3g}); it is in no mean"
        for name, r in results.items()
        if r.error is None and not r.counted
    ]


def markdown(summary: Tree) -> str:
    """summary.md: tables that can be pasted, each with what its numbers are."""
    gold, match = summary["gold"], summary["match_kl"]
    arms, area = summary["arms"], summary["area"]
    parts = [f"# {summary['name']}", *_intervals_said(summary)]
    heads = [f"{gold} at {match:g} nats" if match else f"{gold} at the end", f"{gold} before", "KL at the end, nats"]
    rows = [
        [
            arm,
            f"{row['counted']}/{row['runs']}",
            estimate(row.get("gold")),
            _iqm(row.get("gold")),
            estimate(row.get("gold_before")),
            estimate(row.get("kl_end"), "kl_end"),
        ]
        for arm, row in arms.items()
    ]
    parts += [f"## {heads[0]}", _table(["arm", "runs", heads[0], "IQM", *heads[1:]], rows)]
    for key, of, unit in (("kl", gold, "nats"), ("gold", "KL in nats", gold), ("labels", gold, "labels")):
        found = summary["matched"][key]
        if found:
            heads = [f"{place['at']:,g} {unit}" for place in found]
            name = "kl" if key == "gold" else "gold"
            rows = [[arm, *(estimate(place["arms"][arm], name, count=True) for place in found)] for arm in arms]
            parts += [f"## {of} at matched {'KL' if key == 'kl' else unit}", _table(["arm", *heads], rows)]
    if area:
        rows = [[arm, estimate(row["area"]), estimate(row["area_share"])] for arm, row in arms.items()]
        top = "exact frontier" if area["normaliser"] == "exact" else "range of all evaluations"
        heads = ["arm", f"mean {gold} over √KL", f"from {area['low']:.3f} (0) to {area['high']:.3f} (1), {top}"]
        parts += [f"## Area under the frontier, up to {area['limit']:.3g} nats", _table(heads, rows)]
    for place in _tested(summary):
        parts += [f"## Pairs, {gold} {place['said']}", _pairs(place["pairs"])]
        for one in place["factors"]:
            parts += [f"## By {one['factor']}, the rest being equal, {gold} {place['said']}", _effects(one["pairs"])]
    return "\n\n".join(parts + _notes(summary)) + "\n"


def _notes(summary: Tree) -> list[str]:
    """What the tables cannot say, as lists: runs without a result, what ended others, flags, tuning runs."""
    runs, arms, match = summary["runs"], summary["arms"], summary["match_kl"]
    caps = summary.get("budgets") or {}
    tuning = summary.get("tuning") or {}
    said = any(n is not None for n in tuning.values())
    notes = {
        "Runs without a result": [
            *(f"{name}: {' '.join(run['error'].split())}" for name, run in runs.items() if run["error"]),
            *(
                f"{arm}: {row['counted']} of {row['finished']} finished runs get to {match:g} nats"
                for arm, row in arms.items()
                if row["counted"] < row["finished"]
            ),
        ],
        "Budgets": [
            *(f"every run has at most {cap:,.12g} {key}" for key, cap in caps.items()),
            *cost.endings(summary),
        ],
        "Differences that nobody stated": [
            fair.told(flag).removeprefix("warning: ") for flag in summary.get("flags") or ()
        ],
        "Runs spent on choosing settings": [
            f"{arm}: {'not said' if n is None else n}" for arm, n in tuning.items() if said
        ],
    }
    return [
        part for head, lines in notes.items() if lines for part in (f"## {head}", "\n".join(f"- {x}" for x in lines))
    ]


def comma_separated(summary: Tree) -> str:
    """summary.csv: a row for every cell, by where it was read, arm and quantity."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["at", "arm", "quantity", *COLUMNS])
    for at, arm, quantity, cell in _cells(summary):
        interval, iqm, held = (cell[k] or {} for k in ("interval", "iqm_interval", "interval"))
        held = held.get("coverage", {})
        row = {**cell, "low": interval.get("low"), "high": interval.get("high")}
        row |= {"iqm_low": iqm.get("low"), "iqm_high": iqm.get("high")}
        row |= {"coverage_normal": held.get("normal"), "coverage_least": held.get("least")}
        writer.writerow([at, arm, quantity, *(row[name] for name in COLUMNS)])
    return out.getvalue()


def estimate(cell: Tree | None, name: str = "gold", count: bool = False) -> str:
    """A mean with its interval, or with the range of fewer than 3 runs; ``count``: with their number."""
    if cell is None:
        return "–"
    text = _cell(name, cell)
    return f"{text}, n={cell['n']}" if count else text


def _iqm(cell: Tree | None) -> str:
    return "–" if cell is None else _three(cell["iqm"]) + _bounds(cell["iqm_interval"] and _ends(cell["iqm_interval"]))


def _ends(interval: Tree) -> tuple[float, float]:
    return interval["low"], interval["high"]


def _cells(summary: Tree) -> Iterator[tuple[str, str, str, Tree]]:
    match, gold = summary["match_kl"], summary["gold"]
    for arm, row in summary["arms"].items():
        for quantity, cell in row.items():
            if isinstance(cell, dict) and "mean" in cell:
                yield (f"kl={match:g}" if match else "end"), arm, gold if quantity == "gold" else quantity, cell
    for key, places in summary["matched"].items():
        for place in places:
            for arm, cell in place["arms"].items():
                if cell:
                    yield f"{key}={place['at']:g}", arm, "kl" if key == "gold" else gold, cell


def _tested(summary: Tree) -> Iterator[Tree]:
    """The places at which pairs are compared."""
    if not summary["match_kl"] and summary["pairs"]:
        yield {"said": "at the end", "pairs": summary["pairs"], "factors": summary["factors"]}
    for place in summary["matched"]["kl"]:
        if place["pairs"]:
            yield {**place, "said": f"at {place['at']:g} nats"}


def _pairs(pairs: Sequence[Tree]) -> str:
    heads = ["", "difference", "p (Holm)", "P(improvement)", "the same runs on other prompts"]
    rows = []
    for pair in pairs:
        prompts = pair["prompts"]
        rows.append(
            [
                *_difference(pair),
                f"{pair['improvement']:.2f}{_bounds(pair['improvement_interval'])}",
                "–" if prompts is None else f"{_three(prompts['difference'], '+')}{_bounds(prompts['interval'], '+')}",
            ]
        )
    return _table(heads, rows)


def _effects(pairs: Sequence[Tree]) -> str:
    heads = ["", "difference", "p (Holm)", "combinations", "seeds"]
    return _table(heads, [[*_difference(x), f"{x['cells']} of {x['of']}", str(x["n"])] for x in pairs])


def _difference(pair: Tree) -> tuple[str, str, str]:
    p = "–" if pair["p_holm"] is None else f"{pair['p_holm']:.3g}"
    return f"{pair['b']} − {pair['a']}", f"{_three(pair['difference'], '+')}{_bounds(pair['interval'], '+')}", p


def _bounds(interval: Sequence[float] | None, sign: str = "") -> str:
    return "" if interval is None else f" ({_three(interval[0], sign)} to {_three(interval[1], sign)})"


def _three(x: float, sign: str = "") -> str:
    """A number to three places; one that rounds to nothing has no sign."""
    text = f"{x:{sign}.3f}"
    return text if float(text) else "0.000"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _intervals_said(summary: Tree) -> list[str]:
    """How the numbers in brackets came about, and how often such intervals hold."""
    cells = [row["gold"] for row in summary["arms"].values() if row.get("gold")]
    counts = sorted({cell["n"] for cell in cells if cell["interval"]})
    said = [f"{summary['gold']}: mean over seeds {_spread_said(summary)}."]
    for n in counts:
        held = next(cell["interval"]["coverage"] for cell in cells if cell["n"] == n and cell["interval"])
        said.append(
            f"Of {n} seeds, 95 % intervals of this kind held in {100 * held['normal']:.0f} % of simulations with "
            f"normal seeds and in {100 * held['least']:.0f} % in the worst case tried (simulated at {held['seeds']})."
        )
    return [" ".join(said)]


def _spread_said(summary: Tree) -> str:
    """What stands in brackets."""
    cells = [row["gold"] for row in summary["arms"].values() if row.get("gold")]
    kinds = {bool(cell["interval"]) for cell in cells}
    if len(kinds) > 1:
        return "(95 % t interval, or least–most of fewer than 3)"
    return "(95 % t interval)" if True in kinds else "(least–most)"


def _cell(name: str, cell: Tree | None) -> str:
    if cell is None:
        return "–"
    mean, (low, high) = cut(name, cell["mean"]), spread(name, cell)
    if name in ("tokens", "labels", "queries", "seconds"):
        return f"{mean:,.0f}"
    if name == "gold_before":
        return _three(mean)
    to = " to " if cell["interval"] or low < 0 else "–"
    return _three(mean) + (f" ({_three(low)}{to}{_three(high)})" if low < high else "")

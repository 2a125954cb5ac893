"""What the runs of a comparison came to: a row an arm, from the metrics.jsonl of its finished runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from rlkl.grid.plan import Plan, metric
from rlkl.tracking import read_rows

COUNTS = {"tokens": "tokens/generated", "labels": "reward/labels"}
"""What a run has used up so far: nothing at step 0."""


@dataclass(frozen=True)
class Result:
    """A run: ``error`` or what it measured at its end (or at the matched KL), and all its evaluations."""

    arm: str
    seed: int
    folder: str
    error: str | None = None
    values: dict[str, float | None] = field(default_factory=dict)
    frontier: list[dict[str, float]] = field(default_factory=list)

    @property
    def counted(self) -> bool:
        """Whether it is in the table's means: it finished, and it passed the matched KL, if there is one."""
        return self.error is None and bool(self.values)


def read(folder: Path, arm: str, seed: int, gold: str, match_kl: float | None, columns: Sequence[str]) -> Result:
    """A finished run's result; one that is not finite anywhere has diverged."""
    key = f"reward/eval/{gold}"
    rows = list(read_rows(folder / "metrics.jsonl"))
    seconds, evaluated = 0.0, []
    for row in rows:
        seconds += (row.get("time/step") or 0.0) + (row.get("time/evaluate") or 0.0)
        if "kl/sequence" in row:
            evaluated.append({**row, "seconds": seconds})
    for row in evaluated:
        for name in (key, "kl/sequence"):
            if name not in row:
                return Result(arm, seed, str(folder), f"{name} is not in its evaluations; name another gold")
            if row[name] is None:
                return Result(arm, seed, str(folder), f"diverged: {name} is not finite at step {row['step']}")
    frontier = [
        {"step": r["step"], "kl": r["kl/sequence"], "gold": r[key], "labels": r.get(COUNTS["labels"], 0.0)}
        | {name: r[name] for name in columns if r.get(name) is not None}
        for r in evaluated
    ]
    place = crossing([r["kl/sequence"] for r in evaluated], match_kl) if match_kl else (len(evaluated) - 1, 1.0)
    if place is None:
        return Result(arm, seed, str(folder), frontier=frontier)

    def at(name: str) -> float | None:
        return between(evaluated[max(place[0] - 1, 0)], evaluated[place[0]], place[1], name)

    values = {
        "gold_before": evaluated[0][key],
        "gold": at(key),
        "kl": match_kl or at("kl/sequence"),
        "seconds": at("seconds"),
    }
    values |= {"kl_end": evaluated[-1]["kl/sequence"]} | {name: at(key) for name, key in COUNTS.items()}
    for name in columns:
        most = max((x for row in evaluated if (x := row.get(metric(name))) is not None), default=None)
        values[name] = at(name) if name == metric(name) else most
    return Result(arm, seed, str(folder), None, values, frontier)


def crossing(kls: Sequence[float], target: float) -> tuple[int, float] | None:
    """Where a run first passes a KL: the index of the evaluation behind it, and the share of the way to there.

    The way from one evaluation to the next is linear in the root of KL, in which rewards are close to linear near the
    reference (Gao et al. 2022). None where it never gets there.
    """
    for i, kl in enumerate(kls):
        if kl >= target:
            if i == 0:
                return 0, 1.0
            low, high = (math.sqrt(max(x, 0.0)) for x in kls[i - 1 : i + 1])
            return i, (math.sqrt(target) - low) / (high - low)
    return None


def between(before: Mapping[str, Any], after: Mapping[str, Any], share: float, name: str) -> float | None:
    """A metric between two evaluations; counts start at 0, other metrics that the first lacks are the second's."""
    zero = 0.0 if name in COUNTS.values() else None
    start, end = before.get(name, zero), after.get(name, zero)
    if end is None:
        return None
    return float(end if start is None else start + share * (end - start))


def summary(plan: Plan, results: Mapping[str, Result]) -> dict[str, Any]:
    """What summary.json holds: every arm with mean, least and most over its finished runs, and every run."""
    arms = {}
    for arm, runs in plan.arms.items():
        mine = [results[run.config.name] for run in runs]
        counted = [r for r in mine if r.counted]
        names = counted[0].values if counted else {}
        spread = {name: _spread([r.values[name] for r in counted]) for name in names}
        done = sum(r.error is None for r in mine)
        arms[arm] = {"runs": len(mine), "finished": done, "counted": len(counted), **spread}
    return {
        "name": plan.config.name,
        "gold": plan.gold,
        "match_kl": plan.config.match_kl,
        "arms": arms,
        "runs": {
            name: {"arm": r.arm, "seed": r.seed, "folder": r.folder, "error": r.error}
            | {**r.values, "evaluations": r.frontier}
            for name, r in results.items()
        },
    }


def table(plan: Plan, summary: Mapping[str, Any]) -> Table:
    """The summary for a terminal: means over seeds, with the range of gold and KL."""
    match = plan.config.match_kl
    end = f"at {match:g} nats" if match else "at the end"
    out = Table(title=f"{plan.config.name}: {plan.gold} {end}, mean over seeds (least–most)", title_justify="left")
    heads = ["arm", "runs", f"{plan.gold} before", f"{plan.gold} after" if not match else f"{plan.gold} {end}"]
    heads += ["kl/sequence" if not match else "kl/sequence at the end", "tokens", "labels", "seconds"]
    for head in [*heads, *plan.config.columns]:
        out.add_column(head, justify="left" if head == "arm" else "right", overflow="fold")
    names = ["gold_before", "gold", "kl_end", "tokens", "labels", "seconds", *plan.config.columns]
    for arm, row in summary["arms"].items():
        runs = f"{row['finished']}/{row['runs']}"
        if row["counted"] < row["finished"]:
            runs += f", {row['counted']} at {match:g} nats"
        out.add_row(arm, runs, *(_cell(name, row.get(name)) for name in names))
    return out


def never(plan: Plan, results: Mapping[str, Result]) -> list[str]:
    """A line for each run that does not get to the matched KL."""
    return [
        f"{name}: never gets to {plan.config.match_kl:g} nats (at most "
        f"{max(point['kl'] for point in r.frontier):.3g}); it is in no mean"
        for name, r in results.items()
        if r.error is None and not r.counted
    ]


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [x for x in values if x is not None]
    return {"mean": sum(known) / len(known), "min": min(known), "max": max(known)} if known else None


def _cell(name: str, spread: Mapping[str, float] | None) -> str:
    if spread is None:
        return "–"
    mean, low, high = (spread[k] for k in ("mean", "min", "max"))
    if name in ("tokens", "labels", "seconds"):
        return f"{mean:,.0f}"
    if name == "gold_before":
        return f"{mean:.3f}"
    return f"{mean:.3f}" + (f" ({low:.3f}–{high:.3f})" if low < high else "")

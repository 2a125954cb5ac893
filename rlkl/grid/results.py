"""What one run of a comparison came to, from its metrics.jsonl and evaluations.jsonl."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlkl.grid.plan import metric
from rlkl.statistics.frontier import crossing
from rlkl.tracking import read_rows

COUNTS = {"tokens": "tokens/generated", "labels": "reward/labels", "queries": "reward/queries"}
"""What a run has used up so far: nothing at step 0."""
COLLAPSE = [
    f"policy/eval/{name}" for name in ("entropy", "length", "distinct_1", "distinct_2", "distinct_3", "self_bleu")
]
"""What tells a policy that says ever the same."""


@dataclass(frozen=True)
class Result:
    """A run: ``error`` or what it measured at its end (or at the matched KL), and all its evaluations.

    ``prompts`` hold gold by prompt, an entry an evaluation, ``ends`` the metrics of collapse at the first and the last.
    """

    arm: str
    seed: int
    folder: str
    error: str | None = None
    values: dict[str, float | None] = field(default_factory=dict)
    frontier: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[dict[str, float]] = field(default_factory=list)
    ends: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    profile: list[tuple[float, int]] = field(default_factory=list)
    seconds: float | None = None

    @property
    def counted(self) -> bool:
        """Whether it is in the table's means: it finished, and it passed the matched KL, if there is one."""
        return self.error is None and bool(self.values)

    def line(self, name: str) -> list[float]:
        """One quantity at every evaluation."""
        return [point[name] for point in self.frontier]

    def gold_by_prompt(self, kl: float | None) -> dict[str, float]:
        """Gold of every prompt where the run first gets to this KL, or at its end; none where it was not written."""
        if not self.prompts:
            return {}
        place = crossing(self.line("kl"), kl) if kl else (len(self.prompts) - 1, 1.0)
        if place is None:
            return {}
        before, after = self.prompts[max(place[0] - 1, 0)], self.prompts[place[0]]
        return {name: before[name] + place[1] * (after[name] - before[name]) for name in after if name in before}


def read(
    folder: Path,
    arm: str,
    seed: int,
    gold: str,
    match_kl: float | None,
    columns: Sequence[str],
    proxy: Mapping[str, float] | None = None,
) -> Result:
    """A finished run's result; one that is not finite anywhere has diverged, and one whose files are damaged failed.

    ``proxy``: weights of what trains it.
    """
    if harm := damage(folder):
        return Result(arm, seed, str(folder), harm)
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
        {"step": r["step"], "kl": r["kl/sequence"], "gold": r[key], "proxy": _weighted(r, proxy)}
        | {name: r.get(key, 0.0) for name, key in COUNTS.items()}
        | {name: r[name] for name in columns if r.get(name) is not None and not timed(name)}
        for r in evaluated
    ]
    place = crossing([r["kl/sequence"] for r in evaluated], match_kl) if match_kl else (len(evaluated) - 1, 1.0)

    def at(name: str) -> float | None:
        assert place is not None
        return between(evaluated[max(place[0] - 1, 0)], evaluated[place[0]], place[1], name)

    values: dict[str, float | None] = {}
    if place is not None:
        values = {"gold_before": evaluated[0][key], "gold": at(key), "kl": match_kl or at("kl/sequence")}
        values |= {"kl_end": evaluated[-1]["kl/sequence"]} | {name: at(key) for name, key in COUNTS.items()}
        for name in columns:
            most = max((x for row in evaluated if (x := row.get(metric(name))) is not None), default=None)
            values[name] = at(name) if name == metric(name) else most
    prompts, profile = _evaluations(folder, f"reward/{gold}", [r["step"] for r in evaluated])
    return Result(
        arm=arm,
        seed=seed,
        folder=str(folder),
        values=values,
        frontier=frontier,
        prompts=prompts,
        ends={name: (evaluated[0].get(name), evaluated[-1].get(name)) for name in COLLAPSE},
        profile=profile,
        seconds=at("seconds") if place else None,
    )


def damage(folder: Path) -> str | None:
    """What is wrong with the rows of a finished run, and the remedy; None where all of them can be read.

    ``evaluations.jsonl`` and ``samples.jsonl`` may be missing.
    """
    wrong, steps = [], set()
    for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl"):
        try:
            rows = _rows(folder / name)
        except ValueError as error:
            wrong.append(f"{error}")
            continue
        if name == "metrics.jsonl":
            steps = {row["step"] for row in rows or () if "kl/sequence" in row}
            if not steps:
                wrong.append(f"{folder / name} {'is missing' if rows is None else 'holds no evaluation'}")
        elif (
            name == "evaluations.jsonl" and steps and rows is not None and steps != (there := {r["step"] for r in rows})
        ):
            short, long = (name, "metrics.jsonl") if steps - there else ("metrics.jsonl", name)
            wrong.append(f"{folder / short} lacks evaluations that {long} has")
    return f"{'; '.join(wrong)}; bring it back, or delete {folder} and compare again to redo the run" if wrong else None


def _rows(path: Path) -> list[dict[str, Any]] | None:
    """All rows of a JSONL file; None where there is no file.

    Raises:
        ValueError: a line is no row, or the last one was cut short.
    """
    if not path.is_file():
        return None
    rows = []
    with open(path, "rb") as file:
        for n, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or "step" not in row or not line.endswith(b"\n"):
                raise ValueError(f"{path} cannot be read: line {n} is no row")
            rows.append(row)
    return rows


def between(before: Mapping[str, Any], after: Mapping[str, Any], share: float, name: str) -> float | None:
    """A metric between two evaluations; counts start at 0, other metrics that the first lacks are the second's."""
    zero = 0.0 if name in COUNTS.values() else None
    start, end = before.get(name, zero), after.get(name, zero)
    if end is None:
        return None
    return float(end if start is None else start + share * (end - start))


def timed(name: str) -> bool:
    """Whether a column is of wall time, which is never equal."""
    return metric(name).startswith("time/")


def _weighted(row: Mapping[str, Any], proxy: Mapping[str, float] | None) -> float | None:
    """What is trained on, or None where that is gold, or where an evaluation does not hold all of it."""
    parts = [(weight, row.get(f"reward/eval/{name}")) for name, weight in (proxy or {}).items()]
    known = [weight * float(value) for weight, value in parts if value is not None]
    return sum(known) if parts and len(known) == len(parts) else None


def _evaluations(
    folder: Path, key: str, steps: Sequence[int]
) -> tuple[list[dict[str, float]], list[tuple[float, int]]]:
    """Gold by prompt at every evaluation (prompts of one text are one), and the KL by position at the last."""
    rows = {row["step"]: row for row in read_rows(folder / "evaluations.jsonl")}
    if not all(step in rows and None not in rows[step].get(key, [None]) for step in steps):
        return [], []
    golds = []
    for step in steps:
        by: dict[str, list[float]] = {}
        for name, value in zip(rows[step]["prompts"], rows[step][key], strict=True):
            by.setdefault(name, []).append(value)
        golds.append({name: sum(values) / len(values) for name, values in by.items()})
    last = rows[steps[-1]]
    return golds, list(zip(last["kl_position"], last["reached"], strict=True))

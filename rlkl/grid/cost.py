"""What a comparison may cost, as far as it can be told before, and which cap ended which run."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from rlkl.config import Config
from rlkl.config.budget import asked, drawn, judged, labels, learned, taught
from rlkl.grid.plan import Plan, Run
from rlkl.tracking import read_rows

ENDED = "budget/ended/"
Pace = tuple[int, float]
"""Steps done, and seconds a step with its share of the evaluations."""


def bounds(config: Config, mode: str = "train") -> dict[str, int]:
    """Steps, sampled tokens and scores of a run, at most; of ``mode: replay`` of an arm's step on a seed's samples.

    Such a step is under no cap and draws nothing: see :func:`recorded`.
    """
    if mode == "replay":
        asks = taught(config)[0] + judged(config) + learned(config, 1)
        return {"steps": 1, "tokens": 0, "queries": asked(config), "labels": asks}
    budget = config.train.budget
    steps = min([config.train.steps, *([budget.steps] if budget.steps else []), *_capped(config)])
    most = {"tokens": steps * drawn(config), "queries": steps * asked(config), "labels": labels(config, steps)}
    return {"steps": steps, **{name: min(n, getattr(budget, name) or n) for name, n in most.items()}}


def recorded(plan: Plan) -> int:
    """Tokens of the samples that ``mode: replay`` draws once a seed for all arms, at most; else 0."""
    first = {run.config.seed: run.config for run in reversed(plan.runs)}
    return sum(map(drawn, first.values())) if plan.config.mode == "replay" else 0


def _capped(config: Config) -> Iterator[int]:
    """The step that each cap on tokens, queries or labels ends a run with at the latest.

    A step s + 1 is taken if the cap has room for the most that it may use, after s steps that used the least they can:
    a token a sample (it may end at once), every score and judgement that is asked each time. What learns on the way
    and stored records may have used up theirs.
    """
    samples = config.rollout.prompts * config.samples
    uses = {
        "tokens": (0, samples, drawn(config)),
        "queries": (0, asked(config), asked(config)),
        "labels": (taught(config)[0], judged(config), judged(config)),
    }
    for name, (before, least, most) in uses.items():
        cap = getattr(config.train.budget, name)
        if cap is not None and least and not config.offline:
            yield 1 + max(0, (cap - before - most) // least)


def pace(run: Run) -> Pace | None:
    """How far a run is and how fast it was; None before its first step."""
    rows = _rows(run.folder)
    done = rows[-1]["step"] if rows else 0
    spent = sum((row.get("time/step") or 0.0) + (row.get("time/evaluate") or 0.0) for row in rows)
    return (done, spent / done) if done else None


def seconds(plan: Plan, kept: Sequence[Run]) -> dict[str, float | None]:
    """Seconds that are left of each arm's runs, one after the other; None where no run of any arm tells.

    An arm without rows of its own is taken to be as fast as the others.
    """
    found = {run.config.name: pace(run) for run in plan.runs}
    known = {arm: [p[1] for run in runs if (p := found[run.config.name])] for arm, runs in plan.arms.items()}
    means = [fmean(x) for x in known.values() if x]
    left: dict[str, float | None] = {}
    for arm, runs in plan.arms.items():
        speed = fmean(known[arm] or means) if known[arm] or means else None
        names = {run.config.name for run in kept}
        steps = [
            bounds(r.config, plan.config.mode)["steps"] - (found[r.config.name] or (0, 0.0))[0]
            for r in runs
            if r.config.name not in names
        ]
        left[arm] = None if speed is None else speed * sum(steps)
    return left


def table(plan: Plan, kept: Sequence[Run], workers: int) -> tuple[Table, str]:
    """A row an arm, with its runs and what each of them may take at most; and the sum on one line."""
    out = Table(title="the plan: what a run may take, at most", title_justify="left")
    for head in ("arm", "seeds", "steps", "tokens", "queries", "labels", "tuning runs", "time left"):
        out.add_column(head, justify="left" if head in ("arm", "seeds") else "right", overflow="fold")
    left, total = seconds(plan, kept), dict.fromkeys(("steps", "tokens", "queries", "labels"), 0)
    for arm, runs in plan.arms.items():
        one = bounds(runs[0].config, plan.config.mode)
        total = {name: n + len(runs) * one[name] for name, n in total.items()}
        tuned = plan.config.tuning.get(runs[0].of)
        cells = [f"{one[name]:,}" for name in total]
        seeds = ", ".join(str(run.config.seed) + (" (kept)" if run in kept else "") for run in runs)
        out.add_row(arm, seeds, *cells, "not said" if tuned is None else str(tuned), minutes(left[arm]) or "?")
    total["tokens"] += (once := recorded(plan))
    told = "in all at most " + ", ".join(f"{n:,} {name}" for name, n in total.items())
    known = [x for x in left.values() if x is not None]
    when = f"about {minutes(sum(known) / workers)} with {workers} at a time" if known else "time: no run has steps yet"
    told += " (the tokens once a seed, replayed to every arm)" if once else ""
    return out, f"{told}; {when}; evaluations ask and sample on top"


def bound(folder: Path) -> str | None:
    """The cap of ``train.budget`` that ended the run of a folder; None where it came to its last step."""
    found = [key.removeprefix(ENDED) for row in _rows(folder)[-1:] for key in row if key.startswith(ENDED)]
    return found[0] if found else None


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Its metrics.jsonl; none where that cannot be read, which is said elsewhere."""
    try:
        return list(read_rows(folder / "metrics.jsonl"))
    except ValueError:
        return []


def endings(summary: Mapping[str, Any]) -> list[str]:
    """A line for each arm and cap that ended some of its runs, of what summary.json holds."""
    ended = Counter((run["arm"], cap) for run in summary["runs"].values() if (cap := run.get("ended")))
    arms = summary["arms"]
    return [f"{arm}: {n} of {arms[arm]['runs']} runs ended by the budget of {cap}" for (arm, cap), n in ended.items()]


def caps(made: Plan) -> dict[str, float]:
    """The budgets that the comparison gives to every run."""
    return made.config.budgets.model_dump(exclude_none=True)


def tuning(made: Plan) -> dict[str, int | None]:
    """Tuning runs of every arm, None where they were not said."""
    return {arm: made.config.tuning.get(arm) for arm in made.config.arms}


def minutes(seconds: float | None) -> str:
    """A time to be read; nothing where it is not known."""
    if seconds is None:
        return ""
    whole, rest = divmod(round(seconds), 60)
    return f"{whole} min {rest:02d} s" if whole else f"{rest} s"

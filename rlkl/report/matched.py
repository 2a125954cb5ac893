"""What the tables say beside the statistics: counts, how far apart evaluations lie, and how often intervals hold."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rlkl.grid import statements
from rlkl.report.load import Data
from rlkl.report.words import Tree, listed, nats
from rlkl.statistics import coverage
from rlkl.statistics.frontier import crossing


class Held(NamedTuple):
    """A kind of interval: what it is of, how it is made, and by number of seeds how often it held."""

    of: str
    how: str
    shares: dict[int, str]


def ends(data: Data) -> dict[str, dict[str, Any]]:
    """Arm -> cells over its finished runs, of their first (``before``) and last evaluations, whatever ``match_kl``."""
    return {
        arm: {
            "before": _cell(data, arm, "gold", 0),
            "gold": _cell(data, arm, "gold", -1),
            "kl": _cell(data, arm, "kl", -1),
            **{name: _cell(data, arm, name, -1) for name in ("labels", "tokens")},
        }
        for arm in data.arms
    }


def _cell(data: Data, arm: str, key: str, place: int) -> dict[str, Any] | None:
    return statements.cell(list(data.measured(arm, key, place).values()))


def apart(data: Data) -> dict[float, dict[str, str]]:
    """Place -> arm -> KL of the two evaluations around it, of the run where they lie farthest apart: *0–2.5 nats*.

    Empty where no run of the arm gets there.
    """
    places = [place["at"] for place in data.summary["matched"]["kl"]]
    lines = {arm: [[row["kl"] for row in rows] for rows in data.lines(arm).values()] for arm in data.arms}
    return {kl: {arm: _widest(each, kl) for arm, each in lines.items()} for kl in places}


def _widest(lines: Sequence[Sequence[float]], target: float) -> str:
    found = [(kls, place[0]) for kls in lines if (place := crossing(kls, target))]
    around = [(kls[k - 1] if k else 0.0, kls[k]) for kls, k in found]
    if not around:
        return ""
    low, high = max(around, key=lambda pair: pair[1] - pair[0])
    return f"{float(f'{low:.3g}') if low >= 0.005 else 0:g}–{rough(high)}"  # before training it is 0 but for rounding


def short(data: Data) -> str:
    """What is said where no run gets to ``match_kl``; nothing where one does, or where there is none."""
    match = data.summary["match_kl"]
    if not match or any(place["at"] == match for place in data.summary["matched"]["kl"]):
        return ""
    most = max((row["kl"] for arm in data.arms for rows in data.lines(arm).values() for row in rows), default=0.0)
    return f"No run gets to {nats(match)} (match_kl); the furthest is at {rough(most)}."


def rough(kl: float) -> str:
    """A KL to three digits; an estimate is below 0 by rounding alone."""
    return nats(float(f"{max(kl, 0.0):.3g}"))


def held(data: Data) -> list[Held]:
    """Every kind of 95 % interval of the page, at the numbers of seeds that it has."""
    cells = sorted({one["n"] for one in _cells(data) if one["interval"]})
    places = [data.summary, *data.summary["matched"]["kl"]]
    pairs = [pair for place in places for pair in place["pairs"]]
    differences = sorted({min(pair["n"]) for pair in pairs if pair["interval"]})
    wins = sorted({min(pair["n"]) for pair in pairs if pair["improvement_interval"] and min(pair["n"]) >= 3})
    factors = [x for place in places for factor in place["factors"] for x in factor["pairs"]]
    effects = sorted({x["n"] for x in factors if x["interval"]})
    found = [
        Held("mean", "Student's t", _shares("mean, t", cells)),
        Held("IQM", "Student's t of the jackknife", _shares("iqm, t", cells)),
        Held("difference of two arms", "Welch", _shares("difference, welch", differences)),
        Held("probability of improvement", "Newcombe", _shares("improvement, newcombe", wins)),
        Held("difference of a factor's values", "Student's t over seeds", _shares("difference, paired t", effects)),
    ]
    if any(pair["prompts"] and pair["prompts"]["interval"] for pair in pairs):
        found.append(Held("difference over prompts", "paired BCa bootstrap", dict.fromkeys(cells, "not simulated")))
    return [one for one in found if one.shares]


def _shares(kind: str, counts: Iterable[int]) -> dict[int, str]:
    return {n: _share(kind, n) for n in counts}


def _share(kind: str, n: int) -> str:
    seeds, measured = coverage.measured(kind, n)
    least = f"{100 * min(measured.values()):.1f} %"
    text = f"{100 * measured['normal']:.1f} %, at worst {least}" if "normal" in measured else f"at worst {least}"
    return text if seeds == n else f"{text} (of {seeds})"


def _cells(data: Data) -> Iterator[Tree]:
    """The cells of the page's tables."""
    rows = [*ends(data).values(), *data.summary["arms"].values()]
    rows += [place["arms"] for places in data.summary["matched"].values() for place in places]
    yield from (one for row in rows for one in row.values() if isinstance(one, dict) and "interval" in one)


def without_panel(data: Data, drawn: Iterable[str]) -> str:
    """Why arms are not among the panels of over-optimisation: trained on gold itself, or on what was not measured."""
    seen = set(drawn)
    left = [arm for arm in data.arms if arm not in seen and data.of(arm)]
    golden = [arm for arm in left if _on_gold(data, arm)]
    others = [arm for arm in left if arm not in golden]
    parts = []
    if golden:
        who = "every run" if len(golden) == len(data.arms) else listed(golden, len(golden))
        parts.append(f"Trained on gold itself, so that there is no proxy to over-optimise: {who}.")
    if others:
        who = "every run" if len(others) == len(data.arms) else listed(others, len(others))
        parts.append(
            f"Trained on what no evaluation measures (stored pairs or annotations, or a score not kept): {who}."
        )
    return " ".join(parts)


def _on_gold(data: Data, arm: str) -> bool:
    """Whether gold is all that weighs, and new samples are scored by it."""
    config = data.plan.arms[arm][0].config
    return not config.offline and not statements.proxy(config, data.gold)

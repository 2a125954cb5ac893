"""The questions that a comparison can answer, and what the statistics say, in words."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from rlkl.grid import statements
from rlkl.grid.cells import coordinates
from rlkl.report import budgets, overoptimised, penalty
from rlkl.report.load import Data
from rlkl.report.words import (
    Answer,
    Tree,
    cell,
    difference,
    listed,
    lost,
    many,
    nats,
    none,
    number,
    outside,
    share,
    told,
    untested,
    versus,
)
from rlkl.statistics.frontier import crossing
from rlkl.statistics.intervals import FEWEST

NAMES = {"beta": "β"}
"""Factors that have a shorter name than their key."""


def answers(data: Data) -> list[Answer]:
    """All that can be asked of these runs: first of the factors of a grid, since arms are many there."""
    found = [*_factors(data), *_most_gold(data)]
    return [*found, *penalty.answers(data), *budgets.answers(data), *overoptimised.answers(data)]


def _most_gold(data: Data) -> Iterator[Answer]:
    """Which arm gets the most gold at 1, 2 and 5 nats, or at the end where nothing gets so far."""
    places = {place["at"]: place for place in data.summary["matched"]["kl"]}
    if len(data.arms) < 2:
        return
    never = []
    match = data.summary.get("match_kl")
    for kl in statements.places(match):
        found = {arm: c for arm, c in places.get(kl, {"arms": {}})["arms"].items() if c}
        if found:
            question = f"Which arm gets the most {data.gold} at {nats(kl)}?"
            yield _ranking(data, question, found, places[kl]["pairs"], "gets there")
        else:
            never.append(f"{kl:g}")
    far = max(data.summary["runs"].values(), key=_furthest)
    if never and _furthest(far) >= 0:
        text = f"No run gets there; the furthest is one of {far['arm']}, at {nats(_furthest(far))}."
        yield Answer(f"Which arm gets the most {data.gold} at {listed(never)} nat{'s' * (never != ['1'])}?", text)
    ends = {arm: row["gold"] for arm, row in data.summary["arms"].items() if row.get("gold")}
    if ends and not match:
        last = " Arms end at different KL, so this compares whole recipes, not objectives."
        question = f"Which arm has the most {data.gold} at the end of training?"
        yield _ranking(data, question, ends, data.summary["pairs"], "has finished", last)


def _ranking(
    data: Data, question: str, cells: Mapping[str, Tree], pairs: Sequence[Tree], done: str, last: str = ""
) -> Answer:
    """All arms in their order; in a sentence the best, and which others it can be told from."""
    order = sorted(cells, key=lambda arm: -cells[arm]["mean"])
    missing = [arm for arm in data.arms if arm not in cells]
    points = [f"{arm}: {cell(cells[arm])}{share(data, arm, cells[arm]['n'])}" for arm in order]
    points += [f"{arm}: no {f'run {done}' if data.of(arm) else f'result ({lost(data, arm)})'}" for arm in missing]
    text, details = _verdict(data, order, cells, pairs, done)
    enough = [arm for arm in order if cells[arm]["n"] >= FEWEST]
    if cells[order[0]]["n"] < FEWEST and len(enough) > 1:
        more, rest = _verdict(data, enough, cells, pairs, done)
        more = f"n{more[1:]}" if more.startswith("No difference") else more
        text += f" Of the {len(enough)} arms with {FEWEST} runs or more there: {more}"
        details += rest
    if (tests := sum(pair["p"] is not None for pair in pairs)) > 1:
        details.append(f"p-values are corrected for all {tests} pairs of arms that are tested.")
    gone = [f"{arm} ({lost(data, arm)})" for arm in order[1:] if lost(data, arm)]
    text += f" Runs without a result count in no mean: of {listed(gone)}." if gone else ""
    return Answer(question, text + none(data, missing, done) + last, tuple(details), tuple(points))


def _verdict(
    data: Data, order: Sequence[str], cells: Mapping[str, Tree], pairs: Sequence[Tree], done: str
) -> tuple[str, list[str]]:
    """The best arm and which others are shown to be below it, and the differences."""
    best = order[0]
    top = f"{cell(cells[best])}{share(data, best, cells[best]['n'])}"
    if len(order) == 1:
        return f"Only {best} {done}, with {top}.", []
    against = {arm: pair for arm in order[1:] if (pair := versus(pairs, arm, best))}
    details = [f"{best} against {arm}: {difference(pair)}" for arm, pair in against.items()]
    return _told(order, cells, against, top), details


def _told(order: Sequence[str], cells: Mapping[str, Tree], against: Mapping[str, Tree], top: str) -> str:
    """Which arms are shown to be below the best, which has ``top``."""
    best, mean = order[0], cells[order[0]]["mean"]
    level = [arm for arm in order[1:] if math.isclose(cells[arm]["mean"], mean, rel_tol=1e-9, abs_tol=1e-12)]
    if len(level) == len(order) - 1:
        return f"The arms are equal: {'all' if level[1:] else 'both'} have a mean of {number(mean)}."
    top += f", as has {listed(level)}" if level else ""
    tested = [arm for arm, pair in against.items() if pair["interval"]]
    if not tested:
        whys = dict.fromkeys(untested(pair) for arm, pair in against.items() if arm not in level)
        return f"{best} has the highest mean, {top}; nothing is shown about other seeds: {listed(list(whys))}."
    beaten = [arm for arm in tested if told(against[arm])]
    equal = [arm for arm in tested if arm not in beaten]
    alone = [arm for arm in equal if outside(against[arm])]
    text = ""
    if alone:
        which = f"against {listed(alone)}" if len(alone) < 4 else f"in {len(alone)} of these cases"
        text = f" Taken alone, the interval of the difference leaves out 0 {which}."
    if bare := [arm for arm in order[1:] if arm not in tested]:
        which = listed(bare) if len(bare) < 4 else f"{len(bare)} of the others"
        text += f" Against {which} there is no test (fewer than 3 seeds, or seeds that do not differ)."
    if not beaten:
        return (
            f"No difference can be told: {best} has the highest mean, {top}, but no other arm is shown to be below it "
            f"(against {tested[0]}: {difference(against[tested[0]])}).{text}"
        )
    head = f"{best}, with {top}: shown to be above {listed(beaten)} (against {beaten[0]}: "
    head += f"{difference(against[beaten[0]])})"
    if equal:
        head += f"; from {listed(equal) if len(equal) < 4 else f'{len(equal)} others'} no difference can be told"
    return f"{head}.{text}"


def _factors(data: Data) -> Iterator[Answer]:
    """For every factor of a grid which of its values gets the most gold, averaged over the other factors."""
    places = [(nats(place["at"]), place["factors"]) for place in data.summary["matched"]["kl"]]
    if not data.summary.get("match_kl"):
        places.append(("the end", data.summary["factors"]))
    same = _same(data)
    for factor in dict.fromkeys(one["factor"] for _, found in places for one in found):
        said = {where: one["pairs"] for where, found in places for one in found if one["factor"] == factor}
        every = [pair for pairs in said.values() for pair in pairs]
        of = "value of " if all(_value(factor, pair["a"]) != pair["a"] for pair in every) else ""
        question = f"Which {of}{_called(factor)} gets the most {data.gold}, the rest being equal?"
        left = _left_out(data, every) + _apart(data, factor, every) + _nowhere(data, factor, said)
        details = (
            *(
                f"at {where}, {_value(factor, pair['b'])} against {_value(factor, pair['a'])}: {difference(pair)}"
                for where, pairs in said.items()
                for pair in pairs
            ),
            *same,
        )
        if not any(pair["interval"] for pair in every):
            whys = listed(list(dict.fromkeys(map(untested, every))))
            yield Answer(
                question, f"Nothing is shown about other seeds: {whys}. The differences are below.{left}", details
            )
            continue
        points = tuple(_place(factor, where, pairs) for where, pairs in said.items())
        yield Answer(question, _summed(factor, said) + left, details, points)


def _left_out(data: Data, pairs: Sequence[Tree]) -> str:
    """That combinations are left out, and of which arms runs have no result."""
    if all(pair["cells"] == pair["of"] for pair in pairs):
        return ""
    gone = [f"{arm} ({lost(data, arm)})" for arm in data.arms if lost(data, arm)]
    named = f" (without a result: of {listed(gone)})" if gone else ""
    return f" Combinations where a run has no result or does not get so far are left out{named}."


def _apart(data: Data, factor: str, pairs: Sequence[Tree]) -> str:
    """The values of a factor that are nowhere compared."""
    values = dict.fromkeys(x for arm in data.arms if (x := coordinates(arm).get(factor)) is not None)
    known = {frozenset((pair["a"], pair["b"])) for pair in pairs}
    left = [f"{a} and {b}" for a, b in itertools.combinations(values, 2) if frozenset((a, b)) not in known]
    if not left:
        return ""
    some = f"{'; '.join(left[:3])}{f'; {len(left) - 3} more' * (len(left) > 3)}"
    return f" Nothing can be said of {some}: no combination of the rest has results of both."


def _nowhere(data: Data, factor: str, said: Mapping[str, Sequence[Tree]]) -> str:
    """The places at which values are not compared that are compared elsewhere."""
    wanted = map(nats, statements.places(data.summary.get("match_kl")))
    every = dict.fromkeys((pair["a"], pair["b"]) for pairs in said.values() for pair in pairs)
    void: dict[str, list[str]] = {}
    for where in dict.fromkeys((*wanted, *said)):
        here = {(pair["a"], pair["b"]) for pair in said.get(where, ())}
        gone = [f"{_value(factor, a)} and {_value(factor, b)}" for a, b in every if (a, b) not in here]
        if gone:
            of = f"both of {'; of '.join(gone[:3])}{f'; {len(gone) - 3} more' * (len(gone) > 3)}"
            if len(gone) == len(every):
                of = "two values" if len(every) > 1 else "both"
            void.setdefault(of, []).append(where)
    return "".join(f" At {listed(wheres)} no combination has results of {of}." for of, wheres in void.items())


def _same(data: Data) -> list[str]:
    """Where runs of several arms are the very same up to a place: there they are one result, counted several times."""
    places = [place["at"] for place in data.summary["matched"]["kl"]]
    found = []
    for kl in [*places, *([] if data.summary.get("match_kl") else [None])]:
        groups: dict[str, list[str]] = {}
        for arm in data.arms:
            if until := {seed: path for seed, rows in data.lines(arm).items() if (path := _until(rows, kl))}:
                groups.setdefault(repr(until), []).append(arm)
        where = "the end" if kl is None else nats(kl)
        found += [
            f"at {where}: {listed(arms)} are the same runs up to there" for arms in groups.values() if len(arms) > 1
        ]
    return found


def _until(rows: Sequence[Tree], kl: float | None) -> list[tuple[float, float]]:
    """KL and gold of a run's evaluations up to the first behind a KL, or to its end; empty where it gets not there."""
    place = (len(rows), 1.0) if kl is None else crossing([row["kl"] for row in rows], kl)
    return [(row["kl"], row["gold"]) for row in rows[: place[0] + 1]] if place else []


def _summed(factor: str, said: Mapping[str, Sequence[Tree]]) -> str:
    """Which values are shown to be above which, and where."""
    shown: dict[str, list[str]] = {}
    for where, pairs in said.items():
        for high, low, _ in (_ordered(factor, pair) for pair in pairs if told(pair)):
            shown.setdefault(f"{high} is above {low}", []).append(where)
    tests = sum(pair["interval"] is not None for pairs in said.values() for pair in pairs)
    n = sum(map(len, shown.values()))
    if not n:
        return f"No difference can be told at {listed(list(said))}."
    count = f"{n} of {many(tests, 'tested difference')} {'is' if n == 1 else 'are'} shown"
    if len(shown) > 4:
        return f"{count}."
    return f"{'; '.join(f'{text} at {listed(wheres)}' for text, wheres in shown.items())}. {count}."


def _place(factor: str, where: str, pairs: Sequence[Tree]) -> str:
    """What is shown of a factor at one KL."""
    shown = [f"{high} is above {low} by {by}" for high, low, by in (_ordered(factor, p) for p in pairs if told(p))]
    rest = [pair for pair in pairs if not told(pair)]
    if rest:
        shown.append(f"no difference can be told{f' in {len(rest)} of {len(pairs)} pairs' if len(pairs) > 1 else ''}")
    if near := [_ordered(factor, pair) for pair in rest if outside(pair)]:
        names = [f"{high} above {low} (by {by})" for high, low, by in near]
        shown.append(f"taken alone, the interval leaves out 0 with {listed(names)}")
    return f"at {where}: {'; '.join(shown)}"


def _ordered(factor: str, pair: Tree) -> tuple[str, str, str]:
    """Two values whose difference is shown, the better one first, and by how much."""
    high, low = (pair["b"], pair["a"]) if pair["difference"] > 0 else (pair["a"], pair["b"])
    return _value(factor, high), _value(factor, low), number(abs(pair["difference"]))


def _called(factor: str) -> str:
    return NAMES.get(factor, factor.replace("_", " "))


def _value(factor: str, value: str) -> str:
    """A value by its name, a number with that of its factor."""
    try:
        float(value)
    except ValueError:
        return value
    return f"{_called(factor)} {value}"


def _furthest(run: Tree) -> float:
    return max((row["kl"] for row in run.get("evaluations") or [] if math.isfinite(row["kl"])), default=-1.0)

"""What the KL penalty buys, of arms that differ in ``kl.beta`` alone."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rlkl import settings
from rlkl.grid import statements
from rlkl.grid.cells import coordinates
from rlkl.report.load import Data
from rlkl.report.words import Answer, Tree, cell, difference, many, nats, none, number, share, told, untested, versus
from rlkl.statistics import pairwise
from rlkl.statistics.intervals import FEWEST

Ends = dict[tuple[str, str], tuple[float, float]]
"""The arms of the least and of the largest beta -> these."""


def answers(data: Data) -> Iterator[Answer]:
    """KL and gold at the end of training with the least and the largest beta, and gold at equal KL."""
    asked, void = _asked(data)
    if not asked:
        return
    kls = {arm: list(data.measured(arm, "kl").values()) for both in asked for arm in both}
    spent = pairwise.corrected([pairwise.pair(a, b, kls[a], kls[b]) for a, b in asked])
    places = {place["at"]: _chosen(place["pairs"], asked) for place in data.summary["matched"]["kl"]}
    points, details, verdicts = [], [], []
    for (a, b), less in zip(asked, spent, strict=True):
        known = {kl: pairs[a, b] for kl, pairs in places.items() if (a, b) in pairs}
        verdict, said = _at_equal_kl(known)
        verdicts.append(verdict)
        points.append(f"{_case(a, b, asked[a, b])}: {_at_the_end(data, a, b, less)}; {said}")
        details.append(f"{b} against {a}, KL at the end: {_brief(less)}")
        details += [f"{b} against {a}, {data.gold} at {nats(kl)}: {difference(one)}" for kl, one in known.items()]
    counts = [f"{text} in {n}" for text in dict.fromkeys(verdicts) if (n := verdicts.count(text))]
    head = f"{_less(spent)}{_ratio(data, asked)} At equal KL, {data.gold}: {', '.join(counts)}."
    yield Answer("What does the KL penalty buy?", head + none(data, void, "finished"), tuple(details), tuple(points))


def _asked(data: Data) -> tuple[Ends, list[str]]:
    """Every family of arms that differ in beta alone, by its ends that have a result; and the arms that have none."""
    families: dict[str, list[tuple[float, str]]] = {}
    for arm, runs in data.plan.arms.items():
        keys = settings.decisive(runs[0].config)
        beta = keys.pop("kl.beta", None)
        keys.pop("seed", None)
        if beta is not None:
            families.setdefault(repr(sorted(keys.items(), key=str)), []).append((float(beta), arm))
    found: Ends = {}
    void: list[str] = []
    for family in map(sorted, families.values()):
        there = [(beta, arm) for beta, arm in family if data.measured(arm, "kl")]
        void += [arm for one, arm in family if len(family) > 1 and (one, arm) not in there]
        if len(there) > 1:
            (low, a), (high, b) = there[0], there[-1]
            found[a, b] = low, high
    return found, void


def _case(a: str, b: str, betas: tuple[float, float]) -> str:
    """Two arms by what they share, where their names differ in beta alone; and their betas."""
    one, other = coordinates(a), coordinates(b)
    differ = [key for key in one if one[key] != other.get(key)]
    if len(differ) == 1 and differ != ["arm"] and one.keys() == other.keys():
        name = ",".join([one.pop("arm"), *(f"{key}={x}" for key, x in one.items() if key not in differ)])
    else:
        name = f"{a} → {b}"
    return f"{name}, β from {betas[0]:g} to {betas[1]:g}"


def _at_the_end(data: Data, a: str, b: str, less: Tree) -> str:
    """KL and gold at the end, and whether the KL is shown to differ."""
    kls, golds = ({arm: data.measured(arm, name) for arm in (a, b)} for name in ("kl", "gold"))
    kl = {arm: f"{_cell(kls[arm], 'kl')}{share(data, arm, len(kls[arm]))}" for arm in (a, b)}
    way = ("less" if less["difference"] < 0 else "more") if less["difference"] else "equal"
    if told(less):
        verdict = f"{way}, shown"
    else:
        why = "no difference can be told" if less["interval"] else untested(less)
        verdict = f"{way}{' in mean' if less['difference'] else ''}, {why}"
    gold = f"{data.gold} there from {_cell(golds[a], 'gold')} to {_cell(golds[b], 'gold')}"
    return f"KL at the end goes from {kl[a]} to {kl[b]} nats ({verdict}), {gold}"


def _cell(values: Mapping[int, float], name: str) -> str:
    return cell(statements.cell(list(values.values())), name)


def _less(spent: Sequence[Tree]) -> str:
    """In how many cases there is less KL at the end."""
    shown = sum(told(one) and one["difference"] < 0 for one in spent)
    more = sum(told(one) and one["difference"] > 0 for one in spent)
    mean = sum(not told(one) and one["difference"] < 0 for one in spent)
    text = f"Less KL at the end: shown in {shown} of {many(len(spent), 'case')}"
    text += f", in mean in {mean}{' more' if shown else ''}" if mean else ""
    return f"{text}{f'; more KL is shown in {more}' if more else ''}."


def _ratio(data: Data, asked: Ends) -> str:
    """The KL at the end with the largest beta as a share of that with the least, over all cases, seed by seed.

    In logarithms, as a mean of KL is that of the runs which went far.
    """
    both = [(data.measured(a, "kl"), data.measured(b, "kl")) for a, b in asked]
    seeds = sorted(set.intersection(*(set(one) & set(other) for one, other in both)))
    if len(both) < 2 or len(seeds) < FEWEST or any(min(x[s] for s in seeds) <= 0 for case in both for x in case):
        return ""
    changes = [sum(math.log(other[s] / one[s]) for one, other in both) / len(both) for s in seeds]
    seen = pairwise.paired(changes)
    if seen.interval is None:
        return ""
    low, high = map(math.exp, seen.interval)
    text = f"{number(math.exp(seen.difference))} [{number(low)}, {number(high)}]"
    return f" Over all cases, seed by seed, the largest β leaves {text} of the KL of the least (geometric mean)."


def _brief(one: Tree) -> str:
    """A difference without its probability of improvement."""
    return difference({key: x for key, x in one.items() if not key.startswith("improvement")})


def _chosen(pairs: Sequence[Tree], names: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Tree]:
    """The pairs that the question is about, corrected for each other and for no others."""
    known = {(a, b): one for a, b in names if (one := versus(pairs, a, b))}
    return dict(zip(known, pairwise.corrected(list(known.values())), strict=True))


def _at_equal_kl(pairs: Mapping[float, Tree]) -> tuple[str, str]:
    """Whether the penalty changes what a nat buys, at the largest KL that both get to: in short, and in numbers."""
    if not pairs:
        return "no KL that both get to", "they do not both get to 1 nat, so there is no equal KL to compare them at"
    kl, one = max(pairs.items(), key=lambda entry: entry[0])
    where = f"at equal KL, {nats(kl)}, "
    if one["interval"] is None:
        return untested(one), f"{where}{_brief(one)}"
    if not told(one):
        return "no difference can be told", f"{where}no difference can be told ({_brief(one)})"
    more = "more with the larger β" if one["difference"] > 0 else "less with the larger β"
    return more, f"{where}{more} ({_brief(one)})"

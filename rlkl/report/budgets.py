"""At what budget of labels or queries one family of arms overtakes another, by gold at the end of training."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

from rlkl.grid import statements
from rlkl.grid.cells import coordinates
from rlkl.report.load import Data
from rlkl.report.words import Answer, Tree, cell, difference, listed, nats, none, share, told, untested
from rlkl.statistics import pairwise

BUDGETS = ("budget", "labels", "queries")
"""What the names of axes that are budgets end in; they are of labels unless they say queries."""
Family = Mapping[float, str]
"""Budget -> arm."""


def answers(data: Data) -> Iterator[Answer]:
    """Every two families that have two or more budgets of the same in common."""
    families: dict[tuple[str, str], dict[float, str]] = {}
    for arm in data.arms:
        values = coordinates(arm)
        axis = next((key for key in values if key.endswith(BUDGETS)), None)
        if axis is None:
            continue
        try:
            budget = float(values.pop(axis))
        except ValueError:
            continue
        name = ",".join([values.pop("arm"), *(f"{k}={v}" for k, v in values.items())])
        families.setdefault(("queries" if axis.endswith("queries") else "labels", name), {})[budget] = arm
    for ((unit, one), left), ((other_unit, other), right) in itertools.combinations(families.items(), 2):
        shared = sorted(set(left) & set(right))
        if unit == other_unit and len(shared) > 1:
            yield _overtaking(data, unit, (one, left), (other, right), shared)


def _overtaking(
    data: Data, unit: str, a: tuple[str, Family], b: tuple[str, Family], budgets: Sequence[float]
) -> Answer:
    """Who leads at which budget: what it has bought when training ends, whatever ``match_kl`` is."""
    (one, left), (other, right) = a, b
    golds = {arm: list(data.measured(arm, "gold").values()) for family in (left, right) for arm in family.values()}
    both = [x for x in budgets if golds[left[x]] and golds[right[x]]]
    found = [pairwise.pair(left[x], right[x], golds[left[x]], golds[right[x]]) for x in both]
    pairs = dict(zip(both, pairwise.corrected(found), strict=True))
    points = [
        f"{x:,.0f} {unit}: {one} {_side(data, left[x])}, {other} {_side(data, right[x])}; {_lead(one, other, pair)}"
        for x, pair in pairs.items()
    ]
    void = [family[x] for x in budgets if x not in both for family in (left, right) if not golds[family[x]]]
    place = f" {data.gold[0].upper()}{data.gold[1:]} is read at the end of training"
    place += ", not at match_kl." if data.summary.get("match_kl") else "."
    same = "".join(_unbound(data, unit, name, family) for name, family in (a, b))
    text = _head(unit, one, other, pairs) + place + same + none(data, void, "finished")
    details = [f"{x:,.0f} {unit}, {other} against {one}: {difference(pair)}" for x, pair in pairs.items()]
    question = f"At what budget of {unit} does one of {one} and {other} overtake the other?"
    return Answer(question, text, tuple(details), tuple(points))


def _head(unit: str, one: str, other: str, pairs: Mapping[float, Tree]) -> str:
    """Whether and where one overtakes the other."""
    if not any(pair["interval"] for pair in pairs.values()):
        whys = listed(list(dict.fromkeys(map(untested, pairs.values())))) if pairs else "no budget has two results"
        return f"Nothing is shown about other seeds: {whys}."
    leads = {x: other if pair["difference"] > 0 else one for x, pair in pairs.items() if told(pair)}
    turns = [(x, y) for x, y in itertools.pairwise(leads) if leads[x] != leads[y]]
    if turns:
        said = [f"{leads[y]} overtakes {leads[x]} between {x:,.0f} and {y:,.0f}" for x, y in turns]
        return f"{'; '.join(said)} {unit}."
    if not leads:
        return "At no budget can a difference be told."
    where = listed([f"{x:,.0f}" for x in leads], most=len(leads))
    return f"No overtaking is shown: {next(iter(leads.values()))} leads at {where} {unit}."


def _lead(one: str, other: str, pair: Tree) -> str:
    if told(pair):
        return f"{other if pair['difference'] > 0 else one} leads"
    return "no difference can be told" if pair["interval"] else untested(pair)


def _side(data: Data, arm: str) -> str:
    """Gold and KL of an arm at the end."""
    golds, kls = (list(data.measured(arm, name).values()) for name in ("gold", "kl"))
    return f"{cell(statements.cell(golds))}{share(data, arm, len(golds))} at {nats(sum(kls) / len(kls))}"


def _unbound(data: Data, unit: str, name: str, family: Family) -> str:
    """A warning where budgets of a family end in the very same runs: a cap that nothing reaches compares nothing."""
    groups: dict[str, list[float]] = {}
    for x, arm in sorted(family.items()):
        if data.measured(arm, "gold"):
            groups.setdefault(repr([data.measured(arm, key) for key in ("gold", "kl")]), []).append(x)
    alike = [listed([f"{x:,.0f}" for x in group]) for group in groups.values() if len(group) > 1]
    if not alike:
        return ""
    return (
        f" Warning: {name} ends with the very same {data.gold} and KL at {', at '.join(alike)} {unit}: "
        "these budgets do not bind."
    )

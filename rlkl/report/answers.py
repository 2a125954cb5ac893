"""The questions that a comparison can answer, and what the statistics say, in words."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlkl import settings
from rlkl.grid.cells import coordinates
from rlkl.report.load import Data
from rlkl.report.words import Tree, cell, difference, listed, nats, number, outside, signed, told, versus
from rlkl.statistics import pairwise

BUDGETS = ("budget", "budgets", "labels", "queries", "label_budget", "max_queries")
"""Last parts of axes that are label budgets."""
NATS = (1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Answer:
    """A question, its answer in a sentence, with a point a case where there are several, and what that rests on."""

    question: str
    answer: str
    details: tuple[str, ...] = ()
    points: tuple[str, ...] = ()


def answers(data: Data) -> list[Answer]:
    """All that can be asked of these runs."""
    return [*_most_gold(data), *_factors(data), *_penalty(data), *_budgets(data), *_overoptimised(data)]


def _most_gold(data: Data) -> Iterator[Answer]:
    """Which arm gets the most gold at 1, 2 and 5 nats, or at the end where nothing gets so far."""
    places = {place["at"]: place for place in data.summary["matched"]["kl"]}
    if len(data.arms) < 2:
        return
    never = []
    for kl in sorted({*NATS, *places}):
        found = {arm: c for arm, c in places.get(kl, {"arms": {}})["arms"].items() if c}
        if found:
            question = f"Which arm gets the most {data.gold} at {nats(kl)}?"
            yield Answer(question, *_ranking(data, found, places[kl]["pairs"], "gets there"))
        else:
            never.append(f"{kl:g}")
    if never:
        far = max(data.summary["runs"].values(), key=_furthest)
        text = f"No run gets there; the furthest is one of {far['arm']}, at {number(_furthest(far))} nats."
        yield Answer(f"Which arm gets the most {data.gold} at {listed(never)} nats?", text)
    match = data.summary.get("match_kl")
    if not match:
        ends = {arm: row["gold"] for arm, row in data.summary["arms"].items() if row.get("gold")}
        text, details = _ranking(data, ends, data.summary["pairs"], "has finished")
        text += " Arms end at different KL, so this compares whole recipes, not objectives."
        yield Answer(f"Which arm has the most {data.gold} at the end of training?", text, details)


def _ranking(data: Data, cells: Mapping[str, Tree], pairs: Sequence[Tree], done: str) -> tuple[str, tuple[str, ...]]:
    """The best arm, and which others it can be told from."""
    order = sorted(cells, key=lambda arm: -cells[arm]["mean"])
    best, few = order[0], min(found["n"] for found in cells.values())
    missing = [arm for arm in data.arms if arm not in cells]
    tail = f" Of {listed(missing)} no run {done}." if missing else ""
    there, runs = cells[best]["n"], data.summary["arms"][best]["runs"]
    top = cell(cells[best]) + (f" in {there} of {runs} runs" if there < runs or len(order) == 1 else "")
    if len(order) == 1:
        return f"Only {best} {done}, with {top}.", ()
    against = {arm: pair for arm in order[1:] if (pair := versus(pairs, arm, best))}
    details = tuple(f"{best} against {arm}: {difference(pair)}" for arm, pair in against.items())
    if not any(pair["interval"] for pair in against.values()):
        seeds = f"{few} seed{'s' if few > 1 else ''}"
        text = f"{best} has the highest mean, {top}. With {seeds} in an arm there is no interval, and"
        return f"{text} nothing is shown about other seeds.{tail}", details
    beaten = [arm for arm, pair in against.items() if told(pair)]
    equal = [arm for arm in order[1:] if arm not in beaten]
    alone = [arm for arm in equal if arm in against and outside(against[arm])]
    if alone:
        tail = f" Taken alone, the interval of the difference leaves out 0 against {listed(alone)}.{tail}"
    if not beaten:
        than = f" (against {order[1]}: {difference(against[order[1]])})" if order[1] in against else ""
        text = f"No difference can be told: {best} has the highest mean, {top}, but no other arm is shown"
        return f"{text} to be below it{than}.{tail}", details
    text = f"{best}, with {top}: shown to be above {listed(beaten)} (against {beaten[0]}: "
    text += f"{difference(against[beaten[0]])})"
    return f"{text}{f'; from {listed(equal)} no difference can be told' if equal else ''}.{tail}", details


def _factors(data: Data) -> Iterator[Answer]:
    """For every factor of a grid which of its values gets the most gold, averaged over the other factors."""
    places = [(f"at {nats(place['at'])}", place["factors"]) for place in data.summary["matched"]["kl"]]
    if not data.summary.get("match_kl"):
        places.append(("at the end", data.summary["factors"]))
    for factor in dict.fromkeys(one["factor"] for _, found in places for one in found):
        said = {where: one["pairs"] for where, found in places for one in found if one["factor"] == factor}
        question = f"Which {factor} gets the most {data.gold}, the rest being equal?"
        if not any(pair["interval"] for pairs in said.values() for pair in pairs):
            yield Answer(question, "Too few seeds for intervals; the means are below.", tuple(_every(factor, said)))
            continue
        heads = []
        for where, pairs in said.items():
            shown = [_ordered(factor, pair) for pair in pairs if told(pair)]
            none = f"no difference can be told in {len(pairs) - len(shown)} of {len(pairs)} pairs"
            heads.append(f"{where} {'; '.join([*shown, *([none] if len(shown) < len(pairs) else [])])}")
        every = [pair for pairs in said.values() for pair in pairs]
        head = f"{sum(map(told, every))} of {len(every)} differences are shown."
        yield Answer(question, head, tuple(_every(factor, said)), tuple(heads))


def _every(factor: str, said: Mapping[str, Sequence[Tree]]) -> Iterator[str]:
    for where, pairs in said.items():
        for pair in pairs:
            yield f"{where}, {_value(factor, pair['b'])} against {_value(factor, pair['a'])}: {difference(pair)}"


def _ordered(factor: str, pair: Tree) -> str:
    """Two values whose difference is shown, the better one first."""
    high, low = (pair["b"], pair["a"]) if pair["difference"] > 0 else (pair["a"], pair["b"])
    return f"{_value(factor, high)} is above {_value(factor, low)} by {number(abs(pair['difference']))}"


def _value(factor: str, value: str) -> str:
    """A value by its name, a number with that of its factor."""
    return f"{factor} {value}" if value.replace(".", "").replace("-", "").isdigit() else value


def _penalty(data: Data) -> Iterator[Answer]:
    """What beta buys, for every family of arms that differ in kl.beta alone: its least against its largest."""
    families: dict[str, list[tuple[float, str]]] = {}
    for arm, runs in data.plan.arms.items():
        keys = settings.decisive(runs[0].config)
        beta = keys.pop("kl.beta", None)
        keys.pop("seed", None)
        if beta is not None and data.summary["arms"][arm].get("kl_end"):
            families.setdefault(repr(sorted(keys.items(), key=str)), []).append((float(beta), arm))
    ends = {(one[0][1], one[-1][1]): (one[0][0], one[-1][0]) for one in map(sorted, families.values()) if len(one) > 1}
    places = {place["at"]: _chosen(place["pairs"], ends) for place in data.summary["matched"]["kl"]}
    parts, details, held, verdicts = [], [], 0, []
    for (a, b), (low, high) in ends.items():
        one, other = data.summary["arms"][a], data.summary["arms"][b]
        held += other["kl_end"]["mean"] < one["kl_end"]["mean"]
        text = f"{a} → {b} (β from {low:g} to {high:g}): KL at the end goes from {cell(one['kl_end'])} to "
        text += f"{cell(other['kl_end'])} nats, {data.gold} from {cell(one['gold'])} to {cell(other['gold'])}; "
        known = {kl: pairs[a, b] for kl, pairs in places.items() if (a, b) in pairs}
        verdict, said = _at_equal_kl(known)
        verdicts.append(verdict)
        parts.append(text + said)
        details += [f"{b} against {a} at {nats(kl)}: {difference(pair)}" for kl, pair in known.items()]
    if parts:
        counts = [f"{text} in {n}" for text in dict.fromkeys(verdicts) if (n := verdicts.count(text))]
        head = f"Less KL at the end in {held} of {len(parts)} cases. At equal KL, {data.gold}: {', '.join(counts)}."
        yield Answer("What does the KL penalty buy?", head, tuple(details), tuple(parts))


def _chosen(pairs: Sequence[Tree], names: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Tree]:
    """The pairs that a question is about, corrected for each other and for no others."""
    known = {(a, b): pair for a, b in names if (pair := versus(pairs, a, b))}
    return dict(zip(known, pairwise.corrected(list(known.values())), strict=True))


def _at_equal_kl(pairs: Mapping[float, Tree]) -> tuple[str, str]:
    """Whether the penalty changes what a nat buys, at the largest KL that both get to: in short, and in numbers."""
    if not pairs:
        return "no KL that both get to", "they do not both get to 1 nat, so there is no equal KL to compare them at"
    kl, pair = max(pairs.items(), key=lambda one: one[0])
    where = f"at equal KL, {nats(kl)}"
    if pair["interval"] is None:
        return (
            "too few seeds to tell",
            f"{where}, they differ by {signed(pair['difference'])}, too few seeds to tell",
        )
    if not told(pair):
        return "no difference can be told", f"{where}, no difference can be told ({difference(pair)})"
    more = "more with the larger β" if pair["difference"] > 0 else "less with the larger β"
    return more, f"{where}, {more} ({difference(pair)})"


def _budgets(data: Data) -> Iterator[Answer]:
    """At what label budget one family of arms overtakes another."""
    families: dict[str, dict[float, str]] = {}
    for arm in data.arms:
        values = coordinates(arm)
        axis = next((key for key in values if key.rpartition(".")[2] in BUDGETS), None)
        if axis is None:
            continue
        try:
            budget = float(values.pop(axis))
        except ValueError:
            continue
        name = ",".join([values.pop("arm"), *(f"{k}={v}" for k, v in values.items())])
        families.setdefault(name, {})[budget] = arm
    names = list(families)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            shared = sorted(set(families[one]) & set(families[other]))
            asked = {(families[one][x], families[other][x]): x for x in shared}
            known = {asked[arms]: pair for arms, pair in _chosen(data.summary["pairs"], asked).items()}
            if len(known) > 1:
                yield _overtaking(one, other, known)


def _overtaking(one: str, other: str, pairs: Mapping[float, Tree]) -> Answer:
    """Who leads at which budget."""
    question = f"At what label budget does one of {one} and {other} overtake the other?"
    details = tuple(f"{x:,.0f} labels, {other} against {one}: {difference(pair)}" for x, pair in pairs.items())
    if not any(pair["interval"] for pair in pairs.values()):
        return Answer(question, "Too few seeds for intervals; the means are below.", details)
    leads = {x: (other if pair["difference"] > 0 else one) if told(pair) else None for x, pair in pairs.items()}
    said = [
        f"at {x:,.0f} labels {lead + ' leads' if lead else 'no difference can be told'}" for x, lead in leads.items()
    ]
    places = [x for x, lead in leads.items() if lead]
    turns = [(x, y) for x, y in itertools.pairwise(places) if leads[x] != leads[y]]
    if turns:
        x, y = turns[-1]
        head = f"{leads[y]} overtakes {leads[x]} between {x:,.0f} and {y:,.0f} labels"
    elif not places:
        head = "At no budget can a difference be told"
    else:
        head = f"No overtaking is shown: wherever a difference can be told, {leads[places[0]]} leads"
    return Answer(question, f"{head}: {'; '.join(said)}.", details)


def _overoptimised(data: Data) -> Iterator[Answer]:
    """Where what is trained on rises while gold falls."""
    trained = {arm: names for arm, names in (data.summary.get("proxy") or {}).items() if names}
    if not trained:
        return
    said = []
    for arm in trained:
        runs = [data.summary["runs"][m.name]["evaluations"] for m in data.of(arm)]
        runs = [rows for rows in runs if rows and rows[0].get("proxy") is not None]
        fallen = [
            rows
            for rows in runs
            if (top := max(rows, key=lambda row: row["gold"])) is not rows[-1]
            and rows[-1]["gold"] < top["gold"]
            and rows[-1]["proxy"] > top["proxy"]
        ]
        if fallen:
            tops = [max(rows, key=lambda row: row["gold"]) for rows in fallen]
            drop = sum(top["gold"] - rows[-1]["gold"] for top, rows in zip(tops, fallen, strict=True)) / len(fallen)
            at = sum(top["kl"] for top in tops) / len(tops)
            said.append(
                f"{arm}: in {len(fallen)} of {len(runs)} runs, by {number(drop)} on average after the best evaluation, "
                f"at {nats(float(f'{at:.3g}'))}"
            )
    text = (
        "; ".join(said) + "."
        if said
        else "In no run: none ends with more of what it is trained on and less gold than at an earlier evaluation."
    )
    head = f"Is {data.gold} lost while the proxy still rises?"
    noise = "The best of several evaluations is above its own mean by chance, so a small fall is no proof."
    yield Answer(head, text, (noise,) if said else ())


def _furthest(run: Tree) -> float:
    return max((row["kl"] for row in run.get("evaluations") or [] if math.isfinite(row["kl"])), default=-1.0)

"""Numbers, estimates and comparisons of arms as they are read, and what became of runs without a result."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlkl.grid import tables
from rlkl.report.load import Data
from rlkl.statistics.intervals import FEWEST

Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """A question, its answer in a sentence, with a point a case where there are several, and what that rests on."""

    question: str
    answer: str
    details: tuple[str, ...] = ()
    points: tuple[str, ...] = ()


LEAST = 5e-4
"""What rounds to nothing at three places."""


def number(x: float | None, beside: Iterable[float] = ()) -> str:
    """A number for reading, to three digits; whole ones as they are.

    A small one keeps its digits (p-values, rates), unless it is read ``beside`` numbers next to which it is nothing.
    """
    if x is None or not math.isfinite(x):
        return "–"
    size = abs(x)
    if 0 < size < LEAST and any(abs(other) >= LEAST for other in beside):
        return "0.000"
    rounded = round(size, _places(size))
    if size and (size < LEAST or size >= 1e7):
        text = f"{x:.1e}"
    elif float(x).is_integer() or rounded >= 1000:
        text = f"{x + 0.0:,.0f}"  # of -0 that is 0
    else:
        text = f"{x:.{_places(rounded)}f}"
    return text.replace("-", "−")


def _places(size: float) -> int:
    return 1 if size >= 100 else 2 if size >= 1 else 3


def signed(x: float) -> str:
    """A difference to three places, with a sign; one that rounds to nothing has none."""
    text = f"{x:+.3f}".replace("-", "−")
    return "0.000" if text in ("+0.000", "−0.000") else text


def cell(found: Tree | None, name: str = "gold") -> str:
    """A cell of the statistics: mean with its interval, or with the range of fewer than 3 runs.

    Cut at what the quantity called ``name`` can be; nats and shares are nothing below half a thousandth.
    """
    if not found:
        return "–"
    least, most = tables.spread(name, found)
    each = (tables.cut(name, found["mean"]), least, most)
    mean, low, high = (number(x, (*each, float(name in tables.BOUNDS))) for x in each)
    if found.get("interval"):
        return f"{mean} [{low}, {high}]"
    return mean if found["n"] == 1 else f"{mean} ({low}{'–' if least >= 0 else ' to '}{high})"


def told(pair: Tree) -> bool:
    """Whether seeds tell two arms apart: Holm's p below 5 %."""
    return pair["p_holm"] is not None and pair["p_holm"] < 0.05


def versus(pairs: Sequence[Tree], a: str, b: str) -> Tree | None:
    """The comparison of two arms as ``b`` less ``a``, whichever way it is stored."""
    for pair in pairs:
        if (pair["a"], pair["b"]) == (a, b):
            return pair
        if (pair["a"], pair["b"]) == (b, a):
            return _turned(pair)
    return None


def _turned(pair: Tree) -> Tree:
    def other(bounds: Sequence[float] | None, whole: float) -> list[float] | None:
        return None if bounds is None else [whole - bounds[1], whole - bounds[0]]

    prompts = pair.get("prompts")
    return {
        **pair,
        "a": pair["b"],
        "b": pair["a"],
        "n": pair["n"][::-1],
        "difference": -pair["difference"],
        "interval": other(pair["interval"], 0.0),
        "improvement": 1 - pair["improvement"],
        "improvement_interval": other(pair["improvement_interval"], 1.0),
        "prompts": prompts
        and {**prompts, "difference": -prompts["difference"], "interval": other(prompts["interval"], 0.0)},
    }


def outside(pair: Tree) -> bool:
    """Whether the interval of the difference, uncorrected for other tests, leaves out 0."""
    return pair["interval"] is not None and not pair["interval"][0] <= 0 <= pair["interval"][1]


def untested(pair: Tree) -> str:
    """Why two arms, or two values, have no test: too few seeds, or seeds that do not differ."""
    seeds = pair["n"] if isinstance(pair["n"], int) else min(pair["n"])
    return "too few seeds to test" if seeds < FEWEST else "not tested (their seeds do not differ)"


def difference(pair: Tree) -> str:
    """Two arms, or two values of a factor, in numbers: the second less the first."""
    text = signed(pair["difference"])
    if pair["interval"]:
        low, high = pair["interval"]
        text += f" [{signed(low)}, {signed(high)}]"
    else:
        text += f", {untested(pair)}"
    if "cells" in pair:
        text += f", in {pair['cells']} of {many(pair['of'], 'combination')}"
    elif "improvement" in pair:
        text += f", probability of improvement {number(pair['improvement'])}"
        if inside := pair["improvement_interval"]:
            text += f" [{number(inside[0])}, {number(inside[1])}]"
    if pair["p_holm"] is not None:
        text += f", p\u00a0=\u00a0{number(pair['p_holm'])} after Holm"
    return text


def nats(x: float) -> str:
    """A KL to be read."""
    text = f"{x:g}" if len(f"{x:g}") < 5 else number(x, (1.0,))
    return f"{text} nat{'s' if text != '1' else ''}"


def many(n: int, noun: str) -> str:
    """A number of things."""
    return f"{n} {noun}{'s' if n != 1 else ''}"


def listed(names: Sequence[str], most: int = 4) -> str:
    """Names with commas and an *and*; of more than ``most`` the first and how many more."""
    shown = list(names) if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def lost(data: Data, arm: str) -> str:
    """How many runs of an arm have no result, by kind: *2 diverged and 1 not finished*; nothing where all have."""
    kinds = [_kind(member.error) for member in data.failed if member.arm == arm]
    counts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
    return listed(counts) if counts else ""


def _kind(error: str | None) -> str:
    text = error or ""
    if text.startswith("diverged") or "not finite" in text:
        return "diverged"
    return "not finished" if text.startswith(("not finished", "never began")) else "failed"


def share(data: Data, arm: str, n: int) -> str:
    """Of how many of an arm's runs something is, where not of all: *, in 2 of 3 runs (1 diverged)*."""
    runs, gone = data.summary["arms"][arm]["runs"], lost(data, arm)
    return f", in {n} of {runs} runs{f' ({gone})' if gone else ''}" if n < runs else ""


def none(data: Data, arms: Sequence[str], done: str) -> str:
    """What is said of arms that have nothing to show: that they have no result, or that no run of them got there."""
    void = [f"{arm} ({lost(data, arm)})" for arm in arms if not data.of(arm)]
    short = [arm for arm in arms if data.of(arm)]
    text = f" {listed(void)} {'has' if len(void) == 1 else 'have'} no result." if void else ""
    return f"{text} Of {listed(short)} no run {done}." if short else text

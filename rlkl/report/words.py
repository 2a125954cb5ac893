"""Numbers, estimates and comparisons of arms as they are read."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Tree = Mapping[str, Any]


def number(x: float | None) -> str:
    """A number for reading, to three digits; whole ones as they are."""
    if x is None or not math.isfinite(x):
        return "–"
    size = abs(x)
    if size and (size < 5e-4 or size >= 1e7):
        return f"{x:.1e}"
    if float(x).is_integer() or size >= 1000:
        return f"{x:,.0f}"
    return f"{x:.{1 if size >= 100 else 2 if size >= 1 else 3}f}"


def signed(x: float) -> str:
    """A difference to three places, with a sign."""
    return f"{x:+.3f}".replace("-", "−")


def cell(found: Tree | None) -> str:
    """A cell of the statistics: mean with its interval, or with the range of fewer than 3 runs."""
    if not found:
        return "–"
    mean, inside = number(found["mean"]), found.get("interval")
    if inside:
        return f"{mean} [{number(inside['low'])}, {number(inside['high'])}]"
    if found["n"] == 1:
        return mean
    return f"{mean} ({number(found['min'])}–{number(found['max'])})"


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


def difference(pair: Tree) -> str:
    """Two arms, or two values of a factor, in numbers: the second less the first."""
    text = signed(pair["difference"])
    if pair["interval"]:
        low, high = pair["interval"]
        text += f" [{signed(low)}, {signed(high)}]"
    if "cells" in pair:
        text += f", in {pair['cells']} of {pair['of']} combinations"
    else:
        text += f", probability of improvement {number(pair['improvement'])}"
        if inside := pair["improvement_interval"]:
            text += f" [{number(inside[0])}, {number(inside[1])}]"
    if pair["p_holm"] is not None:
        text += f", p\u00a0=\u00a0{number(pair['p_holm'])} after Holm"
    return text


def nats(x: float) -> str:
    """A KL to be read."""
    return f"{x:g} nat{'s' if x != 1 else ''}"


def listed(names: Sequence[str], most: int = 4) -> str:
    """Names with commas and an *and*; of more than ``most`` the first and how many more."""
    shown = list(names) if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"

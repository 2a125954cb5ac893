"""What the finished runs of an arm ended with, and what became of the others."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlkl.report.load import Data
from rlkl.report.words import listed
from rlkl.statistics import pairwise


def ends(data: Data, arm: str, name: str) -> dict[int, float]:
    """Seed -> a quantity at the last evaluation, of all finished runs, whether or not they get to ``match_kl``."""
    runs = [run for run in data.summary["runs"].values() if run["arm"] == arm and run["error"] is None]
    return {run["seed"]: run["evaluations"][-1][name] for run in runs if run["evaluations"]}


def pair(a: str, b: str, one: Mapping[int, float], other: Mapping[int, float]) -> dict[str, Any]:
    """Two arms by what their seeds gave, the second less the first: Welch's interval and test."""
    seen = pairwise.difference(list(one.values()), list(other.values()))
    n = [len(one), len(other)]
    return {"a": a, "b": b, "n": n, "difference": seen.value, "interval": seen.interval, "p": seen.p}


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

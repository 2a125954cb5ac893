"""What one factor of a grid does, the rest being equal: arm, axis or bundle, averaged over the others. Torch-free."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rlkl.grid.cells import coordinates
from rlkl.grid.results import Result
from rlkl.statistics import pairwise

Tree = dict[str, Any]
Place = frozenset[tuple[str, str]]
"""Values of the other factors."""


def effects(mine: Mapping[str, Sequence[Result]], value: Callable[[Result], float | None]) -> list[Tree]:
    """For every factor its values in pairs, the later less the earlier, where more than one factor is varied.

    Two values are compared in the combinations of the other factors that have both and where all their runs have a
    result: ``cells`` of ``of`` combinations. Seed by seed their differences are averaged; the interval is Student's of
    these means, since runs of a seed share prompts and randomness, and Holm's p counts the pairs of the factor.
    """
    found = {name: coordinates(name) for name in mine}
    values = {
        factor: list(dict.fromkeys(place[factor] for place in found.values() if factor in place))
        for factor in dict.fromkeys(key for place in found.values() for key in place)
    }
    varied = [factor for factor, each in values.items() if len(each) > 1]
    if len(varied) < 2:
        return []
    got = {name: {r.seed: value(r) if r.error is None else None for r in runs} for name, runs in mine.items()}
    pairs = {factor: pairwise.corrected(list(_pairs(factor, values[factor], found, got))) for factor in varied}
    return [{"factor": factor, "pairs": each} for factor, each in pairs.items() if each]


def _pairs(
    factor: str,
    values: Sequence[str],
    found: Mapping[str, Mapping[str, str]],
    got: Mapping[str, Mapping[int, float | None]],
) -> Iterator[Tree]:
    by_place: dict[Place, dict[str, str]] = {}
    for name, place in found.items():
        if factor in place:
            rest = frozenset((key, x) for key, x in place.items() if key != factor)
            by_place.setdefault(rest, {})[place[factor]] = name
    for a, b in itertools.combinations(values, 2):
        both = [(got[names[a]], got[names[b]]) for names in by_place.values() if a in names and b in names]
        whole = [changed for one, other in both if (changed := _changes(one, other))]
        seeds = sorted(set.intersection(*map(set, whole))) if whole else []
        if seeds:
            changes = [sum(one[seed] for one in whole) / len(whole) for seed in seeds]
            yield {
                "a": a,
                "b": b,
                "cells": len(whole),
                "of": len(both),
                "n": len(seeds),
                **pairwise.paired(changes)._asdict(),
            }


def _changes(one: Mapping[int, float | None], other: Mapping[int, float | None]) -> dict[int, float]:
    """Seed by seed the later less the earlier; nothing where a run of either has no result."""
    both = {seed: (one[seed], other[seed]) for seed in one.keys() & other.keys()}
    known = {seed: y - x for seed, (x, y) in both.items() if x is not None and y is not None}
    return known if None not in (*one.values(), *other.values()) else {}

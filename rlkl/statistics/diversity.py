"""Collapse of a set of completions, from their tokens."""

import math
from collections import Counter
from collections.abc import Sequence

Ids = Sequence[Sequence[int]]


def distinct(completions: Ids, n: int) -> float:
    """Distinct n-grams of tokens over all n-grams (Li et al. 2016), between 0 and 1; 0 where there is none."""
    grams = [gram for ids in completions for gram in _grams(ids, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(completions: Ids, order: int = 4) -> float:
    r"""BLEU (Papineni et al. 2002) of every completion against all others (Zhu et al. 2018), of the whole set, 0 to 1.

    :math:`BP\cdot\exp(\frac1N\sum_{n\le N}\log p_n)`: :math:`p_n` is the share of all n-grams, each clipped at the
    most of it in one other completion; BP compares total lengths with those of the nearest other length (the shorter
    of two). Counts are summed over the set before they are divided, so short completions need no smoothing. N is
    ``order``, or the most tokens of a completion where that is less. 1 = all are equal; 0 of fewer than two, and of no
    shared n-gram.
    """
    rows = [tuple(ids) for ids in completions]
    order = min(order, max(map(len, rows), default=0))
    if len(rows) < 2 or order == 0:
        return 0.0
    precisions = [_precision(rows, n) for n in range(1, order + 1)]
    if min(precisions) == 0:
        return 0.0
    lengths = Counter(map(len, rows))
    length = sum(map(len, rows))
    nearest = sum(count * _nearest(size, lengths) for size, count in lengths.items())
    penalty = 1.0 if length >= nearest else math.exp(1 - nearest / length)
    return penalty * math.exp(sum(map(math.log, precisions)) / order)


def _precision(rows: Ids, n: int) -> float:
    counts = [Counter(_grams(ids, n)) for ids in rows]
    first: dict[tuple[int, ...], tuple[int, int, int]] = {}  # the most in one, in which, and the most in any other
    for i, mine in enumerate(counts):
        for gram, count in mine.items():
            most, where, second = first.get(gram, (0, -1, 0))
            first[gram] = (count, i, most) if count > most else (most, where, max(second, count))
    matched = total = 0
    for i, mine in enumerate(counts):
        for gram, count in mine.items():
            most, where, second = first[gram]
            matched, total = matched + min(count, second if where == i else most), total + count
    return matched / total if total else 0.0


def _nearest(size: int, lengths: Counter[int]) -> int:
    others = [length for length, count in lengths.items() if length != size or count > 1]
    return min(others, key=lambda length: (abs(length - size), length))


def _grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]

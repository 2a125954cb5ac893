"""How far annotators agree on completions that several of them judged: Krippendorff's alpha, and plain agreement."""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rlkl.data.annotated import Annotated

Unit = Sequence[Hashable]  # what each annotator said of one character or token
Places = Sequence[Iterable[int]]  # of one record: what each span marks


@dataclass(frozen=True)
class Agreement:
    """``alpha`` is None where all values are the same, ``observed`` the share of equal pairs."""

    alpha: float | None
    observed: float
    units: int


def krippendorff(units: Iterable[Unit]) -> Agreement | None:
    r"""Krippendorff's :math:`\alpha = 1 - D_o/D_e` for nominal values (Krippendorff 2004, ch. 11).

    With :math:`m_u \ge 2` values in unit u, :math:`n_{uv}` of them v, and n values in all such units:
    :math:`D_o = \frac1n \sum_u \frac{m_u^2 - \sum_v n_{uv}^2}{m_u - 1}` and
    :math:`D_e = \frac{n^2 - \sum_v n_v^2}{n (n - 1)}`. 1 is perfect, 0 is chance. None without such a unit.
    """
    counted = Counter(tuple(sorted(Counter(unit).items(), key=repr)) for unit in units if len(unit) > 1)
    if not counted:
        return None
    total: Counter[Hashable] = Counter()
    disagreed, pairs, equal = 0.0, 0, 0
    for values, times in counted.items():
        m, squares = sum(n for _, n in values), sum(n * n for _, n in values)
        disagreed += times * (m * m - squares) / (m - 1)
        pairs += times * m * (m - 1)
        equal += times * (squares - m)
        for value, n in values:
            total[value] += times * n
    n = total.total()
    chance = n * n - sum(k * k for k in total.values())
    alpha = 1 - disagreed * (n - 1) / chance if chance else None
    return Agreement(alpha, equal / pairs, sum(counted.values()))


def units(
    records: Sequence[Annotated], sizes: Iterable[int], places: Iterable[Places], label: str | None = None
) -> Iterator[Unit]:
    """What the annotators of each record said of each of its characters, or tokens: marked (by a label) or not.

    ``places`` holds for each record those that each of its spans marks; a record has ``sizes`` of them.
    """
    for record, size, held in zip(records, sizes, places, strict=True):
        marked: dict[str | None, set[int]] = {name: set() for name in record.annotators or []}
        for span, where in zip(record.spans, held, strict=True):
            if record.annotators and label in (None, span.label):
                marked[span.annotator].update(where)
        yield from zip(*([i in found for i in range(size)] for found in marked.values()), strict=True)

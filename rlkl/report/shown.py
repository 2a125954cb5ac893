"""Completions of the same prompts side by side: what each arm writes, and the numbers of its tokens."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any

from markupsafe import escape

from rlkl.grid import tables
from rlkl.report.load import Data, Member
from rlkl.report.words import number

Row = Mapping[str, Any]
ROOM = 600_000
"""Bytes that tokens and their numbers may take of the page; prompts beyond are left out, and that is said."""
NAMES = {"kl": "KL, nats", "advantage": "advantage", "logp": "log p", "ref_logp": "log p of the reference"}


@dataclass(frozen=True)
class Cell:
    """A completion: whose it is, its tokens' texts, how it ended, its totals, and the place of its numbers.

    ``cut`` counts the tokens that are left out at its end.
    """

    who: str
    pieces: list[str]
    end: str
    totals: list[tuple[str, str]]
    index: int
    cut: int = 0


@dataclass
class Shown:
    """``prompts``: seed, prompt and cells; ``numbers``: a mapping a cell, measure -> a number a token."""

    prompts: list[tuple[int, str, list[Cell]]] = field(default_factory=list)
    numbers: list[dict[str, list[float]]] = field(default_factory=list)
    left_out: int = 0

    @property
    def seeds(self) -> list[int]:
        """In order of appearance."""
        return list(dict.fromkeys(seed for seed, _, _ in self.prompts))

    @property
    def measures(self) -> dict[str, str]:
        """What tokens can be coloured by, with its name for readers."""
        keys = dict.fromkeys(key for one in self.numbers for key in one if key not in ("logp", "ref_logp"))
        order = sorted(keys, key=lambda key: (key != "kl", key != "advantage"))
        return {key: NAMES.get(key, f"reward of {key.removeprefix('reward/')}") for key in order}

    @property
    def scale(self) -> dict[str, float]:
        """The size of each measure from which on its colour is full: of the 99th percentiles of arms the median.

        The largest size would let one arm that has collapsed leave the tokens of all others without a colour.
        """
        cells = [cell for _, _, each in self.prompts for cell in each]
        found: dict[str, float] = {}
        for key in self.measures:
            sizes: dict[str, list[float]] = {}
            for cell in cells:
                sizes.setdefault(cell.who, []).extend(abs(x) for x in self.numbers[cell.index].get(key, ()) if x)
            found[key] = median_low([_percentile(xs) for xs in sizes.values() if xs] or [0.0])
        return found

    def data(self) -> dict[str, Any]:
        """What the page's script reads."""
        return {"numbers": self.numbers, "scale": self.scale, "names": {**NAMES, **self.measures}}


def shown(data: Data) -> Shown:
    """The samples of all finished runs, seed by seed, within :data:`ROOM`; the first prompt is cut to fit."""
    found, used = Shown(), 0
    for seed, prompt, rows in _prompts(data):
        cells, numbers, size = _side(rows, len(found.numbers))
        if not found.prompts and size > ROOM:
            most = max(len(cell.pieces) for cell in cells) * ROOM // size
            cells, numbers, size = _side(rows, len(found.numbers), most)
        elif used + size > ROOM:
            found.left_out += 1
            continue
        used += size
        found.prompts.append((seed, prompt, cells))
        found.numbers += numbers
    return found


def _side(
    rows: Sequence[tuple[str, Row]], index: int, most: int | None = None
) -> tuple[list[Cell], list[dict[str, list[float]]], int]:
    """Completions of a prompt with their numbers, ``most`` tokens of each, and the bytes that they take of the page."""
    cells = [_cell(who, row, index + k, most) for k, (who, row) in enumerate(rows)]
    numbers = [_numbers(row, most) for _, row in rows]
    size = len(json.dumps(numbers, separators=(",", ":")))
    size += sum(15 + len(str(escape(piece)).encode()) for cell in cells for piece in cell.pieces)
    return cells, numbers, size


def _prompts(data: Data) -> Iterator[tuple[int, str, list[tuple[str, Row]]]]:
    """Every seed and prompt with its rows: before training, then the last of every arm."""
    seeds = list(dict.fromkeys(member.seed for member in data.members if member.error is None))
    for seed in seeds:
        ends = {m.arm: _ends(m) for m in data.members if m.error is None and m.seed == seed and m.samples}
        for prompt in dict.fromkeys(prompt for before, after in ends.values() for prompt in (*before, *after)):
            first = {arm: before[prompt] for arm, (before, _) in ends.items() if prompt in before}
            rows: list[tuple[str, Row]] = []
            if len({row["completion"] for row in first.values()}) == 1:
                rows.append(("before training", next(iter(first.values()))))
            else:
                rows += [(f"{arm}, before training", row) for arm, row in first.items()]
            rows += [(arm, after[prompt]) for arm, (_, after) in ends.items() if prompt in after]
            yield seed, prompt, rows


def _ends(member: Member) -> tuple[dict[str, Row], dict[str, Row]]:
    """Prompt -> row, at the first and at the last evaluation."""
    steps = [row["step"] for row in member.samples]
    first, last = (
        {str(row["prompt"]): row for row in member.samples if row["step"] == step} for step in (steps[0], steps[-1])
    )
    return dict(first), dict(last) if steps[0] != steps[-1] else {}


def _cell(who: str, row: Row, index: int, most: int | None = None) -> Cell:
    totals = [("KL", f"{number(tables.cut('kl', row['kl']), (1.0,))} nats")]
    totals += [(key.removeprefix("reward/"), number(x)) for key, x in row.items() if key.startswith("reward/")]
    pieces = (row.get("tokens") or {}).get("text") or [row["completion"]]
    return Cell(who, pieces[:most], row["end"], totals, index, len(pieces) - len(pieces[:most]))


def _numbers(row: Row, most: int | None = None) -> dict[str, list[float]]:
    return {key: _short(xs[:most]) for key, xs in (row.get("tokens") or {}).items() if key != "text"}


def _percentile(sizes: Sequence[float]) -> float:
    """The 99th, by nearest rank."""
    return sorted(sizes)[math.ceil(0.99 * len(sizes)) - 1]


def _short(xs: Sequence[float]) -> list[float]:
    """Three digits, and zeros as they are shortest."""
    return [int(y) if (y := float(f"{x:.3g}")).is_integer() else y for x in xs]

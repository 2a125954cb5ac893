"""The combinations of a comparison: every arm with every value of its axes and bundles, less what is left out.

Torch-free.
"""

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlkl import settings
from rlkl.config.compare import CompareConfig

Changes = list[tuple[str, Any]]
TAKEN = ("arm", "seed")
"""What the names of runs say beside bundles and axes."""


@dataclass(frozen=True)
class Cell:
    """A row of the table: ``arm`` with a value on every axis, its name, and what that changes, in order of precedence.

    ``place`` is its combination as ``include`` and ``exclude`` write it. A change is who makes it (the arm, a bundle or
    an axis, as the comparison has it), its key and its value.
    """

    arm: str
    name: str
    place: dict[str, Any]
    changes: list[tuple[str, str, Any]]


def cells(config: CompareConfig) -> list[Cell]:
    """The combinations that are run.

    Raises:
        ValueError: one comes twice; include or exclude name what there is not; none is left.
    """
    every = list(_product(config))
    for kind, partials in (("include", config.include), ("exclude", config.exclude)):
        for n, partial in enumerate(partials):
            _check_partial(f"{kind}[{n}]", partial, every)
    kept = [cell for cell in every if not config.include or any(_matches(cell, p) for p in config.include)]
    left = [cell for cell in kept if not any(_matches(cell, p) for p in config.exclude)]
    if not left:
        raise ValueError(f"exclude: none of {len(kept)} combinations is left; drop an entry")
    if config.include or config.exclude:
        gone = [arm for arm in config.arms if arm not in {cell.arm for cell in left}]
        if gone:
            raise ValueError(f"arms.{gone[0]}: include and exclude leave none of its combinations; drop the arm")
    return left


def coordinates(name: str) -> dict[str, str]:
    """What the name of a row says: its arm, and its value on every bundle and axis as names have them."""
    arm, *rest = name.split(",")
    return {"arm": arm} | dict(part.split("=", 1) for part in rest if "=" in part)


def _shown(config: CompareConfig) -> list[str]:
    """The axes as names of runs have them: the last part of the key, where nothing else goes by it."""
    leaves = [key.rpartition(".")[2] for key in config.axes]
    known = [*TAKEN, *config.bundles, *leaves]
    return [leaf if known.count(leaf) == 1 else key for leaf, key in zip(leaves, config.axes, strict=True)]


def _product(config: CompareConfig) -> Iterator[Cell]:
    short = _shown(config)
    seen: dict[str, Any] = {}
    for arm, changes in config.arms.items():
        own = _by(f"arms.{arm}", _typed({key: value for key, value in changes.items() if key != "base"}))
        for chosen in itertools.product(*config.bundles.values()):
            named = dict(zip(config.bundles, chosen, strict=True))
            bundled = [
                change
                for name, x in named.items()
                for change in _by(f"bundles.{name}", _typed(config.bundles[name][x]))
            ]
            labels = [f",{name}={x}" for name, x in named.items()]
            for values in itertools.product(*config.axes.values()):
                shown = [f",{key}={_label(x)}" for key, x in zip(short, values, strict=True)]
                name = "".join([arm, *labels, *shown])
                if name in seen:
                    both = f"{settings.show(seen[name])} and {settings.show(values)}"
                    raise ValueError(f"axes: {name} comes twice, from {both}; drop one")
                seen[name] = values
                axes = dict(zip(config.axes, values, strict=True))
                swept = [(f"axes.{key}", key, value) for key, value in axes.items()]
                yield Cell(arm, name, {"arm": arm, **named, **axes}, [*own, *bundled, *swept])


def _by(who: str, changes: Changes) -> list[tuple[str, str, Any]]:
    return [(who, key, value) for key, value in changes]


def _typed(changes: Mapping[str, Any]) -> Changes:
    """Flat changes; a type comes first, since it drops what its section held."""
    return sorted(settings.flat(changes), key=lambda change: change[0].rpartition(".")[2] != "type")


def _matches(cell: Cell, partial: Mapping[str, Any]) -> bool:
    return all(_is(cell.place[key], wanted) for key, wanted in settings.flat(partial))


def _is(value: Any, wanted: Any) -> bool:
    """Whether a value is what is asked for: itself, or one of a list."""
    return bool(value == wanted or (isinstance(wanted, list) and value in wanted))


def _check_partial(where: str, partial: Mapping[str, Any], every: Sequence[Cell]) -> None:
    known = every[0].place
    if not partial:
        raise ValueError(f"{where}: it is empty; name some of {', '.join(known)}")
    for key, wanted in settings.flat(partial):
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise ValueError(f"{where}: {key} is neither arm, axis nor bundle, {hint}")
        values = {settings.show(cell.place[key]): cell.place[key] for cell in every}
        every_value = list(values.values())
        several = isinstance(wanted, list) and wanted and wanted not in every_value
        for one in wanted if several else [wanted]:
            if one not in every_value:
                raise ValueError(f"{where}: {key}={settings.show(one)} is none of its values ({', '.join(values)})")


def _label(value: Any) -> str:
    """A value as part of a folder's name; a number is not rounded."""
    if isinstance(value, float):
        text = short if float(short := f"{value:g}") == value else repr(value)
        return text.replace("e+", "e")
    text = settings.show(value).strip("[]{}")
    return re.sub(r"[^\w.-]+", "-", text) or "-"

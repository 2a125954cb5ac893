"""From the configuration of a comparison to its runs, all of them checked; and what is said before they start.

Torch-free. A run of the plan is an ordinary run: ``rlkl train <folder>/<name>/<run>/config.yaml`` does it again.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlkl import importing, metrics, settings
from rlkl.config import Config
from rlkl.config.compare import CompareConfig
from rlkl.grid.cells import Cell, cells

SET_HERE = {"name": "name", "folder": "folder", "seed": "seeds", "log.group": "name"}
"""Keys of a run that a comparison sets, and its own key that decides them."""


@dataclass(frozen=True)
class Run:
    """One run: ``arm`` is its row of the table, with the values of the axes; ``of`` is the arm without them."""

    arm: str
    config: Config
    of: str

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return Path(self.config.folder) / self.config.name


@dataclass(frozen=True)
class Plan:
    """All runs of a comparison, in the order in which they are started."""

    config: CompareConfig
    gold: str
    runs: list[Run]

    @property
    def folder(self) -> Path:
        """Where the comparison is written."""
        return Path(self.config.folder) / self.config.name

    @property
    def arms(self) -> dict[str, list[Run]]:
        """The runs of each arm."""
        names = dict.fromkeys(run.arm for run in self.runs)
        return {name: [run for run in self.runs if run.arm == name] for name in names}


def make(source: str | Path | Mapping[str, Any] | CompareConfig, overrides: Sequence[str] = ()) -> Plan:
    """The runs of a comparison, from its YAML file or mapping with ``key.sub=value`` overrides.

    Raises:
        ValueError: one line a mistake, in the comparison or, with the arm's name, in a run.
    """
    config = read(source, overrides)
    arms: dict[str, list[Run]] = {}
    mistakes: dict[str, list[str]] = {}
    for cell in cells(config):
        try:
            arms[cell.name] = [_run(config, cell, seed) for seed in config.seeds]
        except ValueError as error:
            for text in str(error).splitlines():
                mistakes.setdefault(text, []).append(cell.name)
    if mistakes:
        raise ValueError("\n".join(f"{_listed(names)}: {text}" for text, names in mistakes.items()))
    _check_twins(arms)
    _check_columns(config.columns)
    # Seed by seed: all arms show early what becomes of them.
    return Plan(config, _gold(config, arms), [run for runs in zip(*arms.values(), strict=True) for run in runs])


def read(source: str | Path | Mapping[str, Any] | CompareConfig, overrides: Sequence[str] = ()) -> CompareConfig:
    """The configuration of a comparison; a base that is a path is read from beside the file.

    Raises:
        ValueError: one line a mistake.
    """
    if isinstance(source, CompareConfig):
        source = source.model_dump(mode="json")
    tree = settings.read(source)
    beside = Path(source).parent if isinstance(source, (str, Path)) else Path()
    where = f"{source}: " if isinstance(source, (str, Path)) else ""
    if "arms" not in tree and {"model", "data", "rewards", "trainer"} & set(tree):
        raise ValueError(
            f"{where}this is a run, not a comparison; use rlkl train, or make it the base of a file with arms and seeds"
        )
    _read_bases(tree, beside)
    for override in overrides:
        settings.put(tree, *settings.parse(override))
        _read_bases(tree, beside)
    kept: Any = OmegaConf.to_container(tree, resolve=False)  # an interpolation in base or arms is the run's own
    kept = {key: kept[key] for key in ("base", "arms") if key in kept}
    own = settings.resolve(OmegaConf.masked_copy(tree, [str(key) for key in tree if key not in kept]))
    if isinstance(own.get("axes"), dict):
        own["axes"] = dict(settings.flat(own["axes"]))
    return settings.check(own | kept, CompareConfig)


def diff(plan: Plan) -> dict[str, dict[str, str]]:
    """Key -> arm -> value, for the keys in which arms differ; ``–`` where an arm has no such key."""
    values = {arm: settings.decisive(runs[0].config) for arm, runs in plan.arms.items()}
    keys = dict.fromkeys(key for one in values.values() for key in one)
    table = {key: {arm: settings.show(one[key]) if key in one else "–" for arm, one in values.items()} for key in keys}
    return {key: row for key, row in table.items() if len(set(row.values())) > 1}


def check_functions(runs: Sequence[Run]) -> None:
    """Refuse functions that cannot be imported, before any run has begun.

    Raises:
        ValueError: a line each, with the arms that name it.
    """
    arms: dict[importing.Asked, list[str]] = {}
    for run in runs:
        for asked in importing.named(run.config):
            arms.setdefault(asked, []).append(run.arm)
    found = dict(zip(arms, importing.mistakes(list(arms)), strict=True))
    said = []
    for asked, error in found.items():
        names = list(dict.fromkeys(arms[asked]))
        said += [f"arm{'s' if len(names) > 1 else ''} {', '.join(names)}: {error}"] if error else []
    if said:
        raise ValueError("\n".join(said))


def _read_bases(tree: DictConfig, beside: Path) -> None:
    """Put what a base's file holds in the place of its path, of the comparison and of arms with one of their own."""
    plain: Any = OmegaConf.to_container(tree, resolve=False)
    arms = plain.get("arms") if isinstance(plain.get("arms"), dict) else {}
    own = {f"arms.{arm}": changes for arm, changes in arms.items() if isinstance(changes, dict)}
    for where, holder in {"": plain, **own}.items():
        base = holder.get("base")
        if isinstance(base, str):
            read = settings.read(beside / base)
            if "arms" in read:
                raise ValueError(
                    f"{where}{'.' * bool(where)}base={base}: this is a comparison itself; name a run's YAML"
                )
            section = tree.arms[where.removeprefix("arms.")] if where else tree
            section["base"] = read


def _listed(arms: Sequence[str]) -> str:
    more = [f"{len(arms) - 4} more"] if len(arms) > 5 else []
    return f"arm{'s' if len(arms) > 1 else ''} {', '.join([*arms[: 4 if more else None], *more])}"


def _run(config: CompareConfig, cell: Cell, seed: int) -> Run:
    tree = OmegaConf.create(config.arms[cell.arm].get("base", config.base))
    caps = {f"train.budget.{name}": cap for name, cap in config.budgets.model_dump(exclude_none=True).items()}
    decided = SET_HERE | dict.fromkeys(caps, "budgets")
    for _, key, _ in cell.changes:
        if key in decided:
            raise ValueError(f"{key}: the comparison sets it; use {decided[key]}: of the comparison")
    _apply(tree, cell)
    folder = str(Path(config.folder) / config.name)
    own = {"name": f"{cell.name},seed={seed}", "folder": folder, "seed": seed, "log.group": config.name}
    for key, value in (own | caps).items():
        settings.put(tree, key, value)
    return Run(cell.name, settings.load(OmegaConf.to_container(tree)), cell.arm)  # type: ignore[arg-type]


def _apply(tree: DictConfig, cell: Cell) -> None:
    """Make the changes of a combination: of the arm first, and then those of bundles and axes, whose values its name
    says, so that they have to hold at the end.

    Raises:
        ValueError: a bundle or axis changes what another of them has set, itself, by its section or by a type.
    """
    held: dict[str, str] = {}
    before, nothing = _leaves(tree), object()
    for who, key, value in cell.changes:
        settings.put(tree, key, value)
        after = _leaves(tree)
        for leaf, first in held.items():
            if first != who and before.get(leaf, nothing) != after.get(leaf, nothing):
                by = f" (by {key})" if key != leaf else ""
                raise ValueError(
                    f"{leaf}: {first} sets it, and {who} changes it{by}, so the name of the run would be untrue; "
                    "drop one, or exclude the combination"
                )
        if not who.startswith("arms."):
            held |= {leaf: who for leaf, x in settings.flat({key: value}) if x != {}}
        before = after


def _leaves(tree: DictConfig) -> dict[str, Any]:
    """Every dotted key with its value, interpolations as they are written."""
    plain: Any = OmegaConf.to_container(tree, resolve=False)
    return dict(settings.flat(plain))


def _check_twins(arms: Mapping[str, Sequence[Run]]) -> None:
    seen: dict[str, str] = {}
    for arm, runs in arms.items():
        key = json.dumps(settings.decisive(runs[0].config))
        if key in seen:
            raise ValueError(f"arms {seen[key]}, {arm}: equal in every key, so one run would count double; drop one")
        seen[key] = arm


def _check_columns(columns: Sequence[str]) -> None:
    for name in map(metric, columns):
        if not metrics.documented(name):
            close = difflib.get_close_matches(name, metrics.METRICS, n=1)
            hint = f"did you mean {close[0]}?" if close else "docs/metrics.md lists them"
            raise ValueError(f"columns: {name}: no such metric, {hint}")


def metric(column: str) -> str:
    """The metric of a column: ``max(name)`` is the most that ``name`` was at an evaluation."""
    return column[4:-1] if column.startswith("max(") and column.endswith(")") else column


def _gold(config: CompareConfig, arms: Mapping[str, Sequence[Run]]) -> str:
    """The reward to show, which every arm must have."""
    gold = config.gold or next(iter(next(iter(arms.values()))[0].config.rewards))
    for arm, runs in arms.items():
        if gold not in runs[0].config.rewards:
            named = ", ".join(runs[0].config.rewards)
            raise ValueError(f"gold={gold}: arm {arm} has no such reward (it has {named}); weight 0 only watches one")
        source = runs[0].config.rewards[gold]
        if source.type == "annotations" and source.labeller is None:
            raise ValueError(f"gold={gold}: in arm {arm} these are stored spans, which say nothing of new samples")
    return gold

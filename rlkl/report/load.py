"""Folders of comparisons and of single runs to what the page needs of them."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rlkl import settings
from rlkl.config import Config
from rlkl.config.budget import BudgetConfig
from rlkl.config.compare import CompareConfig
from rlkl.grid import cost, plan, results, statements
from rlkl.grid.plan import Plan, Run
from rlkl.grid.stated import stated
from rlkl.tracking import read_rows

Row = dict[str, Any]
SEED = re.compile(r"[,_-]seed[=_-]?\d+$")


@dataclass(frozen=True)
class Member:
    """A run on the page, with its files as they are now; ``of`` is its arm without the values of axes."""

    name: str
    arm: str
    config: Config
    folder: Path
    of: str
    error: str | None = None
    single: bool = False
    """Whether it belongs to no comparison."""

    @property
    def seed(self) -> int:
        """Of its randomness."""
        return self.config.seed

    @cached_property
    def evaluations(self) -> list[Row]:
        """Rows of metrics.jsonl with an evaluation."""
        return [row for row in read_rows(self.folder / "metrics.jsonl") if "kl/sequence" in row]

    @cached_property
    def samples(self) -> list[Row]:
        """Rows of samples.jsonl of the first and the last evaluation."""
        rows = list(read_rows(self.folder / "samples.jsonl"))
        ends = {rows[0]["step"], rows[-1]["step"]} if rows else set()
        return [row for row in rows if row["step"] in ends]

    @cached_property
    def environment(self) -> Row | None:
        """What env.json says, or nothing; None where it is damaged."""
        path = self.folder / "env.json"
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class Data:
    """All that the page shows: the plan of its runs, what they came to, and their files."""

    plan: Plan
    summary: Row
    members: list[Member]
    compared: dict[str, str] = field(default_factory=dict)
    """Name of a comparison -> its compare.yaml."""

    @property
    def arms(self) -> list[str]:
        """In the order of the plan."""
        return list(self.plan.arms)

    @property
    def gold(self) -> str:
        """The reward that counts."""
        return self.plan.gold

    def of(self, arm: str) -> list[Member]:
        """The runs of an arm that count."""
        return [member for member in self.members if member.arm == arm and member.error is None]

    def lines(self, arm: str) -> dict[int, list[Row]]:
        """Seed -> the evaluations of a run that counts."""
        found = {member.seed: self.summary["runs"][member.name]["evaluations"] for member in self.of(arm)}
        return {seed: rows for seed, rows in found.items() if rows}

    def measured(self, arm: str, name: str, place: int = -1) -> dict[int, float]:
        """Seed -> a quantity at the last (or at 0, the first) evaluation, whether or not runs get to ``match_kl``."""
        return {seed: rows[place][name] for seed, rows in self.lines(arm).items()}

    @property
    def failed(self) -> list[Member]:
        """The runs that count nowhere."""
        return [member for member in self.members if member.error is not None]


def load(folders: Sequence[str | Path], gold: str | None = None) -> Data:
    """Read comparisons and runs; several folders become one comparison, whose arms carry the names of theirs.

    Raises:
        ValueError: a folder is neither, or holds no finished run, a run is named twice, or the runs have no reward in
            common.
    """
    if not folders:
        raise ValueError("rlkl report: no folder; give those of comparisons or of runs")
    members: list[Member] = []
    compared: dict[str, str] = {}
    plans: list[Plan] = []
    for folder in map(Path, folders):
        if (folder / "compare.yaml").is_file():
            plans.append(plan.make(folder / "compare.yaml"))
            if plans[-1].config.mode == "replay":
                where = f"its tables and figure are {folder / 'replay.json'} and {folder / 'replay.svg'}"
                raise ValueError(f"{folder}: a comparison of mode=replay, which has no runs for a page; {where}")
            compared[_free(folder.resolve().name, compared)] = (folder / "compare.yaml").read_text(encoding="utf-8")
            prefix = f"{plans[-1].config.name}/" if len(folders) > 1 else ""
            members += [
                Member(run.config.name, prefix + run.arm, run.config, folder / run.config.name, prefix + run.of)
                for run in plans[-1].runs
            ]
        elif (folder / "config.yaml").is_file():
            config = settings.load(folder / "config.yaml")
            arm = SEED.sub("", config.name)
            members.append(Member(config.name, arm, config, folder, arm, single=True))
        else:
            raise ValueError(
                f"{folder}: neither a run (config.yaml) nor a comparison (compare.yaml); name their folders"
            )
    _check_twice(members)
    members = _distinct(members)
    chosen = gold or (plans[0].gold if plans else next(iter(members[0].config.rewards), ""))
    whole = _whole(plans, members, chosen)
    if gold and not any(gold in member.config.rewards for member in members):
        there = ", ".join(dict.fromkeys(name for member in members for name in member.config.rewards))
        raise ValueError(f"--gold {gold}: no run has a reward of that name; there are {there}")
    members = [_judged(member, chosen) for member in members]
    if all(member.error is not None for member in members):
        raise ValueError("\n".join(f"{m.name}: {m.error}" for m in members[:3]) + "\nno run has anything to report")
    stored = _stored(Path(folders[0]), members) if len(folders) == 1 and plans and chosen == plans[0].gold else None
    summary = stored or _summary(whole, members, _exact(list(map(Path, folders)), plans, chosen))
    return Data(whole, summary, [replace(m, error=summary["runs"][m.name]["error"]) for m in members], compared)


def _stored(folder: Path, members: Sequence[Member]) -> Row | None:
    """summary.json of a comparison, unless it is damaged, of other runs, of a version that stated less, or old."""
    path = folder / "summary.json"
    try:
        found: Row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("runs"), dict):
        return None
    written = [m.folder / "metrics.jsonl" for m in members]
    newer = [file for file in written if file.is_file() and file.stat().st_mtime > path.stat().st_mtime]
    same = set(found["runs"]) == {m.name for m in members} and "factors" in found
    return found if same and not newer and all(found["runs"][m.name]["error"] for m in members if m.error) else None


def _check_twice(members: Sequence[Member]) -> None:
    """Refuse a folder that would count double: as a run, and in its comparison."""
    seen: dict[Path, Member] = {}
    for member in members:
        first = seen.setdefault(member.folder.resolve(), member)
        if first is not member:
            ways = ["as a run" if m.single else f"in the comparison {m.folder.parent}" for m in (first, member)]
            raise ValueError(f"{member.folder}: named twice, {' and '.join(dict.fromkeys(ways))}; name it once")


def _distinct(members: Sequence[Member]) -> list[Member]:
    """Members with names of their own, and arms whose runs differ in their seed alone."""
    kinds: dict[str, dict[str, Any]] = {}
    found: list[Member] = []
    for member in members:
        decisive = {key: x for key, x in settings.decisive(member.config).items() if key != "seed"}
        arm = member.arm
        if kinds.setdefault(arm, decisive) != decisive:
            arm = _free(member.name, kinds)
            kinds[arm] = decisive
        seeds = [other.seed for other in found if other.arm == arm]
        if member.seed in seeds:
            raise ValueError(
                f"{member.folder}: the same run as another folder (arm {arm}, seed {member.seed}); name it once"
            )
        name = _free(f"{arm},seed={member.seed}", {other.name: None for other in found})
        found.append(replace(member, arm=arm, name=name))
    return found


def _free(name: str, taken: Any) -> str:
    """The name, or the first of name-2, name-3 … that is not taken."""
    return next(x for x in (name, *(f"{name}-{k}" for k in range(2, len(taken) + 3))) if x not in taken)


def _whole(plans: Sequence[Plan], members: Sequence[Member], gold: str) -> Plan:
    """One plan of all members, which keeps what each comparison said of itself."""
    runs = [
        Run(m.arm, m.config.model_copy(update={"name": m.name, "folder": str(m.folder.parent)}), m.of) for m in members
    ]
    if len(plans) == 1 and len(runs) == len(plans[0].runs):
        return Plan(plans[0].config, gold, runs)
    said = [p.config for p in plans]
    prefixed = {f"{config.name}/{arm}": n for config in said for arm, n in config.tuning.items()}
    budgets = [m.config.train.budget for m in members]
    matches = {config.match_kl for config in said}
    empty = CompareConfig(name="runs", base={}, arms={"runs": {}}, seeds=sorted({m.seed for m in members}), gold=gold)
    joined = {  # not checked again: names of arms have their comparison's before a slash
        "name": "-and-".join(dict.fromkeys(config.name for config in said)) or "runs",
        "arms": {m.of: {} for m in members},
        "axes": {key: values for config in said for key, values in config.axes.items()},
        "bundles": {f"{k}/{key}": values for k, config in enumerate(said) for key, values in config.bundles.items()},
        "compared": list(dict.fromkeys(key for config in said for key in config.compared)),
        "columns": list(dict.fromkeys(name for config in said for name in config.columns)),
        "tuning": prefixed,
        "budgets": budgets[0] if all(one == budgets[0] for one in budgets) else BudgetConfig(),
        "match_kl": matches.pop() if len(matches) == 1 else None,
    }
    return Plan(empty.model_copy(update=joined), gold, runs)


def _exact(folders: Sequence[Path], plans: Sequence[Plan], gold: str) -> Row | None:
    """What exact.json holds, where every folder has one and all are of this gold and have the same frontier."""
    paths = [folder / "exact.json" for folder in folders]
    if any(made.gold != gold for made in plans) or not all(path.is_file() for path in paths):
        return None
    try:
        found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    except ValueError:
        return None  # damaged; the comparison itself makes it anew
    if any(one["frontier"] != found[0]["frontier"] for one in found):
        return None
    horizons = {json.dumps(point): point for one in found for point in one["horizons"]}
    return {"frontier": found[0]["frontier"], "horizons": list(horizons.values())}


def _judged(member: Member, gold: str) -> Member:
    """The member with what keeps it out of every mean, if anything does."""
    if gold not in member.config.rewards:
        return replace(member, error=f"has no reward called {gold}; name another --gold")
    if settings.finished(member.folder):
        other = settings.differences(member.folder, member.config)  # left by --overwrite that did not get there
        told = (
            f"finished with {'; '.join(other[:3])}; compare again with --overwrite to redo the run" if other else None
        )
        return replace(member, error=told or results.damage(member.folder))
    path = member.folder / "error.txt"
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return replace(member, error=lines[-1] if lines else "failed")  # of a traceback that is what was raised
    if not member.folder.is_dir():
        return replace(member, error="never began")
    steps = [row["step"] for row in read_rows(member.folder / "metrics.jsonl")]
    done = f"step {steps[-1]} of {member.config.train.steps}" if steps else "no step"
    return replace(member, error=f"not finished: {done}")


def _summary(whole: Plan, members: Sequence[Member], exact: Row | None) -> Row:
    """What the runs came to, as ``rlkl compare`` writes it."""
    found, ended = {}, {}
    for m in members:
        ended[m.name] = cost.bound(m.folder)
        if m.error is not None:
            found[m.name] = results.Result(m.arm, m.seed, str(m.folder), m.error)
            continue
        weights = statements.proxy(m.config, whole.gold)
        config = whole.config
        found[m.name] = results.read(m.folder, m.arm, m.seed, whole.gold, config.match_kl, config.columns, weights)
    return stated(whole, found, ended, exact)

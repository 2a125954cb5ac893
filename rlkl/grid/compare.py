"""``rlkl compare``: a grid of ordinary runs in worker processes, and what they came to side by side."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from rlkl import RunError, settings, summary
from rlkl.config import dump
from rlkl.config.compare import CompareConfig
from rlkl.data import files
from rlkl.grid import fair, plan, workers
from rlkl.grid.plan import Plan, Run


def compare(
    source: str | Path | Mapping[str, Any] | CompareConfig,
    overrides: Sequence[str] = (),
    *,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Path:
    """Do the runs of a comparison that are missing, and set all of them side by side.

    Args:
        source: a comparison's YAML file or mapping.
        overrides: ``key.sub=value`` strings.
        overwrite: do all runs anew.
        dry_run: say what would be done, and write nothing.

    Returns:
        The comparison's folder: compare.yaml, summary.json (and .csv, .md), timing.json, frontier.png, report.html, and
        a folder a run.

    Raises:
        ValueError: a mistake in the configuration or a folder; nothing was started.
        RunError: runs failed; the others are finished, and the table stands.
    """
    _refuse_launcher()
    made = plan.make(source, overrides)
    fair.check(made)
    if made.config.mode == "replay":
        from rlkl.grid import replay

        replay.check(made)
    kept = [] if overwrite else keep(made)
    plan.check_functions([run for run in made.runs if run not in kept])
    slots = workers.slots(made.config.workers, len(made.runs))
    show(made, kept, len(slots))
    if dry_run:
        from rlkl.grid import cost
        from rlkl.grid.board import console

        for part in cost.table(made, kept, len(slots)):
            console().print(part, markup=False, soft_wrap=isinstance(part, str))
        return made.folder
    from rlkl import tracking

    if made.config.mode == "replay":
        return _replay(made)
    _check_folder(made, overwrite)
    _check_dashboards(made)
    with tracking.lock(made.folder, "comparison"):
        kept = [] if overwrite else keep(made)  # another process may have finished some in the meantime
        prepare([run for run in made.runs if run not in kept])
        _keep(made)
        errors = drive(made, kept, slots, overwrite)
        failed = conclude(made, errors)
        publish(made)
    if failed:
        over = sum(settings.finished(run.folder) for run in made.runs if run.config.name in failed)
        again = f"; the same command does {'the others' if over else 'them'} again" if len(failed) > over else ""
        stay = f"; {over} of them had finished, and {'is' if over == 1 else 'are'} kept" if over else ""
        raise RunError(f"{len(failed)} of {len(made.runs)} runs failed{stay}{again}")
    return made.folder


def keep(made: Plan) -> list[Run]:
    """The runs that are finished already.

    Raises:
        ValueError: some are finished under other configurations, or a folder holds something else.
    """
    finished = [run for run in made.runs if settings.finished(run.folder)]
    other = {run.folder: settings.differences(run.folder, run.config) for run in finished}
    said = [f"{folder}: finished with {'; '.join(keys[:5])}" for folder, keys in other.items() if keys]
    if said:
        more = [f"and {len(said) - 3} more"] if len(said) > 3 else []
        remedy = "give this comparison another name=..., or --overwrite to do all its runs anew"
        raise ValueError("\n".join([*said[:3], *more, remedy]))
    return finished


def show(made: Plan, kept: Sequence[Run], count: int) -> None:
    """The plan: how many runs of what, on how many processes, and the keys in which arms differ."""
    from rlkl.grid.board import console

    screen, config = console(), made.config
    missing = len(made.runs) - len(kept)
    screen.print(
        f"{config.name}: {len(made.arms)} arms x {len(config.seeds)} seeds = {len(made.runs)} runs "
        f"in {made.folder}, {len(kept)} kept, {missing} to do, {count} at a time; gold is {made.gold}",
        markup=False,
        soft_wrap=True,
    )
    rows = plan.diff(made)
    if rows:
        table = Table(title="what differs between the arms", title_justify="left")
        for head in ("key", *made.arms):
            table.add_column(head, overflow="fold")
        for key, values in rows.items():
            table.add_row(key, *values.values())
        screen.print(table, markup=False)
    for arm, runs in made.arms.items():
        for text in summary.hazards(runs[0].config):
            screen.print(f"{arm}: {text}", markup=False, soft_wrap=True)
    for flag in fair.flags(made):
        screen.print(fair.told(flag), markup=False, soft_wrap=True)


def prepare(runs: Sequence[Run]) -> None:
    """Make the embedded models that are not cached yet, once and not in every worker.

    Raises:
        ValueError: the data of a tiny model cannot be read.
    """
    from rlkl import models
    from rlkl.data.prompts import records

    done = []
    for config in (run.config for run in runs):
        of = (config.model, config.data, config.seed)
        if config.model.type != "pretrained" and of not in done:
            done.append(of)
            models.path(config.model, records(config.data, config.seed)[0])


def drive(
    made: Plan, kept: Sequence[Run], slots: Sequence[Mapping[str, str]], overwrite: bool = False
) -> dict[str, str]:
    """Do the runs that are missing, from their last checkpoint. The errors of those that failed, by name."""
    from rlkl.grid.board import Board

    todo = [run for run in made.runs if run not in kept]
    names = [run.config.name for run in todo]
    jobs = [
        workers.Job(dump(run.config), run.folder, made.folder / f"{run.config.name}.log", not overwrite and begun(run))
        for run in todo
    ]
    errors: dict[str, str] = {}
    with (
        Board(made.runs, {run.config.name for run in kept}, made.gold, len(slots)) as board,
        contextlib.closing(workers.work(jobs, slots)) as events,  # type: ignore[type-var]
    ):
        for event in events:
            if event.kind == "tick":
                board.tick()
                continue
            board.note(event.kind, names[event.job], event.error)
            if event.error:
                errors[names[event.job]] = event.error
    return errors


def begun(run: Run) -> bool:
    """Whether the run was begun under the same configuration, so that it can go on."""
    return (run.folder / "config.yaml").is_file() and not settings.differences(run.folder, run.config)


def conclude(made: Plan, errors: Mapping[str, str]) -> dict[str, str]:
    """Table, summary.json and its kin, frontier.png and report.html of what is there. Runs that failed, and why."""
    from rlkl import plots
    from rlkl.grid import cost, listed, results, statements, tables
    from rlkl.grid.board import console
    from rlkl.grid.stated import stated
    from rlkl.report.build import report

    config = made.config
    found = {}
    for run in made.runs:
        name, seed = run.config.name, run.config.seed
        if name in errors:
            found[name] = results.Result(run.arm, seed, str(run.folder), errors[name])
        else:
            proxy = statements.proxy(run.config, made.gold)
            found[name] = results.read(run.folder, run.arm, seed, made.gold, config.match_kl, config.columns, proxy)
    ended = {run.config.name: cost.bound(run.folder) for run in made.runs}
    exact = listed.exact_points(made)
    timing = statements.timing(made, found)
    summary = stated(made, found, ended, exact)
    written = {"summary.json": json.dumps(summary, indent=2) + "\n", "timing.json": json.dumps(timing, indent=2) + "\n"}
    written |= {"summary.csv": tables.comma_separated(summary), "summary.md": tables.markdown(summary)}
    for name, text in written.items():
        files.write(made.folder / name, text, overwrite=True)
    screen = console()
    screen.print(tables.terminal(made, summary, timing), markup=False)
    failed = {name: r.error for name, r in found.items() if r.error is not None}
    said = [*(listed.tell(exact) if exact else ()), *cost.endings(summary), *tables.never(made, found)]
    said += [f"{name}: FAILED: {error}" for name, error in failed.items()]
    curves = {arm: [r.frontier for r in found.values() if r.arm == arm and r.error is None] for arm in made.arms}
    points = {arm: runs for arm, runs in curves.items() if runs}
    picture = made.folder / "frontier.png"
    picture.unlink(missing_ok=True)
    (made.folder / "report.html").unlink(missing_ok=True)
    if points:
        said.append(f"figure: {plots.frontier(picture, points, made.gold, config.match_kl, exact)}")
        said.append(f"page: {report([made.folder], made.folder / 'report.html')}")
    for text in [*said, f"summary: {made.folder / 'summary.json'}"]:
        screen.print(text, markup=False, soft_wrap=True)
    return failed


def publish(made: Plan) -> None:
    """The comparison's own run in the dashboards, and where it is."""
    from rlkl.grid import live
    from rlkl.grid.board import console

    for text in live.publish(made):
        console().print(text, markup=False, soft_wrap=True)


def _replay(made: Plan) -> Path:
    """One step of every arm on the same samples; replay.json, its figure and tables."""
    from rlkl import tracking
    from rlkl.grid import matrices, replay
    from rlkl.grid.board import console

    if _mode(made.folder) == "train" or any((made.folder / name).exists() for name in ("summary.json", "config.yaml")):
        raise ValueError(f"{made.folder}: holds something else; give this comparison another name=...")
    with tracking.lock(made.folder, "comparison"):
        prepare(made.runs)
        _keep(made)
        for name in ("replay.json", "replay.svg"):
            (made.folder / name).unlink(missing_ok=True)  # of other arms, should all of these fail
        found = replay.run(made)
        screen = console()
        for table in matrices.tables(found):
            screen.print(table, markup=False)
        for text in replay.write(made.folder, found):
            screen.print(text, markup=False, soft_wrap=True)
        for name, error in found["failed"].items():
            screen.print(f"{name}: FAILED: {error}", markup=False, soft_wrap=True)
    if found["failed"]:
        raise RunError(f"{len(found['failed'])} of {len(made.runs)} steps failed; their arms are in no matrix")
    return made.folder


def _keep(made: Plan) -> None:
    """Make the comparison's folder, with compare.yaml."""
    made.folder.mkdir(parents=True, exist_ok=True)
    tree = yaml.safe_dump(made.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    files.write(made.folder / "compare.yaml", tree, overwrite=True)


def _check_folder(made: Plan, overwrite: bool) -> None:
    """Refuse a folder that is a run, and runs' folders that hold something else."""
    from rlkl import tracking

    if (made.folder / "config.yaml").exists():
        raise ValueError(f"{made.folder}: holds a run; give this comparison another name=...")
    if _mode(made.folder) == "replay":
        raise ValueError(f"{made.folder}: holds a comparison of mode=replay; give this one another name=...")
    for run in made.runs:
        tracking.check_folder(run.folder, overwrite=True)


def _mode(folder: Path) -> str | None:
    """The mode of the comparison that a folder holds; None where there is none that can be read."""
    try:
        tree = yaml.safe_load((folder / "compare.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return tree.get("mode") if isinstance(tree, dict) else None


def _check_dashboards(made: Plan) -> None:
    from rlkl import dashboards

    for run in made.runs:
        dashboards.check(run.config.log)


def _refuse_launcher() -> None:
    """One process hands out the runs; under a launcher there would be several of it."""
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if os.environ.get(name, "1") not in ("", "1"):
            raise ValueError(
                f"{name}={os.environ[name]}: rlkl compare starts its own processes; run it without a launcher "
                "(workers=... says how many)"
            )

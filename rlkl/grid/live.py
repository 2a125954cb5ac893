"""A comparison in the dashboards of its runs: one run of its own, with the table, the frontier, samples and the page.

It is written once all runs are done, to those of trackio and wandb that the runs' ``log.with`` names, in the group in
which they are; a comparison that is done again replaces it.
"""

import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from accelerate import PartialState
from pydantic import BaseModel

from rlkl import dashboards
from rlkl.config import LogConfig
from rlkl.data import files
from rlkl.grid.plan import Plan, Run
from rlkl.tracking import read_rows

KINDS = ("trackio", "wandb")
"""Dashboards that hold pictures and files; tensorboard's event files are a run's own."""
FILES = ("summary.json", "summary.csv", "summary.md", "compare.yaml", "frontier.png", "report.html")
"""What the artifact holds, as far as it is there."""
COLUMNS = ("prompt", "completion", "kl")


class Summary(BaseModel):
    """What a dashboard wants to know of a run, of a comparison."""

    name: str
    log: LogConfig
    comparison: dict[str, Any]


def publish(made: Plan) -> list[str]:
    """Write the comparison's own run, from its files, to every dashboard that its runs use; where to look, in lines."""
    used = list(dict.fromkeys(name for run in made.runs for name in run.config.log.with_ if name in KINDS))
    dashboards.forget(made.folder)
    if not used:
        return []
    log = made.runs[0].config.log
    PartialState()  # accelerate's trackers ask it which process is the main one
    shown: Any = Summary(name=made.config.name, log=log, comparison=made.config.model_dump(mode="json"))
    records, notes = {}, []
    for name in used:
        sink = dashboards.SINKS[name](made.folder, shown, {})
        try:
            _fill(importlib.import_module(name), sink.tracker, made)
        finally:
            sink.close()
        records[name] = sink.record
        notes.append(sink.note)
    files.write(made.folder / dashboards.RECORD, json.dumps(records, indent=2) + "\n", overwrite=True)
    return notes


def _fill(library: Any, tracker: Any, made: Plan) -> None:
    """Numbers of every arm, the frontier, samples, and the files as an artifact, through trackio or wandb alike."""
    summary = json.loads((made.folder / "summary.json").read_text(encoding="utf-8"))
    values: dict[str, Any] = dict(_numbers(summary))
    if (picture := made.folder / "frontier.png").is_file():
        values["frontier"] = library.Image(str(picture), caption=f"{made.gold} against KL")
    if rows := list(_samples(made.runs)):
        values["samples"] = library.Table(columns=["arm", *COLUMNS], data=rows)
    tracker.log(values, step=0)
    artifact = library.Artifact(made.config.name, type="comparison")
    for path in (made.folder / name for name in FILES):
        if path.is_file():
            artifact.add_file(str(path))
    tracker.tracker.log_artifact(artifact)


def _numbers(summary: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """``<arm>/<what>``: means over seeds of what the table shows."""
    for arm, row in summary["arms"].items():
        for name, cell in row.items():
            if isinstance(cell, Mapping) and isinstance(mean := cell.get("mean"), (int, float)):
                yield f"{arm}/{name}", float(mean)


def _samples(runs: Sequence[Run]) -> Iterator[list[Any]]:
    """The last samples of every run of the first seed."""
    for run in runs:
        if run.config.seed == runs[0].config.seed:
            rows = []
            with contextlib.suppress(ValueError):  # damaged rows are said in the table
                rows = list(read_rows(run.folder / "samples.jsonl"))
            for row in rows:
                if row["step"] == rows[-1]["step"]:
                    yield [run.arm, *(row.get(name) for name in COLUMNS)]

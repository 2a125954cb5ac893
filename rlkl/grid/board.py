"""The terminal of a comparison: a live table of its runs, or a line when a run starts, ends, and now and then."""

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from rlkl.grid.cost import minutes
from rlkl.grid.plan import Run

QUIET = 30.0
"""Seconds between two lines of progress where there is no live table."""
SHOWN = {"failed": 0, "running": 1, "preparing": 1, "finished": 2, "waiting": 3, "kept": 4}
"""States of a run, in the order of the table where not all runs fit."""


@dataclass
class Progress:
    """How far a run is."""

    run: Run
    state: str = "waiting"
    started: float = 0.0
    made: float = 0.0
    ended: float = 0.0
    read: int = 0
    step: int = 0
    gold: float | None = None
    kl: float | None = None
    error: str | None = None

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.run.config.train.steps

    @property
    def left(self) -> float | None:
        """Seconds to its end at its pace so far."""
        if self.state != "running" or self.step == 0:
            return None
        return (time.monotonic() - self.made) / self.step * (self.steps - self.step)

    @property
    def measured(self) -> str:
        """Its last evaluation, in words."""
        if self.gold is None or self.kl is None:
            return ""
        return f"gold {self.gold:.3f}  KL {self.kl:.3g}"


class Board:
    """Says what becomes of the runs. Use as a context manager."""

    def __init__(self, runs: Sequence[Run], kept: set[str], gold: str, workers: int) -> None:
        self.rows = {run.config.name: Progress(run) for run in runs}
        self.gold, self.workers = gold, workers
        for name in kept:
            self.rows[name].state = "kept"
            with contextlib.suppress(ValueError):  # what is wrong with its rows is said at the end
                self._read(self.rows[name])
        self.console = console()
        self.live = Live(console=self.console, auto_refresh=False) if sys.stdout.isatty() else None
        self.said = time.monotonic()

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.update(self.table(), refresh=True)
            self.live.stop()

    def note(self, kind: str, name: str, error: str | None = None) -> None:
        """A run ``started``, is ``made`` or has ``ended``."""
        row = self.rows[name]
        now = time.monotonic()
        if kind == "started":
            row.state, row.started = "preparing", now
            self._say(f"{self._place(name)} {name}: started")
        elif kind == "made":
            row.state, row.made = "running", now
        else:
            self._read(row)
            row.state, row.error, row.ended = ("failed" if error else "finished"), error, now
            took = f"{now - row.started:.0f} s"
            self._say(f"{self._place(name)} {name}: " + (f"FAILED: {error}" if error else f"{row.measured}  {took}"))

    def tick(self) -> None:
        """Time has passed: look at what runs."""
        now = time.monotonic()
        if not self.live and now - self.said < QUIET:
            return
        running = [row for row in self.rows.values() if row.state == "running"]
        for row in running:
            self._read(row)
        if self.live:
            self.live.update(self.table(), refresh=True)
            return
        parts = [f"{row.run.config.name} {row.step}/{row.steps} {row.measured}".strip() for row in running]
        self._say("  ".join([*parts, self.summary()]))

    def table(self) -> Table:
        """All runs, or the ones that matter most where they do not fit."""
        out = Table(caption=self.summary(), caption_justify="left")
        for head in ("run", "", "step", self.gold, "KL", "left"):
            out.add_column(head, justify="left" if head in ("run", "") else "right")
        room = max(self.console.height - 7, 3)
        rows = list(self.rows.values())
        if len(rows) > room:
            rows = sorted(rows, key=lambda row: (SHOWN[row.state], -row.ended))[:room]
        for row in rows:
            style = {"failed": "red", "running": "bold", "finished": "green"}.get(row.state, "dim")
            cells = [f"{row.step}/{row.steps}" if row.step else "", _number(row.gold), _number(row.kl)]
            out.add_row(row.run.config.name, row.state, *cells, minutes(row.left), style=style)
        return out

    def summary(self) -> str:
        """How many are done, and when all will be."""
        states = [row.state for row in self.rows.values()]
        done = sum(state in ("finished", "kept", "failed") for state in states)
        failed = states.count("failed")
        text = f"{done} of {len(states)} runs done" + (f", {failed} failed" if failed else "")
        left = self._left()
        return text + (f", about {minutes(left)} left" if left else "")

    def _left(self) -> float | None:
        """Seconds to the end: what runs at its own pace, what has made no step yet at the mean pace so far, shared by
        the workers; at least until the last of what runs is done.
        """
        rows = list(self.rows.values())
        lefts = [(row, left) for row in rows if (left := row.left) is not None]
        whole = [row.ended - row.started for row in rows if row.state == "finished"]
        whole += [left + time.monotonic() - row.started for row, left in lefts]
        if not whole:
            return None
        ahead = sum(row.state in ("waiting", "preparing", "running") for row in rows) - len(lefts)
        total = sum(left for _, left in lefts) + ahead * sum(whole) / len(whole)
        return max(total / self.workers, *(left for _, left in lefts), 0.0)

    def _read(self, row: Progress) -> None:
        """Take in what its metrics.jsonl has grown by."""
        path = row.run.folder / "metrics.jsonl"
        if not path.is_file():
            return
        with open(path, "rb") as file:
            file.seek(row.read)
            whole = file.read().rpartition(b"\n")[0]  # a row may be half written
        row.read += len(whole) + bool(whole)
        for line in map(json.loads, whole.splitlines()):
            row.step = line["step"]
            if "kl/sequence" in line:
                row.gold, row.kl = line.get(f"reward/eval/{self.gold}"), line["kl/sequence"]

    def _place(self, name: str) -> str:
        return f"[{list(self.rows).index(name) + 1}/{len(self.rows)}]"

    def _say(self, text: str) -> None:
        if not self.live:
            print(text, flush=True)
            self.said = time.monotonic()


def console() -> Console:
    """Standard output; where it is no terminal, wide enough for a table to be read from a file."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 400, highlight=False, emoji=False)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"

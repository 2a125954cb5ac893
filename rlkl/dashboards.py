"""Copies of metrics.jsonl and samples.jsonl in trackio, wandb or tensorboard, through accelerate's trackers.

The files are the source of truth and are written first. Opening the dashboards of a run removes what they held of it
and copies its files, so a resumed or rebuilt run stands there once. ``dashboards.json`` remembers what is where.
"""

import contextlib
import contextvars
import importlib.util
import io
import itertools
import json
import netrc
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from accelerate import PartialState
from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

from rlkl import settings
from rlkl.config import Config, LogConfig, dump
from rlkl.runs import read_config
from rlkl.tracking import claim, read_rows

RECORD = "dashboards.json"
Row = Mapping[str, Any]
Record = dict[str, str]


class Sink(Protocol):
    """One dashboard of one run."""

    record: Record
    note: str

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """The numbers of a step."""

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """Completions of a step, as a table."""

    def close(self) -> None:
        """Flush and stop."""


class Dashboards:
    """The dashboards of a run: they take the rows that its files already hold, then what comes."""

    def __init__(self, folder: Path, config: Config) -> None:
        known = _records(folder)
        forget(folder)
        names = list(dict.fromkeys(config.log.with_))
        self.sinks: list[Sink] = [SINKS[name](folder, config, known.get(name, {})) for name in names]
        if self.sinks:
            records = {name: sink.record for name, sink in zip(names, self.sinks, strict=True)}
            (folder / RECORD).write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
        samples = {s: list(rows) for s, rows in itertools.groupby(read_rows(folder / "samples.jsonl"), _step)}
        for row in read_rows(folder / "metrics.jsonl"):
            self.metrics(_step(row), row)
            self.samples(_step(row), samples.get(_step(row), []))

    @property
    def notes(self) -> list[str]:
        """Where to look, one line a dashboard."""
        return [sink.note for sink in self.sinks]

    def metrics(self, step: int, values: Row) -> None:
        """A row of metrics.jsonl; nulls are left out."""
        for sink in self.sinks:
            sink.metrics(step, {name: x for name, x in values.items() if x is not None and name != "step"})

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """The rows of samples.jsonl of one step."""
        for sink in self.sinks if rows else []:
            sink.samples(step, [{name: x for name, x in row.items() if name not in ("step", "tokens")} for row in rows])

    def close(self) -> None:
        """Flush and stop every dashboard."""
        for sink in self.sinks:
            sink.close()


@contextlib.contextmanager
def opened(folder: Path, config: Config, main: bool = True) -> Iterator[Dashboards | None]:
    """The dashboards of a run while it goes; nothing on other processes than the main one."""
    if not main:
        yield None
        return
    with contextlib.closing(Dashboards(folder, config)) as dashboards:
        yield dashboards


def check(log: LogConfig) -> None:
    """Refuse dashboards whose package is missing.

    Raises:
        ValueError: one is not installed.
    """
    for name in log.with_:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"log.with={name}: this package is not installed; pip install {name}, or leave it out")


def rebuild(run: str | Path, names: Sequence[str] = ()) -> list[str]:
    """Fill the dashboards of a run anew from its files: those of its configuration, or ``names``. Where to look.

    Raises:
        ValueError: the folder is no run or still being written, or a package is missing.
    """
    config = read_config(run)
    if names:
        config = settings.load(config, [f"log.with=[{','.join(names)}]"])
    check(config.log)
    PartialState()  # accelerate's trackers ask it which process is the main one
    with claim(Path(run), overwrite=True, main=True), opened(Path(run), config) as copies:
        assert copies is not None
        return copies.notes or [f"{run}: log.with=[]; name a dashboard with --with"]


def show(project: str) -> None:
    """Serve trackio's page of a project on this machine until Ctrl-C.

    Raises:
        ValueError: trackio is missing, or holds no run of the project.
    """
    check(LogConfig(with_=["trackio"]))
    import trackio
    from trackio.utils import TRACKIO_DIR

    if not (TRACKIO_DIR / f"{project}.db").is_file() or not len(trackio.Api().runs(project)):
        raise ValueError(
            f"trackio holds no run of project {project} in {TRACKIO_DIR}; try rlkl dashboard RUN --rebuild"
        )
    with _trackio_quiet():
        server, *_, url = trackio.show(project, block_thread=False, share=False)
    print(f"trackio, project {project}: {url}\nCtrl-C stops it", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    server.close()


def forget(folder: Path) -> None:
    """Remove what the dashboards on this machine hold of a run. Its files stay."""
    record = _records(folder).get("trackio")
    if record and importlib.util.find_spec("trackio"):
        from trackio.api import Run

        Run(record["project"], record["name"], run_id=record["id"]).delete()
    for name in ("wandb", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)


class Trackio:
    """A project in the local trackio folder."""

    def __init__(self, folder: Path, config: Config, known: Record) -> None:
        self.tracker = TrackioTracker(
            config.log.project,
            name=config.name,
            group=config.log.group,
            config=dump(config),
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        with _trackio_quiet(), _trackio_alone():
            contextvars.copy_context().run(self.tracker.start)  # else it would finish the run of another lane
        self.record = {"project": config.log.project, "name": config.name, "id": self.tracker.tracker.id}
        self.note = f"dashboard: trackio, project {config.log.project}; to open it: rlkl dashboard {folder}"

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.tracker.log(values, step=step)

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        import trackio

        self.tracker.log({"samples": trackio.Table(*_table(rows))}, step=step)

    def close(self) -> None:
        with _trackio_quiet():
            self.tracker.finish()


class Wandb:
    """A wandb run, written below the run's folder; offline where there is no key and no mode."""

    def __init__(self, folder: Path, config: Config, known: Record) -> None:
        import wandb

        given = wandb.setup().settings
        lonely = given.mode == "online" and not os.environ.get("WANDB_MODE") and not _wandb_key(given)
        self.tracker = WandBTracker(
            config.log.project,
            id=known.get("id"),
            resume="allow" if known else None,
            name=config.name,
            group=config.log.group,
            config=dump(config),
            dir=str(folder.resolve()),  # its service may have started in another folder
            mode="offline" if lonely else None,
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        self.tracker.start()
        run = self.tracker.tracker
        self.record = {"id": run.id, "project": config.log.project}
        self.first = run.step if known else 0  # an online run that goes on keeps the rows that it has
        place = run.url if not run.offline else f"offline; to upload it: wandb sync {run.settings.sync_dir}"
        self.note = f"dashboard: wandb, {'no key and no mode is set, so ' if lonely else ''}{place}"

    def metrics(self, step: int, values: dict[str, float]) -> None:
        if step >= self.first:
            self.tracker.log(values, step=step)

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        if step >= self.first:
            self.tracker.log_table("samples", *_table(rows), step=step)

    def close(self) -> None:
        self.tracker.finish()


class TensorBoard:
    """Event files below the run's folder."""

    def __init__(self, folder: Path, config: Config, known: Record) -> None:
        self.tracker = TensorBoardTracker(config.log.project, folder / "tensorboard")
        self.tracker.start()
        self.tracker.log({"config": f"```json\n{json.dumps(dump(config), indent=2)}\n```"}, step=0)
        self.record = {"folder": "tensorboard"}
        self.note = f"dashboard: tensorboard --logdir {folder / 'tensorboard'}"

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.tracker.log(values, step=step)

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        columns, cells = _table(rows)
        texts = [[str(x).replace("|", "\\|").replace("\n", " ") for x in line] for line in cells]
        lines = ["| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *texts)]
        self.tracker.log({"samples": "\n".join(lines)}, step=step)

    def close(self) -> None:
        self.tracker.finish()


SINKS: dict[str, Any] = {"trackio": Trackio, "wandb": Wandb, "tensorboard": TensorBoard}


@contextlib.contextmanager
def _trackio_quiet() -> Iterator[None]:
    """Hold back trackio's banner."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _trackio_alone() -> Iterator[None]:
    """Keep a local run local: trackio asks the Hub for the name of a user who is logged in there."""
    from huggingface_hub import constants

    remote = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE or not remote
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _wandb_key(settings: Any) -> bool:
    """Whether wandb will find credentials. Its own check asks the network."""
    if settings.api_key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    files = [path for path in (Path(name).expanduser() for name in named) if path.is_file()]
    return bool(files and netrc.netrc(files[0]).authenticators(str(urlsplit(settings.base_url).hostname)))


def _table(rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    """Columns and cells."""
    columns = list(rows[0])
    return columns, [[row[name] for name in columns] for row in rows]


def _records(folder: Path) -> dict[str, Record]:
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _step(row: Row) -> int:
    return int(row["step"])

"""What a run leaves behind: its folder, metrics.jsonl, evaluations.jsonl and samples.jsonl (the source of truth)."""

import contextlib
import fcntl
import importlib.metadata
import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

import rlkl
from rlkl.config import Config, dump
from rlkl.screen import Screen

if TYPE_CHECKING:
    from rlkl.dashboards import Dashboards

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
    "omegaconf",
    "trackio",
    "wandb",
)


def run_folder(config: Config) -> Path:
    """Where a run is written."""
    return Path(config.folder) / config.name


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, before anything is written.

    Raises:
        ValueError: the folder is not empty and may not be replaced, or is or lies below a file.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path}: is a file, so {folder} cannot be a run; choose another name=... or folder=...")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{folder}: not empty; give another name, or --overwrite to replace the run in it")
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder}: not empty and not a run (it has no config.yaml); --overwrite replaces runs only")


@contextlib.contextmanager
def claim(folder: Path, overwrite: bool, main: bool) -> Iterator[None]:
    """Hold a run's folder for this run alone: a second run of the same name is refused while the first lives.

    Raises:
        ValueError: another process holds it, it filled up in the meantime, or nothing can be written beside it.
    """
    if not main:
        yield
        return
    with lock(folder, "run"):
        check_folder(folder, overwrite)
        yield


@contextlib.contextmanager
def lock(folder: Path, what: str, key: str = "folder") -> Iterator[None]:
    """Hold a folder, which need not exist, for this process alone; the kernel lets go of it when the process dies.

    ``key`` is that of the configuration which names it.

    Raises:
        ValueError: another process holds it, or nothing can be written beside it.
    """
    path = folder.parent / f".{folder.name}.lock"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = open(path, "w")  # noqa: SIM115 - held until the run ends
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror}); choose another {key}=...") from None
    with held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another {what} is writing to it; give this one another {'name' if key == 'folder' else key}"
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def create_folder(folder: Path, config: Config) -> None:
    """Make the run's folder anew, with config.yaml and env.json; the old one goes when the new one can be written.

    Raises:
        ValueError: the folder cannot be written.
    """
    new = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        (new / "config.yaml").write_text(
            yaml.safe_dump(dump(config), sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
        (new / "env.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
        if folder.is_dir():
            shutil.rmtree(folder)
        new.rename(folder)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        why = error.strerror or error
        raise ValueError(f"{folder}: cannot be written ({why}); choose another folder=...") from None


def environment() -> dict[str, Any]:
    """Versions and hardware."""
    cuda = torch.cuda.is_available()
    return {
        "rlkl": rlkl.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "command": sys.argv,
    }


class Tracker:
    """Appends one row a step to metrics.jsonl and evaluation samples to samples.jsonl, then tells the dashboards."""

    def __init__(
        self, folder: Path, main: bool = True, screen: Screen | None = None, dashboards: "Dashboards | None" = None
    ) -> None:
        self.folder = folder
        self.main = main
        self.screen = screen or Screen(main)
        self.dashboards = dashboards

    def say(self, *lines: str) -> None:
        """Lines for the terminal, from the main process."""
        self.screen.say(*lines)

    @property
    def notes(self) -> list[str]:
        """Where the dashboards are."""
        return self.dashboards.notes if self.dashboards else []

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One row; a value that is not finite is written as null."""
        clean = {k: _finite(v) for k, v in values.items()}
        self._append("metrics.jsonl", {"step": step, **clean})
        if self.dashboards:
            self.dashboards.metrics(step, clean)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Completions of an evaluation."""
        for row in rows:
            self._append("samples.jsonl", {"step": step, **row})
        if self.dashboards:
            self.dashboards.samples(step, rows)

    def evaluation(self, step: int, row: Mapping[str, Any]) -> None:
        """An evaluation prompt by prompt; a value that is not finite is written as null."""
        self._append("evaluations.jsonl", {"step": step, **{k: [_finite(x) for x in v] for k, v in row.items()}})

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if self.main:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    return value if not isinstance(value, float) or math.isfinite(value) else None


class Stopwatch:
    """Seconds of the stages of a step."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """The time since the last lap belongs to ``name``."""
        now = time.perf_counter()
        self.laps[f"time/{name}"], self.last = now - self.last, now

    def metrics(self) -> dict[str, float]:
        """All laps and the whole step."""
        return {**self.laps, "time/step": self.last - self.started}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return list(read_rows(folder / "metrics.jsonl"))


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file: none where it is missing, and without a last one that is not (yet) whole."""
    if path.is_file():
        with open(path, "rb") as file:  # as text, half a character would be an error
            for line in file:
                if not line.endswith(b"\n"):
                    return  # a kill cut it short, or its rest is being written, and would come as the next line
                yield json.loads(line)

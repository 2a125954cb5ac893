"""What a run leaves behind: its folder, metrics.jsonl and samples.jsonl (the source of truth), and its lines."""

import importlib.metadata
import json
import math
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

import rlkl
from rlkl.config import Config, dump

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
    "omegaconf",
)


def run_folder(config: Config) -> Path:
    """Where a run is written."""
    return Path(config.folder) / config.name


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, before anything is written.

    Raises:
        ValueError: the folder is not empty and may not be replaced, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose another name or folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{folder}: not empty; give another name, or --overwrite to replace the run in it")
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder}: not empty and not a run (it has no config.yaml); --overwrite replaces runs only")


def create_folder(folder: Path, config: Config) -> None:
    """Make the run's folder anew, with config.yaml and env.json.

    Raises:
        ValueError: the folder cannot be written.
    """
    try:
        if folder.is_dir():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(dump(config), sort_keys=False, allow_unicode=True))
        (folder / "env.json").write_text(json.dumps(environment(), indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror}); choose another folder=...") from None


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
    """Appends one row a step to metrics.jsonl and evaluation samples to samples.jsonl."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One row; a value that is not finite is written as null."""
        clean = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        self._append("metrics.jsonl", {"step": step, **clean})

    def sample(self, step: int, values: Mapping[str, Any]) -> None:
        """One completion of an evaluation."""
        self._append("samples.jsonl", {"step": step, **values})

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    with open(folder / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]

"""What this installation can do."""

import importlib.metadata
import os
import platform
import sys
import tempfile
from pathlib import Path

import platformdirs
import torch

import rlkl
from rlkl.tracking import PACKAGES


def report() -> tuple[list[str], bool]:
    """Lines to print, and whether training can work."""
    lines = [f"rlkl {rlkl.__version__}, Python {platform.python_version()}, {platform.platform()}"]
    healthy = sys.version_info >= (3, 11)
    for name in PACKAGES:
        try:
            lines.append(f"ok       {name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"MISSING  {name}: pip install {name}")
            healthy = False
    if torch.cuda.is_available():
        lines += [f"ok       GPU {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    else:
        lines.append(f"note     no GPU: runs use the CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores")
    cache = Path(os.environ.get("RLKL_CACHE") or platformdirs.user_cache_dir("rlkl"))
    for label, folder in (("cache", cache), ("working folder", Path.cwd())):
        fine = writable(folder)
        lines.append(f"{'ok      ' if fine else 'FAILED  '} {label} {folder} {'is' if fine else 'is not'} writable")
        healthy &= fine
    return lines, healthy


def writable(folder: Path) -> bool:
    """Whether a file can be made in ``folder``, or in the nearest folder above it that exists."""
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False

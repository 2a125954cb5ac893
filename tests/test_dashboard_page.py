"""trackio's page in a real browser: are the curves of a run on it? Needs Chromium, and is skipped without."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Tree
from PIL import Image

import rlkl

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-sync --window-size=1600,2400"
QUIET = "--disable-background-networking --disable-component-update"
RED = "#FF0000"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")]


@pytest.fixture
def url(tiny_config: Tree) -> Iterator[str]:
    """The page of a run of eight steps, served by ``rlkl dashboard``."""
    log = {"with": ["trackio"], "project": "page"}
    folder = rlkl.train({**tiny_config, "train": {"steps": 8}, "evaluate": {"every": 1, "prompts": 2}, "log": log})
    root = str(Path(rlkl.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "BROWSER": "true", "TRACKIO_COLOR_PALETTE": RED}
    command = [sys.executable, "-m", "rlkl", "dashboard", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        yield re.findall(r"http\S+", server.stdout.readline())[0]
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0


def browse(url: str, profile: Path, *flags: str) -> str:
    """What Chromium prints; it stops when the page has been quiet for a virtual half minute."""
    command = [str(CHROMIUM), *FLAGS.split(), *QUIET.split(), f"--user-data-dir={profile}"]
    done = subprocess.run([*command, "--virtual-time-budget=30000", *flags, url], capture_output=True, timeout=120)
    return done.stdout.decode()


def test_the_curves_and_samples_of_a_run_are_on_the_page(url, tmp_path):
    html = browse(url, tmp_path / "a", "--dump-dom")
    assert {"kl/sequence", "reward/eval/varied", "reward/train/total"} <= set(re.findall(r"[a-z]+(?:/\w+)+", html))
    assert html.count("<canvas") >= 4
    shot = Path(os.environ.get("RLKL_SHOT") or tmp_path / "page.png")
    browse(url, tmp_path / "b", f"--screenshot={shot}")
    image = Image.open(shot).convert("RGB")
    red = sum(count for count, (r, g, b) in image.getcolors(2**24) or [] if r > 200 and g < 60 and b < 60)
    assert red > 1000, f"{red} pixels have the curves' colour"
    assert "Line " in browse(url.replace("?", "/media?"), tmp_path / "c", "--dump-dom")

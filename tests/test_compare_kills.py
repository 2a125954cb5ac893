"""A comparison that was killed, and started again, ends with the summary of one that was not, byte for byte."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import Tree
from test_compare import LIKELIHOOD, base, furnish

import rlkl


def comparison(model: Path, steps: int, seeds: list[int]) -> Tree:
    """Two objectives, one of them with a budget, a checkpoint every other step, figures by the way."""
    run = base(model, save={"every": 2}, train={"steps": steps})
    run["evaluate"]["every"] = 2
    arms = {"reinforce": {"train.budget.queries": 8 * (steps - 1)}, "likelihood": LIKELIHOOD}
    return {"name": "c", "base": run, "arms": arms, "seeds": seeds, "workers": 2}


def start(folder: Path, tree: Tree) -> "subprocess.Popen[str]":
    """``rlkl compare`` as its own process in a folder, so that paths in both summaries are the same."""
    if not folder.is_dir():
        folder.mkdir()
        furnish(folder)
        (folder / "c.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    env = {**os.environ, "PYTHONPATH": str(Path(rlkl.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "rlkl", "compare", "c.yaml"]
    return subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill(process: "subprocess.Popen[str]", worker: bool = False) -> None:
    """Kill the comparison, or one of its workers alone, and wait for those that end with it."""
    children = psutil.Process(process.pid).children(recursive=True)
    if worker and children:
        children[0].kill()
        return
    process.kill()
    process.communicate()
    psutil.wait_procs(children, timeout=30)


def summary(folder: Path) -> bytes:
    return (folder / "runs/c/summary.json").read_bytes()


def finished(folder: Path) -> int:
    return len(list((folder / "runs/c").glob("*/final/README.md")))


@pytest.mark.parametrize(
    "worker", [pytest.param(False, id="the comparison"), pytest.param(True, id="a worker", marks=pytest.mark.slow)]
)
def test_one_kill_in_the_middle_of_the_runs(tiny_model: Path, tmp_path: Path, worker: bool):
    tree = comparison(tiny_model, 6, [0])
    whole = start(tmp_path / "whole", tree)
    cut = start(tmp_path / "cut", tree)
    end = time.monotonic() + 120
    while not list((tmp_path / "cut/runs/c").glob("*/checkpoints/step_*")):
        assert time.monotonic() < end and cut.poll() is None, "it was over before it could be killed"
        time.sleep(0.01)
    kill(cut, worker)
    cut.communicate(timeout=120)
    assert finished(tmp_path / "cut") < 2
    again = start(tmp_path / "cut", tree)
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0, out
    told, _ = whole.communicate(timeout=120)
    assert whole.returncode == 0, told
    assert summary(tmp_path / "cut") == summary(tmp_path / "whole")
    found: dict[str, Any] = json.loads(summary(tmp_path / "cut"))
    assert found["runs"]["reinforce,seed=0"]["ended"] == "queries"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_kills(tiny_model: Path, tmp_path: Path, seed: int):
    """At any moment: while models are made, runs go, or the summary is written; the comparison or a worker."""
    tree, rng = comparison(tiny_model, 40, [0, 1, 2]), random.Random(seed)
    whole = start(tmp_path / "whole", tree)
    told, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, told
    kills = 0
    while True:
        process = start(tmp_path / "cut", tree)
        try:
            out, _ = process.communicate(timeout=rng.uniform(2, 14))
        except subprocess.TimeoutExpired:
            kills += 1
            kill(process, worker=rng.random() < 0.3)
            if process.poll() is None:  # goes on without that worker
                out, _ = process.communicate(timeout=600)
                assert process.returncode in (0, 1, -signal.SIGKILL), out
            if kills < 30:
                continue
            process = start(tmp_path / "cut", tree)
            out, _ = process.communicate(timeout=600)
        if process.returncode == 0:
            break
    assert kills >= 2
    assert summary(tmp_path / "cut") == summary(tmp_path / "whole")

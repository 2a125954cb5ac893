"""Long runs: memory and file handles stay where they are, and metrics.jsonl can be read at any time."""

import contextlib
import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import Tree, varied

import rlkl
from rlkl import tracking

READER = """
import json, sys, time
path, steps = sys.argv[1], int(sys.argv[2])
looks, seen = 0, -1
while seen < steps:
    try:
        with open(path, encoding="utf-8") as file:
            whole = [json.loads(line) for line in file.read().split("\\n")[:-1]]
    except FileNotFoundError:
        whole = []
    assert [row["step"] for row in whole] == list(range(len(whole))), whole
    assert len(whole) > seen, "it shrank"
    looks, seen = looks + 1, max(seen, len(whole) - 1)
    time.sleep(0.002)
print(looks)
"""


class Watch:
    """A reward that, every so many calls, notes what this process holds before it answers."""

    def __init__(self, every: int) -> None:
        self.every, self.calls, self.process = every, 0, psutil.Process()
        self.memory: list[int] = []
        self.handles: list[int] = []
        self.objects: list[int] = []

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        self.calls += 1
        if self.calls % self.every == 0:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what was freed is not held
            self.memory.append(self.process.memory_info().rss)
            self.handles.append(self.process.num_fds())
            self.objects.append(len(gc.get_objects()))
        return varied(prompts, completions)


watch: Callable[[list[str], list[str]], list[float]] = varied


def watched(prompts: list[str], completions: list[str]) -> list[float]:
    """The reward of these runs."""
    return watch(prompts, completions)


@pytest.fixture(autouse=True)
def frozen() -> Iterator[None]:
    """What was there before is neither searched nor counted."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def long_run(config: Tree, steps: int, looks: int, *overrides: str) -> Watch:
    """What a run of so many steps holds, looked at so many times; evaluations and checkpoints every tenth step."""
    global watch
    watch = seen = Watch(steps // looks)
    more = {
        "name": "long",
        "rewards": {"watched": {"type": "function", "path": "test_long_runs:watched"}},
        "train": {"steps": steps},
        "optimiser": {"learning_rate": 1e-4},
        "evaluate": {**config["evaluate"], "every": 10},
        "save": {"every": 10},
    }
    rlkl.train({**config, **more}, [f"log.every={steps}", *overrides])
    return seen


def leaks(seen: Watch, steps: int) -> list[str]:
    """What grew between the second and the last quarter: file handles, an object a step, 2 KiB of memory a step."""
    quarter, apart = len(seen.memory) // 4, steps // 2
    early, late = slice(quarter, 2 * quarter), slice(-quarter, None)
    grown = {
        "handles": min(seen.handles[late]) > max(seen.handles[early]),  # a dashboard opens its database now and then
        "objects": min(seen.objects[late]) >= max(seen.objects[early]) + 20 + apart / 4,
        # Allocators open another arena once in a while: 4 MiB that are not a step's.
        "memory": min(seen.memory[late]) >= max(seen.memory[early]) + 4 * 2**20 + 2048 * apart,
    }
    return [name for name, grew in grown.items() if grew]


@pytest.mark.parametrize("dashboard", ["", "trackio"])
def test_the_second_half_of_a_run_holds_no_more_than_the_first(dashboard: str, tiny_config: Tree) -> None:
    steps = 60
    assert leaks(long_run(tiny_config, steps, 20, f"log.with=[{dashboard}]"), steps) == []


@pytest.mark.slow
@pytest.mark.parametrize("dashboard", ["", "trackio", "tensorboard"])
def test_two_thousand_steps_hold_no_more_than_the_first_ones(dashboard: str, tiny_config: Tree) -> None:
    steps = 2000
    assert leaks(long_run(tiny_config, steps, 80, f"log.with=[{dashboard}]"), steps) == []


def test_the_watch_sees_what_leaks(tiny_config: Tree) -> None:
    """Handles, objects and memory that a reward does not give back are found in sixty steps."""
    kept: list[object] = []

    def leaking(what: Callable[[], object]) -> Watch:
        seen = Watch(3)
        for _ in range(60):
            seen(["p"], ["c"])
            kept.append(what())
        return seen

    for what in (lambda: open("prompts.jsonl"), lambda: [[] for _ in range(3)], lambda: bytearray(b"x" * 300_000)):  # noqa: SIM115
        assert leaks(leaking(what), 60)


def test_metrics_can_be_read_while_they_are_written(tiny_config: Tree) -> None:
    """Another process parses every whole line, over and over, from before the first step to the last."""
    steps = 40
    path = Path("runs/read/metrics.jsonl")
    reader = subprocess.Popen([sys.executable, "-c", READER, str(path), str(steps)], stdout=subprocess.PIPE, text=True)
    try:
        rlkl.train({**tiny_config, "name": "read", "train": {"steps": steps}})
        said, _ = reader.communicate(timeout=30)
    finally:
        reader.kill()
    assert reader.returncode == 0
    assert int(said) > 5


def test_the_rest_of_a_row_that_is_being_written_is_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that grows between two reads gives half a line, and then its rest as a line of its own."""
    path = tmp_path / "metrics.jsonl"
    path.touch()
    lines = [b'{"step": 0}\n', b'{"step": 1, "kl": 0.', b'25, "x": 1}\n', b'{"step": 2}\n']
    monkeypatch.setattr(tracking, "open", lambda *_: contextlib.nullcontext(iter(lines)), raising=False)
    assert list(tracking.read_rows(path)) == [{"step": 0}]


def test_half_a_character_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes('{"text": "Malé"}\n{"text": "Malé'.encode()[:-1])
    assert list(tracking.read_rows(path)) == [{"text": "Malé"}]

"""The processes of a comparison and what the terminal says of them: interruptions, deaths, and the live table."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from conftest import Tree
from test_compare import base, furnish, said

import rlkl
from rlkl.grid import board, plan, workers


def until(what: Callable[[], object], seconds: float = 60) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def ended(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


@pytest.fixture
def start(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], "subprocess.Popen[str]"]:
    """Starts a comparison of a run that is soon finished and one that would take hours."""
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    tree: Tree = {"name": "c", "base": base(tiny_model), "arms": {}, "seeds": [0], "workers": 2}
    tree["base"]["evaluate"]["every"] = 1000
    tree["arms"] = {"short": {"train.steps": 1}, "long": {"train.steps": 10**6}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    env = {**os.environ, "PYTHONPATH": str(Path(rlkl.__file__).parents[1])}
    command = [sys.executable, "-m", "rlkl", "compare", "c.yaml"]

    def run() -> "subprocess.Popen[str]":
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return run


def test_ctrl_c_ends_the_workers_and_keeps_what_is_finished_and_a_kill_leaves_none(start):
    runs = Path("runs/c")
    process = start()
    until(lambda: psutil.Process(process.pid).children())
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    until(lambda: ended(children), 20)

    process = start()
    until(lambda: (runs / "short,seed=0/final/README.md").is_file() and (runs / "long,seed=0/metrics.jsonl").is_file())
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err == "rlkl: interrupted\n"
    assert ended(children)
    assert not (runs / "long,seed=0/final").exists()
    code, out, err = said("c.yaml", "--dry-run")
    assert code == 0, err
    assert "1 kept, 1 to do" in out


@pytest.mark.parametrize(
    ("code", "how"),
    [("import os; os._exit(3)", "exit code 3"), ("import os; os.abort()", "signal 6, SIGABRT")],
)
def test_a_death_is_told_in_one_line_and_kept_in_the_run(tmp_path, code, how):
    here, there = Pipe()
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    job = workers.Job({}, tmp_path, tmp_path / "run.log")
    worker = workers.Worker(process, here, 0)
    there.close()
    job.log.write_text("")
    (event,) = workers._hear(worker, [job])
    assert (event.kind, event.job, event.error) == (
        "ended",
        0,
        f"its process died ({how}); its last lines are in {job.log}",
    )
    (tmp_path / "log.txt").write_text("")
    (event,) = workers._hear(worker, [job])
    assert event.error == f"its process died ({how}) (see {tmp_path / 'error.txt'})"
    assert how in (tmp_path / "error.txt").read_text()


def test_a_mistake_that_shows_only_in_the_run_is_one_line(tiny_model, tmp_path, monkeypatch, capsys):
    """Here the model is none: no folder was made, and the other run is done."""
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    Path("empty").mkdir()
    arms = {"bad": {"model.path": "empty"}, "good": {}}
    tree = {"name": "c", "base": base(tiny_model), "arms": arms, "seeds": [0], "workers": 1}
    with pytest.raises(rlkl.RunError, match="1 of 2 runs failed"):
        rlkl.compare(tree)
    told = "bad,seed=0: FAILED: model.path=empty: "
    assert capsys.readouterr().out.count(told) == 2  # as it ends, and below the table
    assert not Path("runs/c/bad,seed=0").exists()
    assert Path("runs/c/good,seed=0/final").is_dir()
    assert rlkl.compare(tree, ["arms={good: {}}"]) == Path("runs/c")


def test_functions_that_cannot_be_imported_are_refused_before_the_start(tmp_path, monkeypatch):
    """Also of a module that this process imported before it was changed, and of one that ends Python."""
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    Path("ends.py").write_text("import os\nos._exit(5)")
    arms = {"good": {}, "none": {"rewards.letters.path": "scores:missing"}}
    arms |= {"also": {**arms["none"], "kl.beta": 0.2}, "gone": {"rewards.letters.path": "nowhere.at:all"}}
    tree = {"name": "c", "base": base(Path("model")), "arms": arms, "seeds": [0, 1]}
    Path("c.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    there = sorted(Path().iterdir())
    for words in ([], ["--dry-run"]):
        code, out, err = said("c.yaml", *words)
        first, second = err.splitlines()
        assert (code, out) == (2, "")
        assert first.startswith("rlkl: arms none, also: rewards.letters.path=scores:missing: module scores has no")
        assert second.startswith("rlkl: arm gone: rewards.letters.path=nowhere.at:all: cannot be imported")
    Path("scores.py").write_text(Path("scores.py").read_text() + "\n\nmissing = letters\n")
    assert said("c.yaml", "--dry-run", "arms.gone.rewards.letters.path=scores:raises")[0] == 0
    code, _, err = said("c.yaml", "--dry-run", "arms.gone.rewards.letters.path=ends:now")
    assert code == 2
    assert "importing scores:letters, " in err and "ended Python (exit code 5)" in err
    assert sorted(Path().iterdir()) == there  # no bytecode either


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[plan.Run]:
    monkeypatch.chdir(tmp_path)
    tree = {"name": "c", "base": base(Path("model")), "arms": {"a": {}, "b": {"kl.beta": 0.1}}, "seeds": [0, 1]}
    return plan.make(tree).runs


def evaluated(run: plan.Run, text: str) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write(text)


def test_on_a_tty_there_is_a_live_table(runs, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Tty())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(board, "time", clock := SimpleNamespace(monotonic=lambda: clock.now, now=0.0))
    evaluated(runs[3], '{"step": 2, "kl/sequence": 3.0, "reward/eval/letters": 0.25}\n')
    with board.Board(runs, {runs[3].config.name}, "letters", 2) as shown:
        for run in runs[:3]:
            shown.note("started", run.config.name)
        shown.note("made", runs[0].config.name)
        evaluated(runs[0], '{"step": 0, "kl/sequence": 0.0, "reward/eval/letters": 0.5}\n{"step": 1}\n{"st')
        clock.now = 10.0
        shown.note("ended", runs[1].config.name, "it is broken")
        shown.tick()
        evaluated(runs[0], 'ep": 2, "kl/sequence": 1.5, "reward/eval/letters": 0.75}\n')
        cells = [[str(cell) for cell in column.cells] for column in shown.table().columns]
        assert cells[0] == [run.config.name for run in runs]
        assert cells[1] == ["running", "failed", "preparing", "kept"]
        assert cells[2] == ["1/2", "", "", "2/2"]
        assert cells[3] == ["0.5", "", "", "0.25"]
        assert cells[5:] == [["10 s", "", "", ""]]
        assert shown.summary() == "2 of 4 runs done, 1 failed, about 15 s left"  # (10 to go + 20 that waits) / 2
        shown.tick()
        assert (shown.rows[runs[0].config.name].step, shown.rows[runs[0].config.name].kl) == (2, 1.5)
    assert "it is broken" not in sys.stdout.getvalue()  # told below the last table
    assert "running" in sys.stdout.getvalue()


def test_time_left_counts_runs_without_a_step_and_lasts_as_long_as_the_longest(runs, monkeypatch):
    monkeypatch.setattr(board, "time", clock := SimpleNamespace(monotonic=lambda: clock.now, now=0.0))
    shown = board.Board(runs, {run.config.name for run in runs[2:]}, "letters", 2)
    for run in runs[:2]:
        shown.note("started", run.config.name)
        shown.note("made", run.config.name)
    clock.now = 30.0
    shown.rows[runs[0].config.name].step = 1  # of 2
    assert shown.summary() == "2 of 4 runs done, about 45 s left"  # (30 to go + 60 of the other) / 2
    clock.now = 2.0
    shown.rows[runs[1].config.name].step = 2  # about to end
    assert shown.summary() == "2 of 4 runs done, about 2 s left"  # of the one, not half of it


def test_where_rows_do_not_fit_what_fails_and_runs_is_shown(runs, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Tty())
    monkeypatch.setenv("LINES", "10")
    monkeypatch.setenv("COLUMNS", "100")
    shown = board.Board(runs, {runs[0].config.name}, "letters", 2)
    shown.note("started", runs[2].config.name)
    shown.note("started", runs[3].config.name)
    shown.note("ended", runs[3].config.name, "broken")
    cells = [str(cell) for cell in shown.table().columns[1].cells]
    assert cells == ["failed", "preparing", "waiting"]


def test_elsewhere_there_is_a_line_now_and_then(runs, monkeypatch, capsys):
    monkeypatch.setattr(board, "time", clock := SimpleNamespace(monotonic=lambda: clock.now, now=0.0))
    with board.Board(runs, set(), "letters", 2) as shown:
        shown.note("started", runs[0].config.name)
        shown.note("made", runs[0].config.name)
        evaluated(runs[0], '{"step": 1, "kl/sequence": 1.0, "reward/eval/letters": 0.5}\n')
        for clock.now in (1.0, 29.0, 31.0, 32.0):
            shown.tick()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "[1/4] a,seed=0: started",
        "a,seed=0 1/2 gold 0.500  KL 1  0 of 4 runs done, about 1 min 48 s left",
    ]

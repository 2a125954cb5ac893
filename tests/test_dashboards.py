"""What trackio, wandb and tensorboard hold of a run, read back with what they ship, against metrics.jsonl."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Tree

import rlkl
from rlkl import dashboards, settings, telemetry, tracking
from rlkl.cli import main
from rlkl.config import LogConfig

Rows = list[dict[str, Any]]
KEY = "0" * 40


def logged(config: Tree, *names: str, **more: Any) -> Tree:
    return {**config, "log": {"with": list(names), **more}}


def expected(folder: Path) -> dict[int, dict[str, float]]:
    """The numbers of metrics.jsonl by step, as dashboards should hold them."""
    rows = tracking.read_metrics(folder)
    return {row["step"]: {k: v for k, v in row.items() if v is not None and k != "step"} for row in rows}


def samples(folder: Path) -> Rows:
    """What dashboards show of samples.jsonl: all but the numbers of single tokens."""
    rows = tracking.read_rows(folder / "samples.jsonl")
    return [{name: x for name, x in row.items() if name != "tokens"} for row in rows]


def trackio_rows(project: str, run: str) -> tuple[dict[int, dict[str, float]], Rows, int]:
    """Numbers by step, all sample rows with their step, and how many runs have this name."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    runs = [r for r in trackio.Api().runs(project) if r.name == run]
    numbers: dict[int, dict[str, float]] = {}
    tables: Rows = []
    for row in SQLiteStorage.get_logs(project, run=run, run_id=runs[-1].id):
        step, table = row.pop("step"), row.pop("samples", None)
        row.pop("timestamp")
        if table:
            tables += [{"step": step, **cells} for cells in table["_value"]]
        if row:
            assert step not in numbers
            numbers[step] = row
    return numbers, tables, len(runs)


def python(*words: str, env: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
    """Another Python, that finds rlkl."""
    env = {**env, "PYTHONPATH": str(Path(rlkl.__file__).parents[1])}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env)


def wandb_records(folder: Path) -> tuple[str, dict[int, dict[str, Any]]]:
    """Run id and history by step of the one .wandb file: a LevelDB log of protobuf records, after 7 bytes."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its service writes on after a run was finished, until the process ends
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    run_id, history = "", {}
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record.FromString(parts)
            parts = b""
            run_id = record.run.run_id or run_id
            if record.HasField("history"):
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                history[int(items["_step"])] = items
    return run_id, history


def test_trackio_holds_the_numbers_and_the_samples_once(tiny_config):
    folder = rlkl.train(logged(tiny_config, "trackio", project="plain", group="pair"))
    numbers, tables, runs = trackio_rows("plain", "tiny")
    assert runs == 1
    assert numbers == expected(folder)
    assert tables == samples(folder)
    assert {row["step"] for row in tables} == {0, 2}
    from trackio.sqlite_storage import SQLiteStorage

    kept = SQLiteStorage.get_run_config("plain", "tiny")
    assert kept["_Group"] == "pair"
    assert kept["kl"]["beta"] == 0.05


def test_trackio_is_the_default():
    assert LogConfig().with_ == ["trackio"]
    assert LogConfig().project == "rlkl"


def test_overwriting_a_run_replaces_it_in_trackio(tiny_config):
    config = logged(tiny_config, "trackio", project="again")
    rlkl.train(config)
    folder = rlkl.train({**config, "seed": 1}, overwrite=True)
    numbers, _, runs = trackio_rows("again", "tiny")
    assert runs == 1
    assert numbers == expected(folder)


def test_rebuild_fills_trackio_from_the_files_without_doubling(tiny_config, capsys):
    folder = rlkl.train(logged(tiny_config, project="filled"))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "kl/seq')  # what a kill leaves behind
    for _ in range(2):
        assert main(["dashboard", str(folder), "--rebuild", "--with", "trackio"]) == 0
        numbers, tables, runs = trackio_rows("filled", "tiny")
        assert runs == 1
        assert numbers == expected(folder)
        assert tables == samples(folder)
    assert "rlkl dashboard" in capsys.readouterr().out


def test_two_runs_at_once_keep_their_rows_apart(tiny_config, tmp_path):
    config = settings.load(logged(tiny_config, "trackio", project="lanes"))
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    dashboards.PartialState()
    boards = [dashboards.Dashboards(f, config.model_copy(update={"name": f.name})) for f in folders]
    for step in range(3):
        for k, board in enumerate(boards):
            board.metrics(step, {"kl/token": 10.0 * k + step})
    for board in boards:
        board.close()
    for k, name in enumerate("ab"):
        assert trackio_rows("lanes", name)[0] == {s: {"kl/token": 10.0 * k + s} for s in range(3)}


def test_a_local_trackio_run_never_asks_the_network(tiny_config, monkeypatch):
    from huggingface_hub import constants

    before, asked = constants.HF_HUB_OFFLINE, []

    def refuse(*where: Any, **how: Any) -> None:
        asked.append(where)
        raise OSError("no network here")

    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)  # trackio would ask the Hub whose token this is
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    rlkl.train(logged(tiny_config, "trackio", project="alone"))
    assert trackio_rows("alone", "tiny")[2] == 1
    assert asked == []
    assert before == constants.HF_HUB_OFFLINE


def test_wandb_without_key_and_mode_is_offline_and_says_so(tiny_config, capfd):
    folder = rlkl.train(logged(tiny_config, "wandb", group="pair"))
    said = capfd.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "wandb" in line]
    assert len(lines) == 1
    assert "no key and no mode is set, so offline" in lines[0]
    _, history = wandb_records(folder)
    rows = expected(folder)
    assert {step: {k: items[k] for k in rows[step]} for step, items in history.items()} == rows
    assert {step: items.get("samples/_type") for step, items in history.items()} == {
        0: "table-file",
        1: None,
        2: "table-file",
    }
    (first,) = folder.glob("wandb/offline-run-*/files/media/table/samples_0_*.table.json")
    table = json.loads(first.read_text())
    assert [dict(zip(table["columns"], cells, strict=True)) for cells in table["data"]] == [
        {k: v for k, v in row.items() if k != "step"} for row in samples(folder) if row["step"] == 0
    ]


def test_rebuild_replaces_an_offline_wandb_run_under_its_id(tiny_config):
    folder = rlkl.train(logged(tiny_config, "wandb"))
    first, history = wandb_records(folder)
    assert main(["dashboard", str(folder), "--rebuild"]) == 0
    again, rebuilt = wandb_records(folder)  # it asserts that there is one file
    assert again == first
    assert [set(row) for row in rebuilt.values()] == [set(row) for row in history.values()]


@pytest.mark.parametrize(("name", "value"), [("WANDB_MODE", "offline"), ("WANDB_API_KEY", KEY), ("NETRC", "netrc")])
def test_a_wandb_key_or_mode_is_respected(name, value, tiny_config, monkeypatch):
    """With a key wandb would go online, so only what it is asked for is looked at."""
    import wandb

    monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    Path("netrc").write_text(f"machine wandb.example login user password {KEY}")
    asked: list[Any] = []

    class Stop(Exception):
        pass

    def tracker(project: str, **options: Any) -> None:
        asked.append(options["mode"])
        raise Stop

    monkeypatch.setattr(dashboards, "WandBTracker", tracker)
    wandb.teardown()  # it reads its settings once
    with pytest.raises(Stop):
        dashboards.Wandb(Path(), settings.load(logged(tiny_config, "wandb")), {})
    wandb.teardown()
    assert asked == [None]


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_holds_the_numbers_and_the_samples(tiny_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = rlkl.train(logged(tiny_config, "tensorboard"))
    for _ in range(2):
        (path,) = folder.glob("tensorboard/**/events*")
        events = EventAccumulator(str(path)).Reload()
        found: dict[int, dict[str, float]] = {}
        for key in events.Tags()["scalars"]:
            for event in events.Scalars(key):
                found.setdefault(event.step, {})[key] = event.value
        assert {s: {k: pytest.approx(v) for k, v in row.items()} for s, row in expected(folder).items()} == found
        texts = events.Tensors("samples/text_summary")
        assert [event.step for event in texts] == [0, 2]
        assert "| prompt | completion |" in texts[0].tensor_proto.string_val[0].decode()
        assert main(["dashboard", str(folder), "--rebuild"]) == 0


@pytest.mark.parametrize("name", ["trackio", "wandb", "tensorboard"])
def test_a_missing_package_is_an_error_before_anything_is_written(name, tiny_config, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == name else find(n, *rest))
    with pytest.raises(ValueError, match=rf"log.with={name}: .* pip install {name}"):
        rlkl.train(logged(tiny_config, name))
    assert not Path("runs").exists()


def test_no_dashboards_leave_no_trace(tiny_config):
    folder = rlkl.train(logged(tiny_config))
    assert not (folder / dashboards.RECORD).exists()
    assert not (folder / "wandb").exists()


def test_values_that_are_not_finite_are_null_in_the_file_and_absent_in_the_dashboards(tiny_config):
    config = logged(tiny_config, "trackio", project="nulls")
    folder = rlkl.train({**config, "evaluate": {"prompts": 1, "samples_per_prompt": 2}})
    assert tracking.read_metrics(folder)[0]["kl/sequence_stderr"] is None
    assert "kl/sequence_stderr" not in trackio_rows("nulls", "tiny")[0][0]


def test_the_dashboard_command_refuses_what_it_cannot_do(tmp_path, capsys):
    for words in (["--rebuild"], ["--with", "wandb"], [str(tmp_path / "no-run")], [str(tmp_path), "--rebuild"]):
        assert main(["dashboard", *words]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 4
    with pytest.raises(ValueError, match="trackio holds no run of project empty"):
        dashboards.show("empty")


def test_telemetry_is_off_unless_the_user_says_otherwise():
    script = "import rlkl, os, json; print(json.dumps(dict(os.environ)))"
    bare = {k: v for k, v in os.environ.items() if k not in telemetry.OFF}
    for given in ({}, {"HF_HUB_DISABLE_TELEMETRY": "0"}):
        done = python("-c", script, env=bare | given)
        found = json.loads(done.stdout)
        assert {name: found[name] for name in telemetry.OFF} == telemetry.OFF | given
    page = (Path(__file__).parent.parent / "docs/dashboards.md").read_text()
    assert all(f"`{name}={value}`" in page for name, value in telemetry.OFF.items())

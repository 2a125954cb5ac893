"""The dashboards of a comparison, without network: its runs in one group, and one of its own with picture and files."""

import json
from pathlib import Path

import pytest
from conftest import Tree
from test_compare import base, furnish, said

NUMBERS = {"reinforce/gold", "other/gold", "reinforce/kl", "other/tokens"}


@pytest.fixture
def tree(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    run = base(tiny_model, log={"with": ["trackio", "wandb"], "project": "live", "samples": 1}, train={"steps": 1})
    arms = {"reinforce": {}, "other": {"kl.beta": 0.3}}
    return {"name": "alive", "base": run, "arms": arms, "seeds": [0], "workers": 1}


def test_the_comparison_has_a_run_of_its_own_with_picture_samples_and_files(tree: Tree, monkeypatch):
    """In wandb offline and in trackio's folder; done again it stands there once."""
    import trackio
    import wandb
    from trackio.sqlite_storage import SQLiteStorage

    Path("c.yaml").write_text(json.dumps(tree))
    code, out, err = said("c.yaml")
    assert code == 0, err
    folder = Path("runs/alive")
    assert "dashboard: trackio, project live; to open it: rlkl dashboard runs/alive" in out
    assert "dashboard: wandb, no key and no mode is set, so offline; to upload it: wandb sync" in out
    code, _, err = said("c.yaml")
    assert code == 0, err

    names = [run.name for run in trackio.Api().runs("live")]
    assert sorted(names) == ["alive", "other,seed=0", "reinforce,seed=0"]
    assert {SQLiteStorage.get_run_config("live", name)["_Group"] for name in names} == {"alive"}
    config = SQLiteStorage.get_run_config("live", "alive")
    assert config["comparison"]["arms"] == tree["arms"]
    (row,) = SQLiteStorage.get_logs("live", "alive")
    assert set(row) >= NUMBERS
    summary = json.loads((folder / "summary.json").read_text())
    assert row["other/gold"] == pytest.approx(summary["arms"]["other"]["gold"]["mean"])
    assert row["frontier"]["_type"] == "trackio.image"
    assert {"reinforce", "other"} == {line["arm"] for line in row["samples"]["_value"]}

    wandb.teardown()  # its service writes on after a run was finished, until the process ends
    (offline,) = (folder / "wandb").glob("**/run-*.wandb")
    data = offline.read_bytes()
    assert b"frontier" in data and b"comparison" in data and b"summary.json" in data
    record = json.loads((folder / "dashboards.json").read_text())
    assert set(record) == {"trackio", "wandb"}
    assert record["wandb"]["id"].encode() in data


def test_where_the_runs_log_nowhere_so_does_the_comparison(tree: Tree):
    tree["base"]["log"]["with"] = []
    Path("c.yaml").write_text(json.dumps(tree))
    code, out, err = said("c.yaml")
    assert code == 0, err
    assert "dashboard:" not in out
    assert not list(Path("runs").rglob("dashboards.json"))

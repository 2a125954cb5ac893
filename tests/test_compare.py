"""``rlkl compare``: whole comparisons on the tiny model, what becomes of runs that fail, and what is refused."""

import contextlib
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import RECORDS, Tree, metrics, write_jsonl

import rlkl
from rlkl import recording, settings
from rlkl.cli import main
from rlkl.grid import results

SCORES = """
import os
import signal
from pathlib import Path


def letters(prompts, completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def parity(rollout):
    return 1.0 - 2.0 * (rollout.tokens_BT % 2)


def dies(prompts, completions):
    if Path("broken").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return letters(prompts, completions)


def raises(prompts, completions):
    if Path("broken").exists() and Path("runs/broken/raises,seed=3/checkpoints/step_1").exists():
        raise KeyError("no such thing")
    return letters(prompts, completions)


def diverges(prompts, completions):
    return [float("nan") if Path("broken").exists() else x for x in letters(prompts, completions)]
"""
LIKELIHOOD = {
    "trainer": {"type": "token_likelihood"},
    "kl": {"placement": "loss", "estimator": "exact"},
    "credit.horizon": 1,
}
SHOWN: set[str] = set()
WRITTEN = ("summary.json", "summary.csv", "summary.md", "timing.json", "frontier.png")
Said = Callable[..., tuple[int, str, str]]


def shows(*keys: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """This test shows what these keys of a comparison do."""
    SHOWN.update(keys)
    return lambda test: test


def base(model: Path, **more: Any) -> Tree:
    """A run of two steps on the tiny model, rewarded for letters."""
    return {
        "model": {"type": "pretrained", "path": str(model)},
        "data": {"type": "jsonl", "path": "prompts.jsonl", "held_out": 0.25},
        "rewards": {
            "letters": {"type": "function", "path": "scores:letters"},
            "parity": {"type": "function", "path": "scores:parity", "level": "token", "weight": 0.5},
        },
        "trainer": {"type": "reinforce"},
        "rollout": {"prompts": 2, "samples_per_prompt": 2, "max_new_tokens": 6},
        "optimiser": {"learning_rate": 1e-2},
        "train": {"steps": 2},
        "evaluate": {"prompts": 2, "samples_per_prompt": 2, "every": 1},
        "log": {"with": []},
        **more,
    }


def dump(tree: Tree) -> str:
    """YAML, its keys in their order."""
    return yaml.safe_dump(tree, sort_keys=False)


def furnish(folder: Path) -> None:
    """What the runs need in their working folder."""
    write_jsonl(folder / "prompts.jsonl", RECORDS)
    (folder / "scores.py").write_text(SCORES)


def said(*words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``rlkl compare``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["compare", *words])
    return code, out.getvalue(), err.getvalue()


@dataclass
class Done:
    """A comparison that was run, and what it said."""

    root: Path
    folder: Path
    code: int
    out: str
    err: str

    @property
    def summary(self) -> Tree:
        summary: Tree = json.loads((self.folder / "summary.json").read_text())
        return summary


@pytest.fixture(scope="module")
def trio(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Three objectives with two seeds each, in two processes."""
    root = tmp_path_factory.mktemp("trio")
    furnish(root)
    tree = {
        "name": "trio",
        "base": "base.yaml",
        "arms": {
            "reinforce": {},
            "ppo": {"trainer": {"epochs": 2, "type": "ppo"}},
            "likelihood": LIKELIHOOD,
        },
        "seeds": [0, 1],
        "workers": 2,
        "columns": ["max(reward/eval/letters)", "policy/eval/length", "policy/clip_fraction"],
    }
    log = {"with": ["trackio"], "project": "trio", "group": "the base's own"}
    run = base(tiny_model, log=log, name="ignored", folder="ignored", seed=7)
    run["rollout"]["record"] = True
    (root / "base.yaml").write_text(dump(run))
    (root / "trio.yaml").write_text(dump(tree))
    with contextlib.chdir(root):
        return Done(root, root / "runs/trio", *said("trio.yaml"))


def runs_of(done: Done) -> dict[str, Path]:
    return {path.name: path for path in sorted(done.folder.iterdir()) if path.is_dir()}


@shows("arms", "seeds", "name", "folder", "base")
def test_every_arm_and_seed_is_an_ordinary_run(trio):
    assert trio.code == 0, trio.err
    names = [f"{arm},seed={seed}" for arm in ("likelihood", "ppo", "reinforce") for seed in (0, 1)]
    assert list(runs_of(trio)) == names
    files = {p.name for p in trio.folder.iterdir() if p.is_file()}
    assert files == {"compare.yaml", "dashboards.json", "report.html", *WRITTEN}
    config = settings.load(trio.folder / "ppo,seed=1" / "config.yaml")
    assert (config.name, config.folder, config.seed, config.log.group) == ("ppo,seed=1", "runs/trio", 1, "trio")
    assert (config.trainer.type, config.trainer.epochs) == ("ppo", 2)
    for folder in runs_of(trio).values():
        assert (folder / "final" / "model.safetensors").is_file()
        assert (folder / "curves.png").is_file()


def test_a_run_in_a_worker_is_the_run_alone_to_the_bit(trio, monkeypatch):
    """Of arms that come first in a worker and of arms that follow others there."""
    monkeypatch.chdir(trio.root)
    for name in ("reinforce,seed=0", "likelihood,seed=1"):
        words = ["folder=alone", "log.with=[]"]
        alone = rlkl.train(trio.folder / name / "config.yaml", words, overwrite=True)
        assert metrics(alone) == metrics(trio.folder / name)


def test_arms_of_a_seed_see_the_same_prompts_in_the_same_order_and_start_from_the_same_samples(trio):
    """Prompts at every step; samples at the first, where all policies are still the base model."""
    for seed in (0, 1):
        runs = [trio.folder / f"{arm},seed={seed}" for arm in ("reinforce", "ppo", "likelihood")]
        first, second = ([recording.load(run, step) for run in runs] for step in (1, 2))
        for step in (first, second):
            assert all(rollout.columns["prompt"] == step[0].columns["prompt"] for rollout in step)
        assert first[0].columns["prompt"] != second[0].columns["prompt"]
        assert all(torch.equal(rollout.tokens_BT, first[0].tokens_BT) for rollout in first)
        assert not all(torch.equal(rollout.tokens_BT, second[0].tokens_BT) for rollout in second)
        rewards = [metrics(run)[1]["reward/train/total"] for run in runs]
        assert len(set(rewards)) == 1
    one, other = (recording.load(trio.folder / f"ppo,seed={seed}", 1) for seed in (0, 1))
    assert one.columns["prompt"] != other.columns["prompt"] or not torch.equal(one.tokens_BT, other.tokens_BT)


def test_a_run_keeps_its_lines_to_itself(trio):
    for name, folder in runs_of(trio).items():
        lines = (folder / "log.txt").read_text()
        assert "eval @ 2" in lines
        assert "step 2/2" in lines
        assert name in lines
    assert "eval @" not in trio.out
    assert [line for line in trio.out.splitlines() if line.startswith("[") and line.endswith(": started")] == [
        f"[{k}/6] {arm},seed={seed}: started"
        for k, (seed, arm) in enumerate(((s, a) for s in (0, 1) for a in ("reinforce", "ppo", "likelihood")), 1)
    ]
    assert (
        len([line for line in trio.out.splitlines() if re.match(r"\[\d/6\] .*: gold 0\.\d+  KL .* \d+ s$", line)]) == 6
    )


def test_the_plan_says_what_differs_with_defaults_resolved(trio):
    before = trio.out.split("[1/6]")[0]
    assert "trio: 3 arms x 2 seeds = 6 runs in runs/trio, 0 kept, 6 to do, 2 at a time; gold is letters" in before
    rows = {cells[0]: cells[1:] for cells in table(before)}
    assert rows["key"] == ["reinforce", "ppo", "likelihood"]
    assert rows["trainer.type"] == ["reinforce", "ppo", "token_likelihood"]
    assert rows["trainer.epochs"] == ["–", "2", "–"]
    assert rows["trainer.clip"] == ["–", "0.2", "–"]  # a default
    assert rows["credit.horizon"] == ["null", "null", "1"]
    assert not {"seed", "name", "folder", "log.group", "train.steps", "kl.beta"} & set(rows)


@shows("columns", "gold")
def test_the_table_and_the_summary_are_means_over_the_runs(trio):
    rows = {cells[0]: cells[1:] for cells in table(trio.out.split("[6/6]")[-1])}
    timing = json.loads((trio.folder / "timing.json").read_text())
    assert rows["arm"][-3:] == ["max(reward/eval/letters)", "policy/eval/length", "policy/clip_fraction"]
    for arm in ("reinforce", "ppo", "likelihood"):
        runs = [metrics(trio.folder / f"{arm},seed={seed}") for seed in (0, 1)]
        mine = trio.summary["arms"][arm]
        for name, key, row in (
            ("gold_before", "reward/eval/letters", 0),
            ("gold", "reward/eval/letters", -1),
            ("kl", "kl/sequence", -1),
            ("tokens", "tokens/generated", -1),
            ("labels", "reward/labels", -1),
            ("policy/eval/length", "policy/eval/length", -1),
        ):
            values = [run[row][key] for run in runs]
            known = {key: mine[name][key] for key in ("n", "mean", "min", "max", "iqm")}
            mean = sum(values) / 2
            assert known == pytest.approx({"n": 2, "mean": mean, "min": min(values), "max": max(values), "iqm": mean})
            assert mine[name]["interval"] is mine[name]["iqm_interval"] is None  # of two
        assert (mine["runs"], mine["finished"]) == (2, 2)
        gold = mine["gold"]
        assert rows[arm][:2] == ["2/2", f"{mine['gold_before']['mean']:.3f}"]
        assert rows[arm][2] == f"{gold['mean']:.3f} ({gold['min']:.3f}–{gold['max']:.3f})"
        assert rows[arm][6] == f"{timing['arms'][arm]['seconds']['mean']:,.0f}"
        most = [max(row.get("reward/eval/letters", -1) for row in run) for run in runs]
        assert mine["max(reward/eval/letters)"]["max"] == pytest.approx(max(most))
        for seed, run in enumerate(runs):  # every round
            points = trio.summary["runs"][f"{arm},seed={seed}"]["evaluations"]
            lengths = [row["policy/eval/length"] for row in run if "policy/eval/length" in row]
            assert [point["policy/eval/length"] for point in points] == lengths
    assert trio.summary["arms"]["ppo"]["policy/clip_fraction"] is not None
    assert trio.summary["arms"]["reinforce"]["policy/clip_fraction"] is None
    assert rows["reinforce"][-1] == "–"
    times = [json.loads(line) for line in (trio.folder / "ppo,seed=0" / "metrics.jsonl").read_text().splitlines()]
    spent = sum(row.get("time/step", 0) + row.get("time/evaluate", 0) for row in times)
    assert timing["runs"]["ppo,seed=0"] == pytest.approx(spent)
    assert "seconds" not in json.dumps(trio.summary)


def test_the_summary_holds_every_evaluation(trio):
    run = trio.summary["runs"]["ppo,seed=1"]
    rows = metrics(trio.folder / "ppo,seed=1")
    keys = {"step": "step", "kl": "kl/sequence", "gold": "reward/eval/letters"}
    keys |= {"labels": "reward/labels", "queries": "reward/queries", "tokens": "tokens/generated"}
    columns = ("policy/eval/length", "policy/clip_fraction")
    for point, row in zip(run["evaluations"], rows, strict=True):
        proxy = row["reward/eval/letters"] + 0.5 * row["reward/eval/parity"]
        found = {name: row.get(key, 0) for name, key in keys.items()} | {"proxy": pytest.approx(proxy)}
        assert point == found | {name: row[name] for name in columns if name in row}
    assert [point["labels"] for point in run["evaluations"]] == [0, 8, 16]  # two sources
    assert (run["arm"], run["seed"], run["error"]) == ("ppo", 1, None)


def test_trackio_shows_a_run_an_arm_and_seed_grouped_by_the_comparison(trio):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    names = [run.name for run in trackio.Api().runs("trio")]
    assert sorted(names) == [*runs_of(trio), "trio"]  # the last is the comparison's own
    assert {SQLiteStorage.get_run_config("trio", name)["_Group"] for name in names} == {"trio"}


def table(text: str) -> list[list[str]]:
    """The cells of the rows of a table, a row on one line."""
    lines = [line for line in text.splitlines() if line[:1] in "│┃"]
    return [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines]


def test_what_is_finished_is_kept_and_another_configuration_is_refused(trio, monkeypatch):
    """Keys of output alone may differ; nothing is started for either."""
    monkeypatch.chdir(trio.root)
    before = {p: p.stat().st_mtime_ns for p in trio.folder.rglob("*") if p.is_file()}
    stated = {name: (trio.folder / name).read_bytes() for name in WRITTEN}
    code, out, err = said("trio.yaml", "base.log.samples=0", "base.log.every=1", "workers=1")
    assert code == 0, err
    assert "6 kept, 0 to do" in out
    assert "started" not in out
    rows = [line for line in trio.out.splitlines() if line.startswith("│ ppo")]
    assert rows == [line for line in out.splitlines() if line.startswith("│ ppo")]
    changed = {p.name for p, then in before.items() if p.stat().st_mtime_ns != then}
    assert changed == {"compare.yaml", "dashboards.json", "report.html", *WRITTEN}
    assert stated == {name: (trio.folder / name).read_bytes() for name in WRITTEN}
    for words in (["arms.ppo.trainer.epochs=3"], ["arms.ppo.trainer.epochs=3", "--dry-run"]):
        code, out, err = said("trio.yaml", *words)
        assert code == 2
        assert err.splitlines() == [
            "rlkl: runs/trio/ppo,seed=0: finished with trainer.epochs 2, now 3",
            "rlkl: runs/trio/ppo,seed=1: finished with trainer.epochs 2, now 3",
            "rlkl: give this comparison another name=..., or --overwrite to do all its runs anew",
        ]


def test_the_kept_configuration_is_the_same_comparison(trio, monkeypatch):
    monkeypatch.chdir(trio.root)
    code, out, err = said("runs/trio/compare.yaml", "--dry-run")
    assert code == 0, err
    assert "6 kept, 0 to do" in out


def test_files_of_a_finished_run_that_cannot_be_read_fail_that_run_alone(trio, monkeypatch):
    """metrics.jsonl emptied, gone or without a step; the others cut in a line or at its end: a page for the rest."""
    monkeypatch.chdir(trio.root)
    folder = Path("runs/trio/ppo,seed=1")
    harms = [
        ("metrics.jsonl", lambda text: b"", "holds no evaluation"),
        ("metrics.jsonl", lambda text: None, "is missing"),
        ("metrics.jsonl", lambda text: text[:9] + text[30:], "cannot be read: line 1 is no row"),
        ("metrics.jsonl", lambda text: text[: text.index(b"\n") + 1], "lacks evaluations that evaluations.jsonl has"),
        ("evaluations.jsonl", lambda text: text[:-20], "cannot be read: line 3 is no row"),
        ("evaluations.jsonl", lambda text: text[: text.index(b"\n") + 1], "lacks evaluations that metrics.jsonl has"),
        ("samples.jsonl", lambda text: b"{" + text, "cannot be read: line 1 is no row"),
    ]
    for k, (name, harm, what) in enumerate(harms):
        whole = (folder / name).read_bytes()
        if (left := harm(whole)) is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(left)
        told = f"{folder / name} {what}; bring it back, or delete {folder} and compare again to redo the run"
        assert results.damage(folder) == told
        if k in (0, 4):
            code, out, err = said("trio.yaml")
            assert (code, err) == (1, "rlkl: 1 of 6 runs failed; 1 of them had finished, and is kept\n")
            assert f"ppo,seed=1: FAILED: {told}" in out.splitlines()
            summary = json.loads((trio.folder / "summary.json").read_text())
            assert [arm["finished"] for arm in summary["arms"].values()] == [2, 1, 2]
            assert told in (trio.folder / "report.html").read_text()
        (folder / name).write_bytes(whole)
    assert said("trio.yaml")[0] == 0


def test_a_page_made_again_leaves_out_a_run_that_lost_its_rows_since(trio, monkeypatch):
    monkeypatch.chdir(trio.root)
    path = Path("runs/trio/ppo,seed=1/metrics.jsonl")
    whole = path.read_bytes()
    path.unlink()
    try:
        assert main(["report", "runs/trio", "-o", "again.html"]) == 0
        assert "metrics.jsonl is missing" in Path("again.html").read_text()
    finally:
        path.write_bytes(whole)


def test_files_are_replaced_as_a_whole(trio, monkeypatch):
    """Each by a rename of one that was written beside it."""
    monkeypatch.chdir(trio.root)
    replaced, real = set(), os.replace

    def replace(part: Any, path: Any) -> None:
        replaced.add(Path(path).name)
        real(part, path)

    monkeypatch.setattr(os, "replace", replace)
    assert said("trio.yaml")[0] == 0
    assert {*WRITTEN, "compare.yaml", "report.html", "dashboards.json"} <= replaced
    assert not [path for path in trio.folder.iterdir() if path.name.startswith(".")]


@shows("match_kl")
def test_the_table_at_a_matched_kl_and_the_runs_that_never_get_there(trio, monkeypatch):
    monkeypatch.chdir(trio.root)
    ends = {name: run["evaluations"][-1]["kl"] for name, run in trio.summary["runs"].items()}
    most = {name: max(p["kl"] for p in run["evaluations"]) for name, run in trio.summary["runs"].items()}
    level = sorted(most.values())[1]
    code, out, err = said("trio.yaml", f"match_kl={level}")
    assert code == 0, err
    summary = json.loads((trio.folder / "summary.json").read_text())
    said("trio.yaml")  # as it was
    (late,) = [name for name in most if most[name] < level]
    assert f"{late}: never gets to {level:g} nats (at most {most[late]:.3g}); it is in no mean" in out
    assert summary["arms"][late.split(",")[0]]["counted"] == 1
    for name, run in summary["runs"].items():
        if name == late:
            assert "gold" not in run
            continue
        assert run["kl"] == pytest.approx(level)
        assert run["kl_end"] == ends[name]
        points = run["evaluations"]
        k = next(i for i, p in enumerate(points) if p["kl"] >= level)
        low, high = points[k - 1], points[k]
        share = (level**0.5 - low["kl"] ** 0.5) / (high["kl"] ** 0.5 - low["kl"] ** 0.5)
        assert run["gold"] == pytest.approx(low["gold"] + share * (high["gold"] - low["gold"]))


@pytest.fixture(scope="module")
def broken(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Done]:
    """Arms that fail in every way, in one process; and the same command after the reason has gone."""
    root = tmp_path_factory.mktemp("broken")
    furnish(root)
    ways = ("dies", "raises", "diverges")
    tree = {
        "name": "broken",
        "base": base(tiny_model, save={"every": 1}),
        "arms": {way: {"rewards.letters.path": f"scores:{way}"} for way in ways} | {"fine": {}},
        "seeds": [3],
        "workers": 1,
    }
    (root / "broken.yaml").write_text(dump(tree))
    (root / "broken").touch()
    with contextlib.chdir(root):
        first = Done(root, root / "runs/broken", *said("broken.yaml"))
        (root / "error.txt").write_text((first.folder / "dies,seed=3" / "error.txt").read_text())
        (root / "stamp").write_text(str((first.folder / "fine,seed=3" / "metrics.jsonl").stat().st_mtime_ns))
        (root / "first.json").write_text((first.folder / "summary.json").read_text())
        (root / "broken").unlink()
        return first, Done(root, first.folder, *said("broken.yaml"))


def test_runs_that_fail_are_reported_and_the_rest_goes_on(broken):
    first, _ = broken
    assert first.code == 1
    assert first.err == "rlkl: 3 of 4 runs failed; the same command does them again\n"
    folder = Path("runs/broken")
    died = f"its process died (signal 9, SIGKILL; out of memory?) (see {folder / 'dies,seed=3' / 'error.txt'})"
    for k, (way, what) in enumerate(
        (
            ("dies", re.escape(died)),
            ("raises", rf".*no such thing.*traceback in {folder / 'raises,seed=3' / 'error.txt'}\)"),
            ("diverges", rf".*nan.*traceback in {folder / 'diverges,seed=3' / 'error.txt'}\)"),
        ),
        1,
    ):
        assert re.search(rf"^\[{k}/4\] {way},seed=3: FAILED: {what}$", first.out, re.M), first.out
        assert re.search(rf"^{way},seed=3: FAILED: {what}$", first.out.split("frontier.png")[0], re.M)
    assert "SIGKILL" in (first.root / "error.txt").read_text()
    summary = json.loads((first.root / "first.json").read_text())
    finished = {name: row["finished"] for name, row in summary["arms"].items()}
    assert finished == {"dies": 0, "raises": 0, "diverges": 0, "fine": 1}
    rows = {cells[0]: cells[1:] for cells in table(first.out.split("[4/4]")[-1])}
    assert rows["dies"][:4] == ["0/1", "–", "–", "–"]
    assert rows["fine"][0] == "1/1"


def test_the_same_command_again_does_what_is_missing_and_nothing_else(broken):
    first, again = broken
    assert again.code == 0, again.err
    assert "1 kept, 3 to do" in again.out
    assert "fine,seed=3: started" not in again.out
    stamp = (first.folder / "fine,seed=3" / "metrics.jsonl").stat().st_mtime_ns
    assert (first.root / "stamp").read_text() == str(stamp)
    assert all(run["error"] is None for run in again.summary["runs"].values())
    assert not list(first.folder.rglob("error.txt"))
    assert "resumed after step 1 of 2" in (first.folder / "raises,seed=3" / "log.txt").read_text()
    golds = [run["gold"] for run in again.summary["runs"].values()]  # the same reward under five names
    assert golds == [golds[0]] * 4
    assert not [p for p in first.folder.iterdir() if p.name.startswith(".") or p.suffix == ".log"]

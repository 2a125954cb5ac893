"""Runs on a judge's ratings: every trainer, what a dead endpoint leaves behind, and where the key is not."""

from pathlib import Path

import pytest
import yaml
from conftest import Tree, metrics
from stub import Stub
from test_overseer import TEMPLATE, rate
from test_overseer import stub as stub

import rlkl
from rlkl import RunError, checkpoint, cli, settings

ROOT = Path(__file__).parents[1]
KEY = "sk-very-secret-7"


@pytest.fixture
def run(tiny_config: Tree, stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Six steps on the stub's ratings; of its own accord only step 3 has a checkpoint."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    judge = {
        "type": "overseer",
        "endpoint": stub.url,
        "model": "judge",
        "template": TEMPLATE,
        "ratings": {"1": 1.0, "2": 2.0},
        "api_key_env": "JUDGE_KEY",
        "retries": 1,
        "backoff": 0.01,
        "cache": str(tmp_path / "kept"),
    }
    more = {"train": {"steps": 6}, "save": {"every": 3}, "evaluate": {**tiny_config["evaluate"], "every": 4}}
    config = {**tiny_config, **more, "rewards": {"judge": judge}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return config


def dies(stub: Stub, folder: Path, after: int, questions: int = 0, status: int = 503) -> None:
    """The server stays away once the run's rows have come to a step, and after so many more questions."""
    count = [0]

    def answer(question: str) -> dict[str, float]:
        rows = metrics(folder) if (folder / "metrics.jsonl").exists() else []
        count[0] += bool(rows) and rows[-1]["step"] == after
        stub.down = status if count[0] > questions else 0
        return rate(question)

    stub.answer = answer


@pytest.mark.parametrize("trainer", ["reinforce", "ppo", "dpo", "token_likelihood"])
def test_every_trainer_learns_from_a_judge(run: Tree, trainer: str) -> None:
    words = [f"trainer.type={trainer}", "train.steps=2"]
    words += ["kl.beta=0"] if trainer == "token_likelihood" else []
    rows = metrics(rlkl.train(run, words))
    assert 1 < rows[0]["reward/eval/judge"] < 2 and rows[-1]["kl/sequence"] > 0
    assert rows[-1]["reward/queries"] == 8


def test_an_endpoint_that_stays_dead_stops_the_run_with_a_checkpoint(
    run: Tree, stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = metrics(rlkl.train(run, ["name=whole", f"rewards.judge.cache={tmp_path}/other"]))
    dies(stub, tmp_path / "runs/tiny", after=4)
    assert cli.main(["train", "config.yaml"]) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlkl:")]
    assert "step 5: reward judge: sample" in said and "error.txt" in said
    assert "/v1: no answer after 2 tries (status 503: down); stopped after step 4; go on with --resume" in said
    assert checkpoint.steps(tmp_path / "runs/tiny") == [4] and metrics(tmp_path / "runs/tiny") == whole[:5]
    assert not (tmp_path / "runs/tiny/final").exists()
    assert cli.main(["train", "config.yaml", "--resume"]) == 1  # still
    assert checkpoint.steps(tmp_path / "runs/tiny") == [4] and metrics(tmp_path / "runs/tiny") == whole[:5]
    stub.down, stub.answer = 0, rate
    assert cli.main(["train", "config.yaml", "--resume"]) == 0
    assert metrics(tmp_path / "runs/tiny") == whole


def test_an_endpoint_that_dies_in_an_evaluation_loses_no_step(run: Tree, stub: Stub, tmp_path: Path) -> None:
    whole = metrics(rlkl.train(run, ["name=whole", f"rewards.judge.cache={tmp_path}/other"]))
    folder = tmp_path / "runs/tiny"
    dies(stub, folder, after=3, questions=4)  # which step 4 asks, at most
    with pytest.raises(RunError, match=r"evaluation at step 4: reward judge: .*; stopped after step 4"):
        rlkl.train(run)
    assert checkpoint.steps(folder) == [4] and metrics(folder)[-1]["step"] == 3
    stub.down, stub.answer = 0, rate
    assert metrics(rlkl.train(run, resume=True)) == whole


def test_an_endpoint_that_is_dead_at_the_start_leaves_nothing(
    run: Tree, stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.down = 503
    assert cli.main(["train", "config.yaml"]) == 1
    assert "no answer after 2 tries" in capsys.readouterr().err
    stub.down = 401
    assert cli.main(["train", "config.yaml"]) == 2
    assert "status 401: down" in capsys.readouterr().err
    assert not (tmp_path / "runs/tiny").exists()


def test_a_dead_endpoint_is_a_crashed_arm_of_a_comparison(
    run: Tree, stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests")
    steady = {"type": "function", "path": "conftest:varied"}
    arms = {"steady": {"rewards": {"judge": steady}}, "judged": {"rewards": run["rewards"]}}
    base = {key: value for key, value in run.items() if key not in ("rewards", "name")} | {"train": {"steps": 2}}
    plan = {"name": "both", "base": base, "arms": arms, "seeds": [0]}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    dies(stub, tmp_path / "runs/both/judged,seed=0", after=1)
    assert cli.main(["compare", "both.yaml"]) == 1
    said = capsys.readouterr()
    assert "step 2: reward judge: sample" in said.out + said.err and "stopped after step 1" in said.out + said.err
    assert (tmp_path / "runs/both/steady,seed=0/final").is_dir()
    stub.down, stub.answer = 0, rate
    assert cli.main(["compare", "both.yaml"]) == 0
    assert [row["step"] for row in metrics(tmp_path / "runs/both/judged,seed=0")] == [0, 1, 2]


def test_the_key_is_in_no_file_of_a_run(run: Tree, stub: Stub, tmp_path: Path) -> None:
    stub.said = f"your key {KEY}"
    dies(stub, tmp_path / "runs/tiny", after=1, status=401)
    with pytest.raises(RunError, match=r"status 401: your key \[key\]; stopped after step 1"):
        rlkl.train(run)
    stub.down, stub.answer = 0, rate
    assert (rlkl.train(run, resume=True) / "final/README.md").is_file()
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in stub.headers)
    assert [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()] == []


def test_how_the_endpoint_is_reached_may_change_on_resume(run: Tree, tmp_path: Path) -> None:
    config = settings.load(run)
    changes = {"timeout": 9.0, "retries": 9, "backoff": 9.0, "concurrency": 9, "cache": "x", "api_key_env": "OTHER"}
    other = settings.load(run, [f"rewards.judge.{key}={value}" for key, value in changes.items()])
    assert settings.decisive(config) == settings.decisive(other)
    assert settings.decisive(config) != settings.decisive(settings.load(run, ["rewards.judge.min_mass=0.1"]))


def test_the_example_runs_against_a_server_that_counts_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlkl.tasks import facts

    def count(question: str) -> dict[str, float]:
        said = question.partition("false:")[2].partition("\n")[0]
        right = round(3 * facts.gold([""], [said])[0])
        return {str(n): 0.97 if n == right else 0.01 for n in range(4)}

    stub = Stub(count)
    monkeypatch.chdir(tmp_path)
    words = [f"rewards.judge.endpoint={stub.url}", "log.with=[]", f"rewards.judge.cache={tmp_path}"]
    words += ["train.steps=3", "evaluate.every=3", "evaluate.prompts=4"]
    rows = metrics(rlkl.train(ROOT / "configs/rewards/overseer.yaml", words))
    stub.close()
    for row in (rows[0], rows[-1]):
        gold = row["reward/eval/gold"]
        assert row["reward/eval/judge"] == pytest.approx(0.96 * gold + 0.02, abs=1e-3)

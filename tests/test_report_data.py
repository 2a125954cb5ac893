"""What the page is made of when nothing has summed it up before, or when several folders come together."""

import json
import os
from pathlib import Path

import yaml
from conftest import write_jsonl
from reports import BASE, compared, write

from rlkl.grid import compare, plan
from rlkl.report import build
from rlkl.report.load import load
from rlkl.tracking import read_rows

TWO = {"low": {}, "high": {"optimiser": {"learning_rate": 0.002}}}
WHITE = {"on": {"credit": {"whiten_advantages": True}}, "off": {"credit": {"whiten_advantages": False}}}
EXACT = {
    "key": "k",
    "frontier": [{"beta": 9.0, "kl": 0.0, "gold": 0.3}, {"beta": 0.1, "kl": 4.0, "gold": 0.9}],
    "horizons": [{"horizon": 2, "beta": 0.1, "kl": 2.0, "gold": 0.5}],
    "mass": 1.0,
    "prompts": 2,
}


def steady(arm: str, seed: int, kl: float) -> float:
    return 0.3 + (0.2 if "high" in arm else 0.1) * kl**0.5 + 0.01 * (seed - 1)


def test_a_page_made_again_states_what_the_comparison_did(tmp_path, capsys):
    folder = compared(
        tmp_path, WHITE, [0, 1, 2], steady, budgets={"tokens": 50000}, tuning={"on": 3, "off": 3}, match_kl=1.0
    )
    path = folder / "on,seed=1/metrics.jsonl"
    rows = list(read_rows(path))
    write_jsonl(path, [*rows[:-1], {**rows[-1], "budget/ended/tokens": 1.0}])
    compare.conclude(plan.make(folder / "compare.yaml"), {})
    summary = json.loads((folder / "summary.json").read_text())
    os.utime(path, (4e9, 4e9))  # written after the summary
    again = load([folder]).summary
    assert json.loads(json.dumps(again)) == summary
    assert again["flags"][0]["key"] == "credit.whiten_advantages"
    assert (again["budgets"], again["tuning"]) == ({"tokens": 50000.0}, {"on": 3, "off": 3})
    assert {name for name, run in again["runs"].items() if run["ended"] == "tokens"} == {"on,seed=1"}


def test_the_exact_frontier_is_read_where_its_gold_is_asked_for(tmp_path):
    rewards = {**BASE["rewards"], "proxy": {**BASE["rewards"]["gold"], "weight": 0}}
    arms = {arm: {**changes, "rewards": rewards} for arm, changes in TWO.items()}
    folder = compared(tmp_path, arms, [0], steady)
    (folder / "exact.json").write_text(json.dumps(EXACT))
    found = load([folder]).summary
    assert found["exact"] == EXACT["frontier"] and found["exact_horizons"] == EXACT["horizons"]
    assert found["area"]["normaliser"] == "exact"
    other = load([folder], gold="proxy").summary
    assert other["exact"] is None and other["area"]["normaliser"] == "range"


def test_several_comparisons_keep_what_they_say_is_compared(tmp_path):
    axes = {"kl.beta": [0.05, 0.2]}
    one = compared(tmp_path / "1", WHITE, [0], steady, name="one", compared=["credit.whiten_advantages"])
    other = compared(
        tmp_path / "2", TWO, [0], steady, name="two", axes=axes, match_kl=2.0, tuning={"low": 2}, columns=["time/step"]
    )
    data = load([one, other])
    config = data.plan.config
    assert data.summary["flags"] == []
    assert (config.axes, config.match_kl, config.columns) == (axes, None, ["time/step"])
    assert data.summary["tuning"] == {"one/on": None, "one/off": None, "two/low": 2, "two/high": None}
    page = build.page(data, [str(one), str(other)])
    assert "nobody has said that they are what is compared" not in page
    assert "one/on not said" in page and "two/low 2" in page


def test_a_single_run_beside_a_comparison_takes_nothing_from_it(tmp_path):
    made = compared(tmp_path, WHITE, [0], steady, name="one", compared=["credit"], match_kl=2.0)
    config = {**BASE, "name": "alone", "optimiser": {"learning_rate": 3e-3}}
    write(tmp_path / "alone", config, lambda kl: 0.3, 0)
    data = load([made, tmp_path / "alone"])
    assert data.arms == ["one/on", "one/off", "alone"]
    assert (data.summary["flags"], data.summary["match_kl"], data.summary["budgets"]) == ([], 2.0, {})


def test_budgets_that_all_have_are_said_of_all(tmp_path):
    made = [
        compared(tmp_path / name, TWO, [0], steady, name=name, budgets={"steps": 20}, axes={"kl.beta": [beta]})
        for name, beta in (("one", 0.1), ("two", 0.2))
    ]
    assert load(made).summary["budgets"] == {"steps": 20}
    text = yaml.safe_load((made[1] / "compare.yaml").read_text())
    text["budgets"]["steps"] = 19
    Path(made[1] / "compare.yaml").write_text(yaml.safe_dump(text))
    assert load(made).summary["budgets"] == {}

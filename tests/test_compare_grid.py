"""The grid of a comparison: bundles, what is included and left out, bases of arms, budgets, flags, and its cost."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Tree
from test_compare import shows
from test_compare_plan import names, refused_, tree_  # noqa: F401 - fixtures

from rlkl.cli import main
from rlkl.grid import cost, fair, plan
from rlkl.grid.cells import coordinates

Refused = Callable[..., str]
SOURCES = {"sum": {}, "letters": {"rewards.parity.weight": 0}}


@shows("bundles")
def test_a_bundle_is_an_axis_of_several_keys(tree: Tree):
    bundles = {"source": {"sum": {}, "tuned": {"rewards": {"parity": {"weight": 0}}, "kl.beta": 0.3}}}
    made = plan.make(tree | {"bundles": bundles, "axes": {"credit.gamma": [1.0, 0.5]}})
    assert names(made)[:4] == [
        "reinforce,source=sum,gamma=1,seed=0",
        "reinforce,source=sum,gamma=0.5,seed=0",
        "reinforce,source=tuned,gamma=1,seed=0",
        "reinforce,source=tuned,gamma=0.5,seed=0",
    ]
    last = made.runs[-1].config
    assert (last.rewards["parity"].weight, last.kl.beta, last.credit.gamma, last.trainer.type) == (0, 0.3, 0.5, "ppo")
    assert made.runs[0].config.rewards["parity"].weight == 0.5
    assert {run.of for run in made.runs} == {"reinforce", "ppo"}


def test_axes_and_bundles_come_after_the_arm(tree: Tree):
    tree["arms"] = {"a": {"kl.beta": 0.1, "credit.gamma": 0.1, "train.steps": 1}}
    bundles = {"b": {"x": {"credit.gamma": 0.2}}}
    config = plan.make(tree | {"bundles": bundles, "axes": {"kl.beta": [0.3]}}).runs[0].config
    assert (config.train.steps, config.credit.gamma, config.kl.beta) == (1, 0.2, 0.3)


LOW, HIGH = {"kl.beta": 0.2}, {"kl": {"beta": 0.3}}
CLASHES = [
    ({"bundles": {"b": {"x": HIGH}}, "axes": {"kl.beta": [0.1]}}, "bundles.b sets it, and axes.kl.beta changes it,"),
    ({"bundles": {"b": {"x": LOW}, "c": {"y": HIGH}}}, "bundles.b sets it, and bundles.c changes it,"),
    ({"axes": {"kl": [{"beta": 1}], "kl.beta": [2]}}, "axes.kl sets it, and axes.kl.beta changes it,"),
    (
        {"axes": {"kl.beta": [1], "kl": [{"placement": "loss"}]}},
        "axes.kl.beta sets it, and axes.kl changes it (by kl),",
    ),
    (
        {"bundles": {"b": {"x": {"trainer.entropy_coef": 0.1}}}, "axes": {"trainer.type": ["ppo"]}},
        "bundles.b sets it, and axes.trainer.type changes it (by trainer.type),",
    ),
]


@pytest.mark.parametrize(("keys", "told"), CLASHES, ids=[told for _, told in CLASHES])
def test_what_a_name_says_and_another_part_of_it_takes_back_is_refused(refused: Refused, keys: Tree, told: str):
    said = refused(**{"arms": {"a": {}}, **keys})
    key = "trainer.entropy_coef" if "trainer" in told else "kl.beta"
    assert said.startswith("arm a,") and f": {key}: {told}" in said
    assert len(said.splitlines()) == 1


def test_parts_of_a_name_that_agree_or_are_never_combined_do_not_clash(tree: Tree):
    tree["base"]["trainer"] = {"type": "reinforce", "entropy_coef": 0.5}
    grid = {
        "arms": {"a": {"kl": {"placement": "reward"}}},
        "bundles": {
            "b": {"x": {}, "y": {"kl.beta": 0.2, "credit.gamma": 0.5}},
            "c": {"u": {"trainer": {"type": "ppo"}}, "v": {"kl.placement": "reward"}},  # as the arm has it
        },
        "axes": {"trainer.entropy_coef": [0.1], "kl.beta": [0.2, 0.3]},
    }
    made = plan.make(tree | grid | {"exclude": [{"b": "y", "kl.beta": 0.3}]})
    configs = [run.config for run in made.runs if "b=x" in run.arm]
    assert [(c.trainer.type, c.trainer.entropy_coef, c.kl.beta) for c in configs] == [
        (kind, 0.1, beta) for kind in ("ppo", "reinforce") for beta in (0.2, 0.3)
    ]


def test_no_two_factors_of_a_grid_go_by_one_name(tree: Tree):
    tree["arms"] = {"a": {}}
    bundles = {"beta": {"x": {"credit.gamma": 0.5}, "y": {}}}
    made = plan.make(tree | {"bundles": bundles, "axes": {"kl.beta": [0.1, 0.2]}})
    assert list(made.arms) == [f"a,beta={x},kl.beta={y}" for x in "xy" for y in (0.1, 0.2)]
    assert coordinates("a,beta=y,kl.beta=0.2") == {"arm": "a", "beta": "y", "kl.beta": "0.2"}
    watched = [{"type": "function", "path": "scores:letters", "weight": 0}]
    (arm,) = plan.make(tree | {"axes": {"rewards.seed": watched, "rewards.arm": watched}}).arms
    assert list(coordinates(arm)) == ["arm", "rewards.seed", "rewards.arm"]


@shows("include", "exclude")
def test_partial_combinations_include_and_exclude(tree: Tree):
    grid = tree | {"bundles": {"source": SOURCES}, "axes": {"kl.beta": [0.1, 0.2]}}
    assert len(plan.make(grid).runs) == 8
    only = plan.make(grid | {"include": [{"arm": "ppo"}, {"source": "letters", "kl.beta": 0.1}]})
    assert list(only.arms) == [
        "reinforce,source=letters,beta=0.1",
        *(f"ppo,source={source},beta={beta}" for source in SOURCES for beta in (0.1, 0.2)),
    ]
    exclude = [{"arm": "reinforce", "kl": {"beta": 0.1}}, {"source": ["sum"], "kl.beta": 0.2}]
    less = plan.make(grid | {"exclude": exclude})
    assert list(less.arms) == [
        "reinforce,source=letters,beta=0.2",
        "ppo,source=sum,beta=0.1",
        "ppo,source=letters,beta=0.1",
        "ppo,source=letters,beta=0.2",
    ]


def test_combinations_that_are_left_out_need_not_be_valid(tree: Tree):
    grid = tree | {"axes": {"trainer.minibatches": [1, 2]}, "exclude": [{"arm": "reinforce"}]}
    with pytest.raises(ValueError, match=r"arms.reinforce: include and exclude leave none of its combinations"):
        plan.make(grid)
    bundles = {"passes": {"one": {}, "two": {"trainer.minibatches": 2}}}
    made = plan.make(tree | {"bundles": bundles, "exclude": [{"arm": "reinforce", "passes": "two"}]})
    assert list(made.arms) == ["reinforce,passes=one", "ppo,passes=one", "ppo,passes=two"]


def test_an_arm_may_have_a_base_of_its_own(tree: Tree, tmp_path: Path):
    other = tree["base"] | {"train": {"steps": 7}, "kl": {"beta": 0.4}}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/other.yaml").write_text(yaml.safe_dump(other))
    tree["arms"]["more"] = {"base": "other.yaml", "kl.beta": 0.5}
    (tmp_path / "configs/c.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    made = plan.make("configs/c.yaml", ["arms.more.base.credit.gamma=0.5"])
    config = made.runs[-1].config
    assert (config.train.steps, config.kl.beta, config.credit.gamma) == (7, 0.5, 0.5)
    assert made.runs[0].config.train.steps == 2
    again = plan.make(made.config.model_dump(mode="json"))  # as compare.yaml keeps it
    assert again.runs == made.runs


@shows("budgets")
def test_budgets_cap_every_run(tree: Tree):
    made = plan.make(tree | {"budgets": {"steps": 1, "tokens": 50}})
    for run in made.runs:
        assert (run.config.train.budget.steps, run.config.train.budget.tokens) == (1, 50)
        assert run.config.train.budget.queries is None
    assert cost.caps(made) == {"steps": 1, "tokens": 50}


@shows("tuning")
def test_tuning_runs_are_shown_where_they_were_said_and_flagged_where_they_differ(tree: Tree, capsys):
    Path("c.yaml").write_text(yaml.safe_dump(tree | {"tuning": {"ppo": 12}}, sort_keys=False))
    assert main(["compare", "c.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    lines = {line.split("│")[1].strip(): line for line in out.splitlines() if line.startswith("│") and "│ 0 " in line}
    assert "12" in lines["ppo"]
    assert "not said" in lines["reinforce"]
    assert "differ in tuning" not in out
    made = plan.make(tree | {"tuning": {"ppo": 12, "reinforce": 1}})
    assert fair.flags(made) == [{"key": "tuning", "values": {"ppo": 12, "reinforce": 1}}]


@shows("compared")
def test_arms_that_differ_in_what_nobody_compares_are_flagged(tree: Tree, capsys):
    tree["arms"] = {
        "a": {},
        "b": {"kl": {"placement": "loss", "estimator": "exact"}, "credit": {"whiten_rewards": True}},
        "c": {"trainer": {"type": "dpo"}, "kl.beta": 0.1},
    }
    flags = {flag["key"]: flag["values"] for flag in fair.flags(plan.make(tree))}
    assert flags == {
        "kl.placement": {"a": "reward", "b": "loss"},
        "kl.estimator": {"a": "k1", "b": "exact"},
        "credit.whiten_rewards": {"a": False, "b": True},
    }  # DPO has no further penalty, and nothing to whiten
    meant = plan.make(tree | {"compared": ["kl", "credit.whiten_rewards"]})
    assert fair.flags(meant) == []
    Path("c.yaml").write_text(yaml.safe_dump(tree | {"compared": ["kl"]}, sort_keys=False))
    assert main(["compare", "c.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert (
        "warning: arms differ in credit.whiten_rewards: false (a), true (b); if that is what you compare, list" in out
    )
    assert "differ in kl" not in out


@pytest.mark.parametrize(
    ("axes", "flagged"),
    [
        ({"credit.gamma": [1.0, 0.9]}, []),
        ({"credit.horizon": [None, 2]}, []),  # the window follows
        ({"kl.window": ["own", "full"]}, []),
    ],
)
def test_axes_are_meant(tree: Tree, axes: Tree, flagged: list[str]):
    tree["arms"] = {"a": {}}
    assert [flag["key"] for flag in fair.flags(plan.make(tree | {"axes": axes}))] == flagged


def test_the_window_is_flagged_where_the_horizon_is_not_compared(tree: Tree):
    tree["arms"] = {"a": {}, "b": {"credit.horizon": 2}, "c": {"kl.window": "own"}}
    (flag,) = fair.flags(plan.make(tree))
    assert flag == {"key": "kl.window", "values": {"a": "full", "b": "anchored", "c": "own"}}


def test_whitening_and_clipping_of_a_source_are_flagged_where_two_arms_train_on_it(tree: Tree):
    tree["arms"] = {
        "a": {},
        "b": {"rewards.letters": {"whiten": True}, "rewards.parity.clip": 2.0},
        "c": {"rewards.parity": {"weight": 0, "clip": 3.0}},
    }
    flags = {flag["key"]: flag["values"] for flag in fair.flags(plan.make(tree))}
    assert flags == {
        "rewards.letters.whiten": {"a": False, "b": True, "c": False},
        "rewards.parity.clip": {"a": None, "b": 2.0},  # c only watches it
    }
    assert fair.flags(plan.make(tree | {"compared": ["rewards"]})) == []


def test_lambda_counts_only_where_gae_reads_it(tree: Tree):
    gae = {"credit": {"advantage": "gae", "baseline": "value"}, "kl": {"placement": "loss", "estimator": "exact"}}
    tree["base"]["kl"] = gae["kl"]
    tree["arms"] = {"a": {}, "b": gae, "c": {**gae, "credit.lambda": 0.5}}
    (flag,) = fair.flags(plan.make(tree))
    assert flag == {"key": "credit.lambda", "values": {"b": 0.95, "c": 0.5}}


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"seeds": None}, "seeds=None: "),
        ({"seeds": []}, "seeds=[]: "),
        ({"axes": {"kl.betta": [1]}}, "ppo,betta=1: kl.betta: unknown key, did you mean kl.beta?"),
        ({"axes": {"kl.betta": [1, 2, 3]}}, "reinforce,betta=3, ppo,betta=1, 2 more: kl.betta: unknown"),
        ({"include": [{"arms": "ppo"}]}, "include[0]: arms is neither arm, axis nor bundle, did you mean arm?"),
        ({"exclude": [{"arm": "pppo"}]}, "exclude[0]: arm=pppo is none of its values (reinforce, ppo)"),
        ({"exclude": [{"kl.beta": 1}]}, "exclude[0]: kl.beta is neither arm, axis nor bundle, known: arm"),
        ({"exclude": [{"arm": ["ppo", "pppo"]}]}, "exclude[0]: arm=pppo is none of its values (reinforce, ppo)"),
        ({"include": [{"arm": []}]}, "include[0]: arm=[] is none of its values (reinforce, ppo)"),
        ({"exclude": [{"arm": ["ppo", "reinforce"]}]}, "exclude: none of 2 combinations is left; drop an entry"),
        ({"exclude": [{}]}, "exclude[0]: it is empty; name some of arm"),
        ({"bundles": {"x": {}}}, "bundles.x={}: "),
        ({"bundles": {"a b": {"x": {}}}}, "bundles.a b: names of folders are made of it"),
        ({"bundles": {"s": {"a/b": {}}}}, "bundles.s.a/b: names of folders are made of it"),
        ({"bundles": {"arm": {"x": {}}}}, "bundles.arm: this name is taken"),
        ({"bundles": {"s": {"x": {}, "y": {}}}, "arms": {"a": {}}}, "arms a,s=x, a,s=y: equal in every key"),
        ({"budgets": {"token": 3}}, "budgets.token: unknown key, did you mean budgets.tokens?"),
        ({"budgets": {"tokens": 3}}, "train.budget.tokens=3: a single step may take 24; raise it"),
        ({"budgets": {"steps": 3}, "axes": {"train.budget.steps": [1]}}, "the comparison sets it; use budgets:"),
        ({"tuning": {"pppo": 3}}, "tuning.pppo: no such arm; the arms are reinforce, ppo"),
        ({"tuning": {"ppo": True}}, "tuning.ppo=True: input should be a valid integer"),
        ({"compared": ["kl.placment"]}, "compared: kl.placment: no such key, did you mean kl.placement?"),
        ({"arms": {"a": {"base": "nowhere.yaml"}}}, "nowhere.yaml: no such configuration file"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_in_the_grid_are_one_line_each_before_the_start(refused: Refused, keys: Tree, told: str):
    said = refused(**keys)
    assert told in said
    assert len(said.splitlines()) == 1


def rows(run: plan.Run, steps: int, seconds: float, **last: float) -> None:
    """A metrics.jsonl of so many steps."""
    run.folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"step": n, "time/step": seconds} for n in range(1, steps + 1)]
    lines[-1] |= last
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_cost_is_a_bound_and_time_is_told_by_runs_that_are_there(tree: Tree):
    made = plan.make(
        tree | {"seeds": [0, 1], "base": tree["base"] | {"train": {"steps": 10}}, "budgets": {"queries": 50}}
    )
    assert cost.bounds(made.runs[0].config) == {"steps": 6, "tokens": 144, "queries": 48, "labels": 48}
    assert cost.seconds(made, []) == {"reinforce": None, "ppo": None}
    (first,) = [run for run in made.runs if run.config.name == "reinforce,seed=0"]
    rows(first, 4, 3.0)
    assert cost.seconds(made, []) == {"reinforce": 3.0 * (2 + 6), "ppo": 3.0 * 12}
    assert cost.seconds(made, [first]) == {"reinforce": 18.0, "ppo": 36.0}
    _, told = cost.table(made, [], 2)
    assert told.startswith("in all at most 24 steps, 576 tokens, 192 queries, 192 labels; about 30 s with 2 at a time")


@pytest.mark.parametrize(
    ("caps", "steps"),
    [
        ({"labels": 80}, 10),  # 8 a step, of two sources
        ({"labels": 79}, 9),
        ({"labels": 8}, 1),
        ({"queries": 100}, 12),
        ({"tokens": 60}, 10),  # 24 at most, and 4 at least: 9 steps of 4 leave room for one more
        ({"steps": 7, "labels": 80}, 7),
        ({"seconds": 1}, 100),
    ],
)
def test_the_plan_knows_the_last_step_of_every_cap(tree: Tree, caps: Tree, steps: int):
    config = plan.make(tree | {"base": tree["base"] | {"train": {"steps": 100}}, "budgets": caps}).runs[0].config
    found = cost.bounds(config)
    assert found["steps"] == steps
    assert found["tokens"] == min(24 * steps, caps.get("tokens", 10**6))
    assert found["labels"] == found["queries"] == 8 * steps


def test_the_cap_that_ended_a_run_is_read_from_its_last_row(tree: Tree):
    made = plan.make(tree)
    rows(made.runs[0], 2, 1.0, **{"budget/ended/tokens": 1.0})
    ended = {run.config.name: cost.bound(run.folder) for run in made.runs}
    assert ended == {"reinforce,seed=0": "tokens", "ppo,seed=0": None}
    summary = {
        "arms": {arm: {"runs": len(runs)} for arm, runs in made.arms.items()},
        "runs": {run.config.name: {"arm": run.arm, "ended": ended[run.config.name]} for run in made.runs},
    }
    assert cost.endings(summary) == ["reinforce: 1 of 1 runs ended by the budget of tokens"]

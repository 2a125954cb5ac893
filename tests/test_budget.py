"""Caps of ``train.budget``: where they end a run, what then says so, and that an ended run is a finished one."""

from pathlib import Path

import pytest
from conftest import Tree, metrics
from test_config_effects import changed, shows

import rlkl
from rlkl import budget, checkpoint, settings
from rlkl.config.budget import labels
from rlkl.lane import build

STEP = 2 * 2 * 6  # prompts, samples, tokens of the tiny configuration


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkl.plots.curves", lambda folder: folder / "curves.png")


def capped(config: Tree, total: int = 6, **caps: float) -> Tree:
    return changed(config, {"train.steps": total, "train.budget": caps, "evaluate.every": 4, "save.every": None})


def ended(rows: list[Tree]) -> list[str]:
    """Which bounds the last row names; no other row may."""
    assert not [key for row in rows[:-1] for key in row if key.startswith("budget/")]
    return [key.removeprefix("budget/ended/") for key in rows[-1] if key.startswith("budget/")]


@shows("train.budget.tokens")
def test_a_cap_on_tokens_is_never_passed_and_at_most_one_step_is_left_of_it(tiny_config):
    rows = metrics(rlkl.train(capped(tiny_config, tokens=60)))
    used = rows[-1]["tokens/generated"]
    assert ended(rows) == ["tokens"]
    assert 60 - STEP < used <= 60
    assert 0 < rows[-1]["step"] < 6


@shows("train.budget.queries")
def test_a_cap_on_queries_ends_before_the_step_that_would_pass_it(tiny_config):
    rows = metrics(rlkl.train(capped(tiny_config, queries=11)))
    assert (rows[-1]["step"], rows[-1]["reward/queries"], ended(rows)) == (2, 8, ["queries"])


@shows("train.budget.labels")
def test_a_cap_on_labels_counts_what_somebody_judges(tiny_config, tiny_reward_model):
    config = capped(tiny_config, labels=9)
    config["rewards"]["model"] = {"type": "learned", "path": str(tiny_reward_model)}
    rows = metrics(rlkl.train(config))
    assert (rows[-1]["step"], rows[-1]["reward/labels"], ended(rows)) == (2, 8, ["labels"])
    assert rows[-1]["reward/queries"] == 16


@shows("train.budget.steps")
def test_a_cap_on_steps_ends_a_run_and_leaves_the_schedule_alone(tiny_config, capsys):
    linear = changed(capped(tiny_config, 3), {"optimiser.schedule": "linear"})
    long = metrics(rlkl.train({**linear, "name": "long"}))
    short = rlkl.train(changed(linear, {"train.budget.steps": 2, "name": "short"}))
    rows = metrics(short)
    assert ended(rows) == ["steps"]
    assert ended(long) == []
    assert [row["step"] for row in rows] == [0, 1, 2]
    rates = "policy/learning_rate"
    assert [row[rates] for row in rows[1:]] == [row[rates] for row in long[1:3]]
    assert "kl/sequence" in rows[-1]  # evaluated, though not due
    assert settings.finished(short)
    assert "ended after step 2 of 3: train.budget.steps=2" in capsys.readouterr().out


@shows("train.budget.seconds")
def test_a_cap_on_seconds_ends_once_the_mean_step_does_not_fit(tiny_config, monkeypatch):
    monkeypatch.setattr(budget, "together", lambda *_: 10.0)
    rows = metrics(rlkl.train(capped(tiny_config, seconds=35)))
    assert (rows[-1]["step"], ended(rows)) == (3, ["seconds"])


def test_where_the_last_step_comes_first_no_cap_has_ended_the_run(tiny_config):
    rows = metrics(rlkl.train(capped(tiny_config, 2, queries=8)))
    assert (rows[-1]["step"], ended(rows)) == (2, [])


def test_stored_completions_cost_their_labels_once(tiny_config):
    from conftest import write_jsonl

    write_jsonl("pairs.jsonl", [{"prompt": i, "chosen": "a b", "rejected": "b a"} for i in "abcdefgh"])
    config = changed(
        capped(tiny_config, 9, queries=5),
        {
            "data": {"type": "pairs", "path": "pairs.jsonl", "held_out": 0.25},
            "trainer": {"type": "dpo"},
            "rollout": {"prompts": 2, "max_new_tokens": 6},
        },
    )
    config["rewards"] = {}
    rows = metrics(rlkl.train(config))
    assert (rows[-1]["step"], rows[-1]["reward/queries"], ended(rows)) == (2, 4, ["queries"])
    whole = metrics(rlkl.train(changed(config, {"train.budget.queries": 6, "name": "whole"})))
    assert (whole[-1]["step"], whole[-1]["reward/queries"]) == (9, 6)  # all six, again and again


@pytest.mark.parametrize(("name", "step"), [("tokens", STEP), ("queries", 4)])
def test_a_cap_below_one_step_is_refused(tiny_config, name, step):
    with pytest.raises(ValueError, match=rf"train.budget.{name}={step - 1}: a single step may take {step}; raise it"):
        settings.load(capped(tiny_config, **{name: step - 1}))
    assert settings.load(capped(tiny_config, **{name: step})).train.budget.steps is None


TAUGHT = {"type": "learned", "path": "facts", "labeller": "rlkl.tasks.facts:prefer", "budget": 100}
JOINT = {
    "type": "counterfactual",
    "scorer": "facts",
    "template_outcome": "{x_prime}{y_prime}",
    "predictor": "joint",
    "outcome": "rlkl.tasks.facts:outcome",
    "budget": 100,
    "start": 0.3,
}


@pytest.mark.parametrize(
    ("source", "before", "step", "most"),
    [
        (TAUGHT, 100, 0, 100),
        ({**TAUGHT, "schedule": "online", "start": 0.2}, 20, 0, 100),
        ({**TAUGHT, "schedule": "online", "start": 0.2, "every": 1}, 20, 2, 100),
        (JOINT, 30, 4, 100),
        ({**JOINT, "every": 2}, 30, 0, 100),
        ({**JOINT, "auditor": "rlkl.tasks.fix:audit"}, 30, 8, 100 + 12 * 4),
        ({**JOINT, "auditor": "somebody/classifier"}, 30, 4, 100),
    ],
)
def test_what_learns_in_the_run_counts_by_its_own_cap(tiny_config, source, before, step, most):
    config = {**changed(tiny_config, {"train.steps": 12}), "rewards": {"source": source}}
    assert labels(settings.load(config), 12) == most
    least = before + step
    said = rf"train.budget.labels={least - 1}: before the first step .* {before}, and that step may take {step}; raise"
    with pytest.raises(ValueError, match=said):
        settings.load(changed(config, {"train.budget.labels": least - 1}))
    assert settings.load(changed(config, {"train.budget.labels": least})).train.budget.labels == least
    watched = {**config, "rewards": {"source": {**source, "weight": 0}, **tiny_config["rewards"]}}
    assert labels(settings.load(watched), 12) == 12 * 4


def test_a_run_that_was_killed_at_its_end_ends_there_again_when_it_is_resumed(tiny_config, monkeypatch):
    config = changed(capped(tiny_config, queries=8), {"save.every": 1})
    whole = rlkl.train({**config, "name": "whole"})

    folder = Path("runs/cut")

    def fails(*_: object) -> None:
        raise OSError("full")

    with monkeypatch.context() as patch, pytest.raises(rlkl.RunError):
        patch.setattr("rlkl.artefacts.save_final", fails)
        rlkl.train({**config, "name": "cut"})
    assert checkpoint.steps(folder) == [1]
    assert metrics(rlkl.train({**config, "name": "cut"}, resume=True)) == metrics(whole)


def test_before_the_first_step_no_cap_is_reached(tiny_config):
    assert budget.reached(build(settings.load(capped(tiny_config, tokens=STEP, queries=4, steps=1)))) is None

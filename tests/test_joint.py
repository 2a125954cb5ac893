"""The joint predictor: it learns what came of samples, the scorer does not; labels are a cap; resumed bit for bit."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tree, metrics
from safetensors.torch import load_file
from test_counterfactual import ROWS, digest, rollout_of, source
from transformers import AutoTokenizer

import rlkl
from rlkl import RunError, models, settings
from rlkl.policy import Policy
from rlkl.rewards.counterfactual import CounterfactualReward
from rlkl.tasks import facts, fix
from rlkl.types import Rollout

asked: list[tuple[str, str]] = []


def observed(x: str, x_prime: str) -> str:
    asked.append((x, x_prime))
    return "good" if len(x_prime) % 2 else "bad"


def nothing(x: str, x_prime: str) -> Any:
    return None


def dead(x: str, x_prime: str) -> str:
    raise ConnectionError("nobody home")


def joint(folder: Path, **keys: Any) -> CounterfactualReward:
    held: Tree = {
        "scorer": str(folder),
        "predictor": "joint",
        "outcome": "test_joint:observed",
        "template_outcome": "{x_prime} is {y_prime}",
        "y_prime": "good",
        "budget": 30,
        "learning_rate": 1e-2,
    }
    model, own = models.from_folder(folder)
    reward = CounterfactualReward("cf", source(**{**held, **keys}))
    reward.check(own)
    reward.bind(Policy(model))
    return reward


def outcomes(reward: CounterfactualReward, rollout: Rollout) -> torch.Tensor:
    """log p of the outcomes that were observed of a rollout, ``[B]``."""
    columns = [{**row, "y_prime": observed("", row["x_prime"])} for row in reward._columns(rollout)]
    return reward._outcome(rollout, columns)


@torch.no_grad()
def test_observed_outcomes_become_likelier_and_the_scorer_stays(tiny_model: Path) -> None:
    rollout = rollout_of(AutoTokenizer.from_pretrained(tiny_model))
    reward, control = joint(tiny_model), joint(tiny_model, **CONTROL)
    scorer, bracket_BT = digest(reward.scorer.reference), reward._bracket(rollout, reward._columns(rollout))
    assert torch.allclose(reward(rollout).value_BT, control(rollout).value_BT, rtol=1e-4, atol=1e-4)
    before_B = outcomes(reward, rollout)
    told = [reward.learn(rollout, step) for step in range(1, 6)]
    after_B = outcomes(reward, rollout)
    assert bool((after_B > before_B + 1).all())
    assert told[0] == {"labels": 3.0, "loss": pytest.approx(float(-before_B.mean()), rel=1e-4)}
    assert [one["loss"] for one in told] == sorted((one["loss"] for one in told), reverse=True)
    assert digest(reward.scorer.reference) == scorer
    assert torch.equal(reward._bracket(rollout, reward._columns(rollout)), bracket_BT)
    paid_B = reward(rollout).value_BT.sum(-1) - control(rollout).value_BT.sum(-1)
    good_B = torch.tensor([observed("", y) == "good" for _, y in ROWS])
    assert bool((paid_B[good_B] > 0).all()) and bool((paid_B[~good_B] < paid_B[good_B].min()).all())
    assert control.learn(rollout, 1) == control.prepare(lambda k: rollout, 0) == control.state_dict() == {}


JOINT: Tree = {
    "type": "counterfactual",
    "template_marginal": "Line:{x_prime}",
    "predictor": "joint",
    "outcome": "test_joint:observed",
    "template_outcome": "{x_prime} is {y_prime}",
    "y_prime": "good",
    "budget": 14,
}
CONTROL: Tree = {"predictor": "control", "outcome": None, "budget": None, "learning_rate": 1e-4}


def test_labels_are_a_cap_shared_by_preparation_and_steps(tiny_model: Path) -> None:
    rollout = rollout_of(AutoTokenizer.from_pretrained(tiny_model))
    reward = joint(tiny_model, budget=10, start=0.5, every=2)
    asked.clear()
    assert reward.prepare(lambda k: rollout, 0)["labels"] == 5 == len(asked)
    told = [reward.learn(rollout, step).get("labels", 0) for step in range(1, 9)]
    assert told == [0, 3, 0, 2, 0, 0, 0, 0] and len(asked) == 10
    assert asked[:3] == [(x, y) for x, y in ROWS] and asked[8:] == [(x, y) for x, y in ROWS[:2]]
    assert joint(tiny_model, start=0).prepare(lambda k: rollout, 0)["labels"] == 0


def test_micro_batches_change_nothing(tiny_model: Path) -> None:
    rollout = rollout_of(AutoTokenizer.from_pretrained(tiny_model))
    states = []
    for size in (1, 64):
        reward = joint(tiny_model, micro_batch=size, learning_rate=1e-3)
        reward.learn(rollout, 1)
        states.append(reward(rollout).value_BT)
    assert torch.allclose(*states, rtol=1e-3, atol=1e-3)


FAILING = [("nothing", "the outcome is None"), ("dead", "the outcome: ConnectionError: nobody home")]


@pytest.mark.parametrize(("function", "said"), FAILING)
def test_an_outcome_that_cannot_be_had_is_named(tiny_model: Path, function: str, said: str) -> None:
    reward = joint(tiny_model, outcome=f"test_joint:{function}")
    with pytest.raises(RunError, match=f"reward cf: sample 0: {said}"):
        reward.learn(rollout_of(AutoTokenizer.from_pretrained(tiny_model)), 1)


@pytest.fixture
def config(tiny_config: Tree, tiny_model: Path) -> Tree:
    cf = {**JOINT, "scorer": str(tiny_model), "learning_rate": 1e-2}
    return {**tiny_config, "rewards": {"cf": cf}, "train": {"steps": 4}, "save": {"every": 1, "keep": 9}}


def test_a_run_counts_its_labels_and_goes_on_from_a_checkpoint_bit_for_bit(config: Tree) -> None:
    whole = rlkl.train(config)
    rows = metrics(whole)
    assert [row["reward/labels"] for row in rows] == [7, 11, 14, 14, 14] and rows[1]["reward/learn/cf/loss"] > 0
    shutil.copytree(whole, "runs/cut")
    shutil.rmtree("runs/cut/final")
    for step in (2, 3):
        shutil.rmtree(f"runs/cut/checkpoints/step_{step}")
    again = rlkl.train(config, ["name=cut"], resume=True)
    assert metrics(again) == rows
    kept, resumed = (load_file(run / "rewards" / "rewards.safetensors") for run in (whole, again))
    assert kept.keys() == resumed.keys() and all(torch.equal(kept[name], resumed[name]) for name in kept)
    assert any(name.startswith("cf/adam.") for name in kept)


def test_what_nothing_learns_from_is_refused(config: Tree) -> None:
    cf = config["rewards"]["cf"]
    for changes, said in (
        ({"predictor": "control"}, "with predictor=control: it learns nothing"),
        ({"budget": None}, "predictor=joint without budget"),
        ({"outcome": None}, "predictor=joint without outcome"),
        ({"template_outcome": None, "y_prime": None}, "predictor=joint without template_outcome"),
        ({"scorer": "reference"}, "predictor=joint with scorer=reference"),
        ({"template_outcome": "{x_prime} is {gold}"}, "y_prime=good without {y_prime} in template_outcome"),
    ):
        with pytest.raises(ValueError, match=said):
            settings.load({**config, "rewards": {"cf": {**cf, **changes}}})
    stored = {"type": "annotated", "path": "x.jsonl"}
    marks = {"type": "annotations", "weights": {"x": -1.0}}
    offline = {
        **config,
        "data": stored,
        "trainer": {"type": "token_likelihood"},
        "kl": {"beta": 0},
        "rollout": {},
        "rewards": {"marks": marks, "cf": {**cf, "weight": 0}},
    }
    with pytest.raises(ValueError, match=r"rewards.cf.predictor=joint with data.type=annotated"):
        settings.load(offline)


def test_outcomes_of_the_embedded_tasks() -> None:
    tried = [f"4{d}011" for d in "123"] + ["70010", "gibberish", ""]
    assert [fix.experiment("0011", y) for y in tried] == [fix.experiment("0011", y) for y in tried]
    xs = [f"{a}{b}{c}{d}" for a in "0123" for b in "0123" for c in "0123" for d in "0123"]
    for tag, law in (("9", fix.MALFORMED), ("7", None)):
        found = [fix.experiment(x, tag + x) == fix.SAYS_PASS for x in xs]
        passes = sum((int(x[0]) + int(x[1])) % 4 != 0 for x in xs)
        expected = 256 * fix.MALFORMED if law else passes * fix.PASS + (256 - passes) * fix.FAIL
        assert abs(sum(found) - expected) < 30
    right = "".join(f" {city} is the capital of {country}." for country, city in list(facts.CAPITALS.items())[:3])
    assert facts.outcome("", right) == "good" and facts.outcome("", " Paris is the capital of Canada.") == "bad"

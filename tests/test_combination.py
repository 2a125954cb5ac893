"""Several sources in one reward: clip, whitening, shares, what counts as a label, and sources that learn."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Tree, metrics
from models import make_rollout
from ranks import vowels
from test_distributed import torchrun
from torch import Tensor

import rlkl
from rlkl import RunError, checkpoint, rewards, settings
from rlkl.rewards import WeightedSum
from rlkl.rewards.spread import Spread
from rlkl.types import Rollout, TokenRewards

ROLLOUT = make_rollout([[5], [6]], [[20, 21, 22], [23, 24]])
DENSE = torch.tensor([[1.0, -2.0, 5.0], [0.5, 0.25, 0.0]])
LAST = torch.tensor([[0.0, 0.0, 3.0], [0.0, 7.0, 0.0]])


def given(value_BT: Tensor) -> Callable[[Rollout], TokenRewards]:
    return lambda rollout: TokenRewards(value_BT, value_BT != 0, queries=len(value_BT), labels=1)


def test_a_batch_at_a_time_the_spread_is_that_of_all_samples() -> None:
    x = torch.randn(50, dtype=torch.float64) * 3 + 100
    spread = Spread()
    assert spread.std == 1
    for part in x.split([1, 7, 30, 12]):
        spread.add(part)
    assert (spread.count, spread.mean) == (50, pytest.approx(float(x.mean()), rel=1e-12))
    assert spread.std == pytest.approx(float(x.std(correction=0)), rel=1e-10)
    constant = Spread()
    constant.add(torch.full((4,), 2.0))
    assert constant.std == 1


def test_rewards_are_clipped_then_divided_by_the_spread_of_their_sums_then_weighed() -> None:
    total = WeightedSum({"d": (given(DENSE), 3.0), "l": (given(LAST), -1.0)}, {"d": 1.5}, {"d": Spread()})
    found = total(ROLLOUT, training=True)
    clipped = DENSE.clamp(-1.5, 1.5)
    std = float(clipped.sum(-1).std(correction=0))
    assert std > 0 and torch.allclose(found.value_BT, 3 / std * clipped - LAST)
    assert torch.equal(found.shares["d"], clipped) and torch.equal(found.shares["l"], LAST)
    assert torch.equal(found.scored_BT, (DENSE != 0) | (LAST != 0))


def test_the_spread_is_learned_from_training_samples_alone() -> None:
    now = [LAST]
    total = WeightedSum({"l": (lambda r: given(now[0])(r), 1.0)}, spreads={"l": Spread()})
    before = total(ROLLOUT).value_BT  # by the batch's own, which is not kept
    assert total.spreads["l"].count == 0 and torch.allclose(before, LAST / 2)
    total(ROLLOUT, training=True)
    now[0] = 10 * LAST
    assert torch.allclose(total(ROLLOUT).value_BT, 10 * LAST / 2) and total.spreads["l"].count == 2
    total(ROLLOUT, training=True)
    expected = np.std([3, 7, 30, 70])
    assert torch.allclose(total(ROLLOUT).value_BT, 10 * LAST / float(expected)) and total.spreads["l"].count == 4


def test_the_spread_begins_anew_when_scores_have_other_units() -> None:
    class Source:
        scale, told = 1.0, 0.0

        def __call__(self, rollout: Rollout) -> TokenRewards:
            return given(self.scale * LAST)(rollout)

        def learn(self, rollout: Rollout, step: int) -> dict[str, float]:
            return {"labels": 1.0, "rows": 1.0, "anew": self.told}

    source = Source()
    total = WeightedSum({"s": (source, 1.0)}, spreads={"s": Spread()})
    first = total(ROLLOUT, training=True).value_BT
    assert total.learn(ROLLOUT, 1) == {"labels": 1.0, "queries": 0.0, "reward/learn/s/rows": 1.0}
    assert total.spreads["s"].count == 2  # it learned nothing new
    source.told, source.scale = 1.0, 100.0
    total.learn(ROLLOUT, 2)
    assert total.spreads["s"].count == 0
    assert torch.allclose(total(ROLLOUT, training=True).value_BT, first) and total.spreads["s"].count == 2


def test_annotations_are_weighed_as_rewards_are() -> None:
    class Marks:
        def __call__(self, rollout: Rollout) -> TokenRewards:
            return given(DENSE)(rollout)

        def annotate(self, rollout: Rollout) -> Rollout:
            from dataclasses import replace

            return replace(rollout, annotation_BT=DENSE, annotated_BT=DENSE != 0)

    total = WeightedSum({"m": (Marks(), 2.0)}, {"m": 2.0}, {"m": Spread()})
    std = float(DENSE.clamp(-2, 2).sum(-1).std(correction=0))
    total(ROLLOUT, training=True)
    assert torch.allclose(total.annotate(ROLLOUT).get("annotation_BT"), 2 * DENSE.clamp(-2, 2) / std)


MIXED: Tree = {
    "varied": {"type": "function", "path": "conftest:varied", "whiten": True, "weight": 2.0},
    "marks": {"type": "annotations", "labeller": "ranks:vowels", "weights": {"good": 1.0, "bad": -0.5}, "clip": 0.75},
    "watched": {"type": "function", "path": "conftest:varied", "weight": 0.0, "whiten": True},
}


def test_dense_and_terminal_rewards_add_up_and_their_shares_to_one(tiny_config: Tree) -> None:
    assert vowels("a1")[0]["label"] == "good"
    rows = metrics(rlkl.train({**tiny_config, "rewards": MIXED, "train": {"steps": 3}}))[1:]
    for row in rows:
        parts = 2.0 / row["reward/std/varied"] * row["reward/train/varied"] + row["reward/train/marks"]
        assert row["reward/train/total"] == pytest.approx(parts, rel=1e-5)
        assert row["reward/train/marks"] != 0 != row["reward/train/varied"]
        assert row["reward/share/marks"] > 0
        assert row["reward/share/varied"] + row["reward/share/marks"] == pytest.approx(1)
        assert "reward/share/watched" not in row
    assert [row["reward/labels"] for row in rows] == [8, 16, 24] == [row["reward/queries"] for row in rows]


def test_only_what_a_person_or_a_stand_in_judges_is_a_label(tiny_config: Tree, tiny_reward_model: Path) -> None:
    scored: Tree = {"rm": {"type": "learned", "path": str(tiny_reward_model)}, "cf": {"type": "counterfactual"}}
    scored["cf"] |= {"template_marginal": "Line:{x_prime}"}
    last = metrics(rlkl.train({**tiny_config, "rewards": scored}))[-1]
    assert (last["reward/queries"], last["reward/labels"]) == (16, 0)
    audited = {"cf": {**scored["cf"], "auditor": "test_combination:audit"}}
    last = metrics(rlkl.train({**tiny_config, "name": "audited", "rewards": audited}))[-1]
    assert (last["reward/queries"], last["reward/labels"]) == (8, 8)


def audit(x: str, x_prime: str | None) -> bool:
    return x_prime is not None and len(x_prime) % 2 == 0


# Sources that learn


class Growing:
    """Pays the number of lessons that it had, and asks a label for each."""

    def __init__(self, name: str, config: Any) -> None:
        self.lessons = torch.zeros(2)
        self.texts: list[str] = []

    def __call__(self, rollout: Rollout) -> TokenRewards:
        value_BT = rollout.policy_mask_BT * (self.lessons.sum() + rollout.tokens_BT % 3)
        return TokenRewards(value_BT, rollout.policy_mask_BT, queries=len(rollout))

    def prepare(self, samples: Callable[[int], Rollout], seed: int) -> dict[str, float]:
        self.texts += [text for k in range(2) for text in samples(k).texts()]
        self.lessons[0] += 1
        return {"labels": 5.0, "texts": float(len(self.texts))}

    def learn(self, rollout: Rollout, step: int) -> dict[str, float]:
        if step == FAILS[0]:
            raise RunError("the labeller left")
        self.lessons[1] += step
        return {"labels": 1.0, "queries": 2.0, "accuracy": 0.5}

    def state_dict(self) -> dict[str, Any]:
        return {"lessons": self.lessons, "texts": self.texts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lessons, self.texts = state["lessons"], state["texts"]


FAILS = [0]


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch, tiny_config: Tree) -> Tree:
    """A run on a source that learns beside one that is whitened."""
    monkeypatch.setitem(rewards.REWARDS, "learned", Growing)
    sources: Tree = {"g": {"type": "learned", "path": "x", "weight": 0.5}, "varied": MIXED["varied"]}
    return {**tiny_config, "rewards": sources, "train": {"steps": 5}, "save": {"every": 2}}


def test_sources_learn_before_the_first_step_and_after_every_one(growing: Tree) -> None:
    rows = metrics(rlkl.train(growing))
    assert (rows[0]["reward/labels"], rows[0]["reward/learn/g/texts"]) == (5, 8)
    assert [row["reward/labels"] for row in rows[1:]] == [
        5 + 5 * n for n in range(1, 6)
    ]  # 4 of the function, 1 of ours
    assert [row["reward/queries"] for row in rows[1:]] == [10 * n for n in range(1, 6)]
    assert rows[2]["reward/learn/g/accuracy"] == 0.5
    watched = metrics(rlkl.train(growing, ["name=watched", "rewards.g.weight=0"]))  # it learns, and costs nothing
    assert watched[-1]["reward/learn/g/accuracy"] == 0.5 and watched[-1]["reward/labels"] == 20
    texts = json.loads(Path("runs/tiny/rewards/rewards.json").read_text())["g"]["texts"]
    assert len(texts) == 8 and len(set(texts)) > 1


def test_what_sources_have_learned_is_resumed_bit_for_bit(growing: Tree) -> None:
    whole = rlkl.train(growing, ["name=whole"])
    FAILS[0] = 4
    try:
        with pytest.raises(RunError, match="step 4: the labeller left"):
            rlkl.train(growing, ["name=cut"])
    finally:
        FAILS[0] = 0
    assert [path.name for path in Path("runs/cut/checkpoints").iterdir()] == ["step_2"]
    again = rlkl.train(growing, ["name=cut"], resume=True)
    assert metrics(again) == metrics(whole)
    assert (again / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    for name in ("rewards.json", "rewards.safetensors"):
        assert (again / "rewards" / name).read_bytes() == (whole / "rewards" / name).read_bytes()


def test_a_checkpoint_without_what_was_learned_is_refused(growing: Tree) -> None:
    folder = rlkl.train(growing, ["train.steps=3"])
    path = folder / "checkpoints" / "step_2"
    assert set(checkpoint.load_rewards(path)) == {"g", "varied"}
    (path / "rewards.json").unlink()
    from rlkl.lane import build

    with pytest.raises(ValueError, match=r"step_2: cannot be read \(its files do not belong together\)"):
        checkpoint.load(build(settings.load(growing, ["train.steps=3"])), folder, 2)


def test_a_finished_run_is_evaluated_with_what_its_sources_have_learned(growing: Tree) -> None:
    from rlkl import runs

    folder = rlkl.train(growing)
    last = metrics(folder)[-1]
    assert runs.evaluate_run(folder, None, None, None)["reward/eval/g"] == pytest.approx(
        last["reward/eval/g"], rel=1e-5
    )


def test_two_processes_whiten_as_one_does(tiny_config: Tree, tmp_path: Path) -> None:
    config = {**tiny_config, "rewards": MIXED, "train": {"steps": 3}}
    config["rollout"] = {**config["rollout"], "prompts": 3}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    torchrun(2, "-m", "rlkl", "train", "config.yaml", "name=two")
    one, two = metrics(rlkl.train(config, ["name=one"])), metrics(tmp_path / "runs" / "two")
    assert len(one) == len(two) == 4
    for ours, theirs in zip(one, two, strict=True):
        known = {name: x for name, x in ours.items() if x is not None}
        assert known == pytest.approx({name: theirs[name] for name in known}, rel=2e-4, abs=1e-5)

"""evaluations.jsonl: every evaluation prompt by prompt, and its KL token by token."""

import hashlib
import json
from pathlib import Path

import pytest
from conftest import Tree, metrics

import rlkl
from rlkl import tracking


@pytest.fixture
def rows(tiny_config: Tree) -> tuple[list[Tree], list[Tree], Path]:
    """The rows of a finished run, its metrics at its evaluations, and its folder."""
    folder = rlkl.train(tiny_config, ["evaluate.prompts=2", "evaluate.samples_per_prompt=3"])
    evaluated = [row for row in metrics(folder) if "kl/sequence" in row]
    return list(tracking.read_rows(folder / "evaluations.jsonl")), evaluated, folder


def test_prompts_are_named_by_their_texts_and_average_to_the_metrics(rows):
    found, evaluated, folder = rows
    assert [row["step"] for row in found] == [row["step"] for row in evaluated]
    for row, whole in zip(found, evaluated, strict=True):
        assert sum(row["kl"]) / 2 == pytest.approx(whole["kl/sequence"], rel=1e-5, abs=1e-12)
        assert sum(row["reward/varied"]) / 2 == pytest.approx(whole["reward/eval/varied"], rel=1e-5)
        assert row["prompts"] == found[0]["prompts"]
        assert len(row["reward/varied"]) == len(set(row["prompts"])) == 2
    shown = [json.loads(line)["prompt"] for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert hashlib.sha256(shown[0].encode()).hexdigest()[:12] == found[0]["prompts"][0]


def test_kl_by_position_is_over_the_samples_that_reach_it(rows):
    found, evaluated, _ = rows
    for row, whole in zip(found, evaluated, strict=True):
        total = sum(kl * n for kl, n in zip(row["kl_position"], row["reached"], strict=True))
        assert total == pytest.approx(6 * whole["kl/sequence"], rel=1e-5, abs=1e-12)
        assert sum(row["reached"]) == pytest.approx(6 * whole["policy/eval/length"])
        assert row["reached"] == sorted(row["reached"], reverse=True)
        assert row["reached"][0] == 6
    assert max(found[-1]["kl_position"]) > 0


def test_what_is_not_finite_is_null(tmp_path):
    tracking.Tracker(tmp_path).evaluation(3, {"prompts": ["a"], "kl": [float("nan")], "reached": [1]})
    assert (
        tmp_path / "evaluations.jsonl"
    ).read_text() == '{"step": 3, "prompts": ["a"], "kl": [null], "reached": [1]}\n'

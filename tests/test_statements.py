"""What is stated of arms, from evaluations that are written here by hand: summary.json, summary.csv, summary.md."""

import csv
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Tree
from test_compare import base

from rlkl.grid import plan, results, statements, tables
from rlkl.statistics import coverage, intervals, pairwise

GAINS = {"reinforce": 1.0, "ppo": 2.0}
"""Gold by arm: this times the root of KL, and a hundredth of the seed; prompts are a tenth above and below."""
KLS = (0.0, 1.0, 4.0)


def write(run: plan.Run, diverges: bool = False, until: float = KLS[-1]) -> None:
    """A finished run whose gold is linear in the root of KL up to a KL, and its proxy twice that."""
    run.folder.mkdir(parents=True)
    gain, seed = GAINS[run.of], run.config.seed
    lines, evaluations = [], []
    for step, kl in enumerate((*KLS[:-1], until)):
        gold = 0.5 + (gain + 0.01 * seed) * math.sqrt(kl)
        lines.append(
            {
                "step": step,
                "kl/sequence": kl,
                "reward/eval/letters": None if diverges and step == 2 else gold,
                "reward/eval/parity": 2 * gold,
                "tokens/generated": 100 * step,
                "reward/labels": 10 * step * gain,
                "time/step": 3.0,
                "policy/eval/entropy": 2.0 - step,
            }
        )
        by = {"prompts": ["a", "b", "c", "b"], "reward/letters": [gold - 0.1, gold, gold + 0.1, gold]}
        evaluations.append({"step": step, **by, "kl_position": [kl, kl / 2], "reached": [4, 2]})
    for name, rows in (("metrics", lines), ("evaluations", evaluations)):
        (run.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> plan.Plan:
    """Two arms of four seeds, trained on letters and parity; gold is letters."""
    monkeypatch.chdir(tmp_path)
    tree = {
        "name": "two",
        "base": base(Path("model")),
        "arms": {"reinforce": {}, "ppo": {"trainer": {"type": "ppo", "epochs": 2}}},
        "seeds": [0, 1, 2, 3],
        "columns": ["time/step", "policy/eval/entropy"],
    }
    return plan.make(tree)


def read(made: plan.Plan, **more: Any) -> tuple[Tree, dict[str, results.Result]]:
    """The summary as it comes back from its file, and the runs' results."""
    config = made.config
    found = {}
    for run in made.runs:
        weights = statements.proxy(run.config, made.gold)
        found[run.config.name] = results.read(
            run.folder, run.arm, run.config.seed, made.gold, config.match_kl, config.columns, weights
        )
    summary: Tree = json.loads(json.dumps(statements.summary(made, found, **more)))
    return summary, found


def test_a_cell_holds_means_and_intervals_with_the_coverage_that_was_measured(made):
    for run in made.runs:
        write(run)
    summary, _ = read(made)
    golds = [0.5 + (1 + 0.01 * seed) * 2 for seed in range(4)]
    cell = summary["arms"]["reinforce"]["gold"]
    assert (cell["n"], cell["mean"], cell["iqm"]) == (4, pytest.approx(sum(golds) / 4), pytest.approx(2.53))
    assert (cell["min"], cell["max"]) == (golds[0], golds[3])
    interval = intervals.interval(golds)
    assert interval is not None
    assert [cell["interval"][k] for k in ("low", "high")] == pytest.approx(list(interval))
    assert cell["interval"]["method"] == "t"
    held = coverage.MEASURED["mean, t"]
    assert cell["interval"]["coverage"] == {"seeds": 4, "normal": held["normal"][4], "least": held["collapse"][4]}
    assert cell["iqm_interval"]["coverage"]["normal"] == coverage.MEASURED["iqm, t"]["normal"][4]
    entropy = summary["arms"]["ppo"]["collapse"]["policy/eval/entropy"]
    assert (entropy["before"]["mean"], entropy["after"]["mean"]) == (2, 0)
    assert summary["arms"]["ppo"]["collapse"]["policy/eval/self_bleu"] == {"before": None, "after": None}
    assert summary["arms"]["ppo"]["kl_position"] == {"kl": [4, 2], "reached": [16, 8]}


def test_coverage_between_simulated_numbers_is_that_of_fewer():
    assert coverage.measured("mean, t", 6)[0] == 5
    assert coverage.measured("mean, t", 1000) == (20, {k: v[20] for k, v in coverage.MEASURED["mean, t"].items()})
    with pytest.raises(ValueError, match="n=2; it was measured from 3 seeds on"):
        coverage.measured("mean, t", 2)


def test_arms_are_set_side_by_side_where_they_match(made):
    for run in made.runs:
        write(run)
    summary, _ = read(made)
    matched = summary["matched"]
    assert [place["at"] for place in matched["kl"]] == [1, 2]  # no run gets to 5
    at = matched["kl"][1]["arms"]
    assert at["ppo"]["mean"] == pytest.approx(0.5 + 2.015 * math.sqrt(2))
    assert [place["at"] for place in matched["gold"]] == [1.51, 2.53, 3.54]  # 0.5 to 4.56
    reached = matched["gold"][1]["arms"]
    assert reached["ppo"]["n"] == 4
    assert reached["ppo"]["min"] == pytest.approx((2.03 / 2.03) ** 2)
    assert reached["reinforce"]["n"] == 2  # seeds 2 and 3 get to 2.54 and 2.56
    assert [place["at"] for place in matched["labels"]] == [20]
    assert matched["labels"][0]["arms"]["ppo"]["mean"] == pytest.approx(0.5 + 2.015)  # half of what it asks for
    assert matched["tokens"][0]["arms"]["reinforce"]["mean"] == pytest.approx(0.5 + 1.015 * 2)
    assert matched["queries"] == []


def test_pairs_are_compared_over_seeds_and_over_prompts(made):
    for run in made.runs:
        write(run)
    summary, _ = read(made)
    (pair,) = summary["pairs"]
    one, other = ([0.5 + (gain + 0.01 * seed) * 2 for seed in range(4)] for gain in (1, 2))
    seeds = pairwise.difference(one, other)
    assert (pair["a"], pair["b"], pair["n"]) == ("reinforce", "ppo", [4, 4])
    assert (pair["difference"], pair["p"]) == (pytest.approx(2), pytest.approx(seeds.p))
    assert pair["interval"] == pytest.approx(list(seeds.interval or ()))
    assert pair["improvement"] == 1
    assert pair["improvement_interval"] == pytest.approx(list(pairwise.newcombe(1, 4, 4)))
    # Every prompt gains 2 with every seed; the two records of prompt b are one prompt.
    assert pair["prompts"] == {"n": 3, "difference": pytest.approx(2), "interval": pytest.approx([2, 2])}
    assert pair["p_holm"] == pair["p"]  # two arms make one test a place


def test_holm_corrects_the_pairs_of_a_question_together():
    pairs = pairwise.corrected([{"p": p} for p in (0.01, 0.04, None, 0.03)])
    assert [pair["p_holm"] for pair in pairs] == [pytest.approx(0.03), pytest.approx(0.06), None, pytest.approx(0.06)]


def test_at_a_matched_kl_its_pairs_are_the_tables_and_are_tested_once(made):
    for run in made.runs:
        write(run)
    config = made.config.model_copy(update={"match_kl": 2.25})
    summary, _ = read(plan.Plan(config, made.gold, made.runs))
    assert [place["at"] for place in summary["matched"]["kl"]] == [1, 2, 2.25]
    assert summary["pairs"] == summary["matched"]["kl"][2]["pairs"]
    assert summary["pairs"][0]["difference"] == pytest.approx(1.5)
    assert summary["pairs"][0]["prompts"]["difference"] == pytest.approx(1.5)
    assert summary["pairs"][0]["p_holm"] == summary["pairs"][0]["p"]
    assert summary["area"]["limit"] == 2.25


def test_laws_are_fitted_to_gains_of_gold_and_of_what_is_trained_on(made):
    for run in made.runs:
        write(run)
    summary, _ = read(made)
    assert summary["proxy"] == {"reinforce": ["letters", "parity"], "ppo": ["letters", "parity"]}
    fits = summary["arms"]["ppo"]["fits"]
    assert fits["gold"]["quadratic"]["alpha"] == pytest.approx(2.015)  # least squares: the mean of the seeds
    assert fits["gold"]["quadratic"]["beta"] == pytest.approx(0, abs=1e-9)
    assert len(fits["gold"]["quadratic"]["residuals"]) == 12
    assert fits["proxy"]["logarithmic"]["alpha"] == pytest.approx(2 * 2.015)  # letters and half of parity
    only = statements.proxy(made.runs[0].config.model_copy(update={"rewards": {}}), "letters")
    assert only == {}


def test_areas_are_shares_of_the_range_or_of_the_exact_frontier(made):
    for run in made.runs:
        write(run)
    summary, _ = read(made)
    assert summary["area"] == {"limit": 4, "normaliser": "range", "low": 0.5, "high": pytest.approx(4.56)}
    mine = summary["arms"]["ppo"]
    assert mine["area"]["mean"] == pytest.approx(0.5 + 2.015)
    assert mine["area_share"]["mean"] == pytest.approx(2.015 / 4.06)
    exact = [{"beta": None, "kl": 0.0, "gold": 0.5}, {"beta": 1.0, "kl": 1.0, "gold": 4.5}]
    summary, _ = read(made, exact=exact)
    assert summary["area"]["normaliser"] == "exact"
    assert summary["area"]["high"] == pytest.approx((2.5 + 4.5) / 2)  # level from its last point on
    assert summary["arms"]["ppo"]["area_share"]["mean"] == pytest.approx(2.015 / 3)
    assert summary["exact"] == exact


def test_one_run_that_barely_moves_does_not_decide_how_far_areas_go(made):
    """Of eight runs six get to 4 nats, one to 1, one to 9: the median is 4, the short one is level from 1 on."""
    far = {"reinforce,seed=0": 1.0, "ppo,seed=0": 9.0}
    for run in made.runs:
        write(run, until=far.get(run.config.name, 4.0))
    summary, _ = read(made)
    assert summary["area"]["limit"] == 4
    areas = {name: run["area"] for name, run in summary["runs"].items()}
    assert areas["reinforce,seed=0"] == pytest.approx(((0.5 + 1.5) / 2 * 1 + 1.5 * 1) / 2)
    assert areas["ppo,seed=0"] == pytest.approx(0.5 + 2)
    assert summary["arms"]["reinforce"]["area"]["n"] == summary["arms"]["reinforce"]["area_share"]["n"] == 4
    exact = [{"beta": None, "kl": 0.0, "gold": 0.5}, {"beta": 1.0, "kl": 16.0, "gold": 4.5}]
    summary, _ = read(made, exact=exact)
    assert (summary["area"]["limit"], summary["area"]["high"]) == (4, pytest.approx((0.5 + 2.5) / 2))
    assert summary["arms"]["ppo"]["area_share"]["n"] == 4


def test_levels_of_gold_are_rounded_to_its_range(made):
    """512.3 to 512.9 keeps three levels; a gold that does not vary has none."""

    def levels(low: float, high: float) -> list[float]:
        line = [{"kl": 0.0, "gold": low}, {"kl": 1.0, "gold": high}]
        done = [results.Result("a", seed, "x", values={"gold": high}, frontier=line) for seed in range(3)]
        return [row["at"] for row in statements._matched_gold({"a": done}, done)]

    assert levels(512.3, 512.9) == [512.45, 512.6, 512.75]
    assert levels(0.0, 100.0) == [25, 50, 75]
    assert levels(-3000, 1000) == [-2000, -1000, 0]
    assert levels(0.1, 0.1) == levels(0.0, 0.0) == levels(2.0, 1.0) == []


def test_a_run_that_diverges_is_in_nothing_and_the_rest_is_stated(made):
    for run in made.runs:
        write(run, diverges=run.config.name in ("ppo,seed=0", "ppo,seed=1"))
    summary, _ = read(made)
    ppo = summary["arms"]["ppo"]
    assert (ppo["runs"], ppo["finished"], ppo["gold"]["n"], ppo["gold"]["interval"]) == (4, 2, 2, None)
    assert "diverged" in summary["runs"]["ppo,seed=0"]["error"]
    (pair,) = summary["pairs"]
    assert (pair["n"], pair["interval"], pair["p"], pair["p_holm"]) == ([4, 2], None, None, None)
    assert pair["improvement"] == 1
    text = tables.markdown(summary)
    assert "(95 % t interval, or least–most of fewer than 3)" in text


def test_where_every_run_failed_there_is_still_a_summary(made):
    found = {run.config.name: results.Result(run.arm, run.config.seed, "x", "it broke") for run in made.runs}
    summary = statements.summary(made, found)
    assert summary["arms"]["ppo"]["finished"] == 0
    assert (summary["pairs"], summary["area"], summary["matched"]["gold"]) == ([], None, [])
    assert tables.markdown(summary).startswith("# two")
    assert tables.comma_separated(summary).count("\n") == 1
    assert statements.timing(made, found)["runs"]["ppo,seed=0"] is None


def test_seconds_stand_apart(made):
    for run in made.runs:
        write(run)
    summary, found = read(made)
    timing = statements.timing(made, found)
    assert timing["arms"]["ppo"]["seconds"]["mean"] == 9
    assert timing["arms"]["ppo"]["time/step"]["mean"] == 3
    assert "time/" not in json.dumps(summary)
    assert summary["arms"]["ppo"]["policy/eval/entropy"]["mean"] == 0


def test_the_markdown_says_what_its_intervals_are(made):
    for run in made.runs:
        write(run)
    summary, _ = read(made)
    text = tables.markdown(summary)
    gold = summary["arms"]["ppo"]["gold"]
    (low, high), (left, right) = ([gold[of][k] for k in ("low", "high")] for of in ("interval", "iqm_interval"))
    mean, middle = f"4.530 ({low:.3f} to {high:.3f})", f"4.530 ({left:.3f} to {right:.3f})"
    assert f"| ppo | 4/4 | {mean} | {middle} | 0.500 | 4.000 |" in text
    assert "Of 4 seeds, 95 % intervals of this kind held in 96 % of simulations with normal seeds and in 81 %" in text
    assert "## letters at matched KL" in text
    assert "## KL in nats at matched letters" in text
    assert "| ppo − reinforce | +2.000 (" in text
    assert all(line.count("|") in (0, *range(3, 12)) for line in text.splitlines())


def test_the_markdown_says_why_runs_are_missing_what_ended_them_what_differs_and_how_arms_were_tuned(made):
    for run in made.runs:
        write(run)
    summary, _ = read(made)
    heads = ("Runs without a result", "Budgets", "Differences that nobody stated", "Runs spent on choosing settings")
    assert not any(f"## {head}" in tables.markdown(summary) for head in heads)
    summary["runs"]["ppo,seed=2"]["error"] = "step 2: the gradient\nnorm is nan"
    summary["runs"]["ppo,seed=1"]["ended"] = summary["runs"]["ppo,seed=3"]["ended"] = "labels"
    summary |= {"budgets": {"labels": 2560, "tokens": 1234567.0}, "tuning": {"reinforce": None, "ppo": 7}}
    summary |= {"flags": [{"key": "credit.gamma", "values": {"reinforce": 1.0, "ppo": 0.9}}]}
    notes = tables.markdown(summary).split(f"## {heads[0]}")[1]
    assert [line for line in notes.splitlines() if line] == [
        "- ppo,seed=2: step 2: the gradient norm is nan",
        "## Budgets",
        "- every run has at most 2,560 labels",
        "- every run has at most 1,234,567 tokens",
        "- ppo: 2 of 4 runs ended by the budget of labels",
        "## Differences that nobody stated",
        "- arms differ in credit.gamma: 1.0 (reinforce), 0.9 (ppo); if that is what you compare, list it under "
        "compared, else make it equal",
        "## Runs spent on choosing settings",
        "- reinforce: not said",
        "- ppo: 7",
    ]


def test_the_markdown_counts_runs_that_never_get_to_the_matched_kl(made):
    made = plan.Plan(made.config.model_copy(update={"match_kl": 2.0}), made.gold, made.runs)
    for run in made.runs:
        write(run, until=1.5 if run.config.name == "ppo,seed=1" else 4.0)
    summary, _ = read(made)
    assert "## Runs without a result\n\n- ppo: 3 of 4 finished runs get to 2 nats\n" in tables.markdown(summary)


def test_a_range_below_0_is_no_row_of_dashes():
    few = {"mean": -0.2, "min": -0.3, "max": -0.1, "interval": None}
    assert tables.estimate(few) == "-0.200 (-0.300 to -0.100)"
    assert tables.estimate(few | {"mean": 0.2, "min": 0.1, "max": 0.3}) == "0.200 (0.100–0.300)"
    assert tables.estimate(few | {"mean": -1e-9, "min": -1e-9, "max": 0.1}) == "0.000 (0.000 to 0.100)"


def test_the_csv_has_a_row_a_cell(made):
    for run in made.runs:
        write(run)
    summary, _ = read(made)
    rows = list(csv.DictReader(io.StringIO(tables.comma_separated(summary))))
    (row,) = [r for r in rows if (r["at"], r["arm"], r["quantity"]) == ("end", "ppo", "letters")]
    cell = summary["arms"]["ppo"]["gold"]
    assert float(row["mean"]) == cell["mean"]
    assert (float(row["low"]), float(row["iqm_high"])) == (cell["interval"]["low"], cell["iqm_interval"]["high"])
    assert {r["at"] for r in rows} == {
        "end",
        "kl=1",
        "kl=2",
        "gold=1.51",
        "gold=2.53",
        "gold=3.54",
        "labels=20",
        "tokens=200",
    }


def test_the_summary_is_the_same_whatever_the_hashes_of_texts(made, tmp_path):
    """Python's sets of texts have another order in every process."""
    for run in made.runs:
        write(run)
    tree = json.dumps(made.config.model_dump(mode="json"))
    code = (
        "import json, sys; from rlkl.grid import plan; import test_statements as t;"
        f"made = plan.make(json.loads({tree!r})); print(json.dumps(t.read(made)[0]))"
    )
    said = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        said.append(done.stdout)
    assert said[0] == said[1]
    assert json.loads(said[0])["arms"]["ppo"]["gold"]["n"] == 4

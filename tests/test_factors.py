"""What one factor does, the rest being equal, on results that are written here by hand."""

import pytest

from rlkl.grid.factors import effects
from rlkl.grid.results import Result
from rlkl.statistics import pairwise

GOLD = {
    "ppo,source=score,beta=0.1": [1.0, 2.0, 4.0],
    "ppo,source=marks,beta=0.1": [3.0, 3.0, 3.0],
    "dpo,source=score,beta=0.1": [0.0, 0.0, 1.0],
    "likelihood,source=marks,beta=0.1": [5.0, 4.0, 6.0],
}


def mine(gold: dict[str, list[float | None]]) -> dict[str, list[Result]]:
    return {
        arm: [Result(arm, seed, "", values={"gold": x}) for seed, x in enumerate(each)] for arm, each in gold.items()
    }


def asked(gold: dict[str, list[float | None]]) -> dict[str, dict[tuple[str, str], dict]]:
    found = effects(mine(gold), lambda r: r.values["gold"])
    return {one["factor"]: {(pair["a"], pair["b"]): pair for pair in one["pairs"]} for one in found}


def test_values_are_compared_where_the_rest_is_equal():
    found = asked(GOLD)
    assert list(found) == ["arm", "source"]  # one beta
    assert set(found["arm"]) == {("ppo", "dpo"), ("ppo", "likelihood")}  # dpo and likelihood share no source
    dpo = found["arm"]["ppo", "dpo"]
    assert (dpo["cells"], dpo["of"], dpo["n"]) == (1, 1, 3)
    seen = pairwise.paired([-1, -2, -3])
    assert (dpo["difference"], dpo["interval"], dpo["p"]) == (-2, pytest.approx(seen.interval), pytest.approx(seen.p))
    assert dpo["p_holm"] == pytest.approx(min(1, 2 * seen.p)) and dpo["p_holm"] > dpo["p"]
    (source,) = found["source"].values()
    assert (source["difference"], source["p_holm"]) == (pytest.approx((2 + 1 - 1) / 3), source["p"])


def test_differences_are_averaged_over_the_other_factors_seed_by_seed():
    more = {name.replace("0.1", "0.2"): [x + 10 + k for k, x in enumerate(row)] for name, row in GOLD.items()}
    more["dpo,source=score,beta=0.2"] = [0.0, 0.0, 0.0]
    found = asked(GOLD | more)
    dpo = found["arm"]["ppo", "dpo"]
    changes = [(a + b) / 2 for a, b in zip([-1, -2, -3], [-11, -13, -16], strict=True)]
    assert (dpo["cells"], dpo["of"], dpo["difference"]) == (2, 2, pytest.approx(sum(changes) / 3))
    assert dpo["interval"] == pytest.approx(pairwise.paired(changes).interval)
    assert found["beta"]["0.1", "0.2"]["cells"] == 4


def test_a_combination_counts_only_where_all_its_runs_have_a_result():
    more = {name.replace("0.1", "0.2"): [x, x, x] for name, (x, *_) in GOLD.items()}
    more["dpo,source=score,beta=0.2"] = [0.0, None, 0.0]
    found = asked(GOLD | more)
    assert (found["arm"]["ppo", "dpo"]["cells"], found["arm"]["ppo", "dpo"]["of"]) == (1, 2)
    assert found["arm"]["ppo", "dpo"]["difference"] == -2
    gone = asked({name: [None, *row[1:]] if name.startswith("dpo") else row for name, row in GOLD.items()})
    assert ("ppo", "dpo") not in gone["arm"]


def test_a_failed_run_has_no_result():
    runs = mine(GOLD)
    runs["dpo,source=score,beta=0.1"][1] = Result("dpo,source=score,beta=0.1", 1, "", "its loss is not finite")
    arm = next(one for one in effects(runs, lambda r: r.values["gold"]) if one["factor"] == "arm")
    assert [(pair["a"], pair["b"]) for pair in arm["pairs"]] == [("ppo", "likelihood")]


def test_where_one_factor_is_varied_the_pairs_of_arms_say_it_all():
    assert asked({"a,beta=0.1": [1.0, 2.0, 3.0], "a,beta=0.2": [2.0, 2.0, 3.0]}) == {}
    assert asked({"a": [1.0, 2.0, 3.0], "b": [2.0, 2.0, 3.0]}) == {}

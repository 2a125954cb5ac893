"""The answers of a comparison's page, in words, and the numbers in them."""

import re
from pathlib import Path

import pytest
from reports import PROXY, TWO, alike, compared, rewrite, steady

from rlkl.grid import tables
from rlkl.report.answers import answers
from rlkl.report.build import report
from rlkl.report.load import load
from rlkl.report.words import Answer, cell, difference, listed, many, nats, number, signed, versus

FALL = "Is gold lost while the proxy still rises?"
PENALTY = "What does the KL penalty buy?"


def asked(folder: Path) -> dict[str, str]:
    """Questions and answers of one comparison."""
    return {one.question: " ".join([one.answer, *one.points]) for one in answers(load([folder]))}


def answer(folder: Path, question: str) -> Answer:
    """One answer of a comparison."""
    (found,) = [one for one in answers(load([folder])) if one.question == question]
    return found


def spoil(folder: Path, *runs: str) -> None:
    """Runs that ended with a loss that was not finite."""
    for run in runs:
        (folder / run / "final/README.md").unlink()
        (folder / run / "error.txt").write_text("Traceback\nRunError: step 7: the loss is not finite\n")


def stretch(folder: Path, run: str, scale: float) -> None:
    """A run that goes this much further, with the same gold at every evaluation."""
    rewrite(folder / run, lambda row: {**row, "kl/sequence": scale * row["kl/sequence"]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compared(tmp_path_factory.mktemp("runs"), TWO, [0, 1, 2], steady)


def test_the_best_arm_is_named_with_interval_and_probability(folder):
    found = asked(folder)
    said = found["Which arm gets the most gold at 1 nat?"]
    assert said.startswith("high, with 0.500 [0.475, 0.525]: shown to be above low")
    assert "+0.100 [" in said and "probability of improvement 1 [" in said
    assert found["Which arm gets the most gold at 5 nats?"].startswith("No run gets there; the furthest is one of ")


def test_no_difference_is_said_in_words(tmp_path):
    found = asked(compared(tmp_path, TWO, [0, 1, 2], alike))
    assert found["Which arm gets the most gold at 1 nat?"].startswith("No difference can be told: high has the highest")


def test_fewer_than_three_seeds_have_no_interval_and_say_so(tmp_path):
    folder = compared(tmp_path, TWO, [0, 1], steady)
    said = asked(folder)["Which arm gets the most gold at 1 nat?"]
    assert said.startswith(
        "high has the highest mean, 0.495 (0.490–0.500); nothing is shown about other seeds: too few"
    )
    page = report([folder], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "There are fewer than 3 seeds" in page and "held the true mean" not in page


def test_the_penalty_is_weighed_within_arms_that_differ_in_beta_alone(tmp_path):
    folder = compared(tmp_path, TWO, [0, 1, 2], alike, axes={"kl.beta": [0.05, 0.2]})
    said = answer(folder, PENALTY)
    assert [point.partition(":")[0] for point in said.points] == [
        "low, β from 0.05 to 0.2",
        "high, β from 0.05 to 0.2",
    ]
    assert said.points[0].startswith(
        "low, β from 0.05 to 0.2: KL at the end goes from 4 [4, 4] to 4 [4, 4] nats (equal"
    )
    assert "At equal KL, gold: no difference can be told in 2." in said.answer


def test_a_question_is_corrected_for_its_own_pairs_and_no_others(tmp_path):
    """Four arms make six pairs a place, two of which differ in beta alone."""
    shift = {"low,beta=0.05": 0.0, "low,beta=0.2": 0.1, "high,beta=0.05": 0.0, "high,beta=0.2": 0.1}

    def law(arm: str, seed: int, kl: float) -> float:
        return 0.3 + shift[arm] * kl**0.5 + 0.02 * (seed - 1)

    data = load([compared(tmp_path, TWO, [0, 1, 2], law, axes={"kl.beta": [0.05, 0.2]})])
    (said,) = [one for one in answers(data) if one.question == "What does the KL penalty buy?"]
    at = next(place for place in data.summary["matched"]["kl"] if place["at"] == 2)
    (pair,) = [p for p in at["pairs"] if (p["a"], p["b"]) == ("low,beta=0.05", "low,beta=0.2")]
    assert f"p\u00a0=\u00a0{number(2 * pair['p'])} after Holm" in said.points[0]


def test_factors_are_told_apart_the_rest_being_equal(tmp_path):
    def law(arm: str, seed: int, kl: float) -> float:
        worth = 0.2 * arm.startswith("high") + 0.001 * seed * arm.startswith("high")
        return 0.3 + worth * kl**0.5 + 0.05 * seed + (0.04 + 0.001 * seed**2) * arm.endswith("0.2")

    folder = compared(tmp_path, TWO, [0, 1, 2], law, axes={"kl.beta": [0.05, 0.2]})
    found = {one.question: one for one in answers(load([folder]))}
    arms = found["Which arm gets the most gold, the rest being equal?"]
    void = " At 5 nats no combination has results of both."
    assert arms.answer == f"high is above low at 1 nat, 2 nats and the end. 3 of 3 tested differences are shown.{void}"
    assert arms.points[0] == "at 1 nat: high is above low by 0.201"
    assert next(iter(found)) == arms.question
    assert arms.details[0].startswith("at 1 nat, high against low: +0.201 [+0.1")
    assert "in 2 of 2 combinations" in arms.details[0]
    betas = found["Which value of β gets the most gold, the rest being equal?"]
    assert betas.points[-1] == "at the end: β 0.2 is above β 0.05 by 0.042"
    assert not any(
        "the rest being equal" in question for question in asked(compared(tmp_path / "b", TWO, [0, 1, 2], law))
    )


def test_where_one_arm_overtakes_another_is_found_between_two_budgets(tmp_path):
    def crossing(arm: str, seed: int, kl: float) -> float:
        budget = float(arm.split("queries=")[1])
        better = (budget > 250) == arm.startswith("high")
        return 0.3 + (0.2 if better else 0.1) * kl**0.5 + 0.002 * (seed - 1)

    folder = compared(tmp_path, TWO, [0, 1, 2], crossing, axes={"train.budget.queries": [100, 200, 300, 400]})
    said = answer(folder, "At what budget of queries does one of low and high overtake the other?")
    assert said.answer == (
        "high overtakes low between 200 and 300 queries. Gold is read at the end of training."
        " Warning: low ends with the very same gold and KL at 100 and 200, at 300 and 400 queries: "
        "these budgets do not bind."
        " Warning: high ends with the very same gold and KL at 100 and 200, at 300 and 400 queries: "
        "these budgets do not bind."
    )
    assert said.points[0].startswith(
        "100 queries: low 0.700 [0.695, 0.705] at 4 nats, high 0.500 [0.495, 0.505] at 4 nats"
    )
    assert [point.rpartition("; ")[2] for point in said.points] == [
        "low leads",
        "low leads",
        "high leads",
        "high leads",
    ]


def test_an_arm_that_is_overtaken_in_its_turn_is_said_to_be(tmp_path):
    def law(arm: str, seed: int, kl: float) -> float:
        better = ("labels=200" in arm) == arm.startswith("high")
        return 0.3 + (0.2 if better else 0.1) * kl**0.5 + 0.002 * (seed - 1)

    folder = compared(tmp_path, TWO, [0, 1, 2], law, axes={"train.budget.labels": [100, 200, 300]})
    said = answer(folder, "At what budget of labels does one of low and high overtake the other?").answer
    turns = "high overtakes low between 100 and 200; low overtakes high between 200 and 300 labels."
    assert said.startswith(turns)


def test_budgets_are_compared_at_the_end_whatever_kl_is_matched(tmp_path):
    """At 1 nat, the matched KL, runs of every budget are the same; later they are not."""

    def law(arm: str, seed: int, kl: float) -> float:
        budget = float(arm.split("labels=")[1])
        worth = budget if arm.startswith("high") else 250
        return 0.3 + 0.002 * (seed - 1) + (0.0005 * worth if kl > 1 else 0.0)

    axes = {"train.budget.labels": [100, 200, 300, 400]}
    folder = compared(tmp_path, TWO, [0, 1, 2], law, axes=axes, match_kl=1)
    said = answer(folder, "At what budget of labels does one of low and high overtake the other?")
    assert said.answer.startswith(
        "high overtakes low between 200 and 300 labels. Gold is read at the end of training, not at match_kl."
    )
    assert "low ends with the very same gold and KL at 100, 200, 300 and 400 labels" in said.answer
    assert "high ends" not in said.answer
    assert "high 0.350 [0.345, 0.355] at 4 nats" in said.points[0]


def test_the_penalty_is_read_at_the_end_whatever_kl_is_matched(tmp_path):
    """Of the larger beta one run gets to the matched 2 nats; all end somewhere."""
    folder = compared(tmp_path, {"a": {}}, [0, 1, 2], steady, axes={"kl.beta": [0.05, 0.2]}, match_kl=2)
    for seed, scale in enumerate((0.2, 0.25, 0.55)):
        stretch(folder, f"a,beta=0.2,seed={seed}", scale)
    said = answer(folder, PENALTY)
    assert said.points[0].startswith("a, β from 0.05 to 0.2: KL at the end goes from 4 [4, 4] to 1.33 [0, 3.21] nats")
    assert "gold there from 0.500 [0.475, 0.525] to 0.500 [0.475, 0.525]" in said.points[0]


def test_less_kl_is_shown_where_seeds_tell_it_and_else_in_mean(tmp_path):
    folder = compared(tmp_path, TWO, [0, 1, 2], steady, axes={"kl.beta": [0.05, 0.2]})
    for seed, (clear, vague) in enumerate([(0.3, 0.2), (0.31, 0.95), (0.32, 1.3)]):
        stretch(folder, f"low,beta=0.2,seed={seed}", clear)
        stretch(folder, f"high,beta=0.2,seed={seed}", vague)
    said = answer(folder, PENALTY)
    assert said.answer.startswith("Less KL at the end: shown in 1 of 2 cases, in mean in 1 more.")
    assert "nats (less, shown)" in said.points[0]
    assert "nats (less in mean, no difference can be told)" in said.points[1]
    assert "low,beta=0.2 against low,beta=0.05, KL at the end: −2.760 [" in said.details[0]


def test_the_penalty_over_all_cases_is_a_ratio_seed_by_seed(tmp_path):
    folder = compared(tmp_path, TWO, [0, 1, 2], steady, axes={"kl.beta": [0.05, 0.2]})
    for seed, scale in enumerate((0.4, 0.5, 0.625)):
        stretch(folder, f"low,beta=0.2,seed={seed}", scale)
        stretch(folder, f"high,beta=0.2,seed={seed}", scale)
    said = answer(folder, PENALTY).answer  # exp(ln .5 ± 4.303 · ln 1.25 / √3)
    assert "seed by seed, the largest β leaves 0.500 [0.287, 0.870] of the KL of the least" in said


def test_a_beta_without_a_result_is_named(tmp_path):
    folder = compared(tmp_path, TWO, [0, 1], steady, axes={"kl.beta": [0.01, 0.05, 0.2]})
    spoil(folder, "low,beta=0.01,seed=0", "low,beta=0.01,seed=1")
    said = answer(folder, PENALTY)
    assert said.points[0].startswith("low, β from 0.05 to 0.2: ")
    assert said.answer.endswith(" low,beta=0.01 (2 diverged) has no result.")


def hacked(arm: str, seed: int, kl: float) -> float:
    """``high`` peaks at 2 nats, ``low`` never."""
    return 0.5 + 0.2 * kl - (0.05 + 0.001 * seed) * kl**2 * arm.startswith("high") + 0.01 * seed


def test_gold_that_falls_under_a_rising_proxy_is_reported(tmp_path):
    arms = {arm: {**changes, **PROXY} for arm, changes in TWO.items()}
    folder = compared(tmp_path, arms, [0, 1, 2], hacked)
    said = answer(folder, FALL)
    assert said.answer == "Shown in 1 of 2 arms: high (by 0.212)."
    assert said.points[0].startswith(
        "high: gold falls by 0.212 [0.182, 0.242] from its best evaluation (at 2 nats) to the end, the proxy rises by 4"
    )
    assert said.points[0].endswith("; gold falls while the proxy rises in 3 of 3 runs, shown")
    assert said.points[1].startswith("low: none, every run ends where the others of its arm are best")
    page = report([folder], tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.search(r"quadratic fit of gold peaks at 1\.\d+ nats", page.replace("\n", " "))


def test_the_luck_of_a_best_evaluation_is_no_fall(tmp_path):
    """Every run peaks somewhere else: its own best is above its end, the best of the others is not."""

    def law(arm: str, seed: int, kl: float) -> float:
        return 0.5 + (0.1 + 0.001 * seed) * (kl == seed + 1) + 0.02 * (kl == 4)

    said = answer(compared(tmp_path, {"a": PROXY}, [0, 1, 2], law), FALL)
    assert said.answer.startswith("In no arm: none ends, in mean, with less gold than at its best evaluation")
    assert said.points[0].startswith("a: none in mean, gold changes by 0.020 [0.020, 0.020] and the proxy by ")
    assert said.points[0].endswith("; gold falls while the proxy rises in 0 of 3 runs")


def test_a_proxy_that_was_never_measured_is_no_good_news(tmp_path):
    arms = {arm: {**changes, **PROXY} for arm, changes in TWO.items()}
    folder = compared(tmp_path, arms, [0, 1, 2], hacked)
    spoil(folder, *(f"high,seed={seed}" for seed in range(3)))
    said = answer(folder, FALL)
    assert said.answer.endswith("Not measured: high (3 diverged).")
    assert [point.partition(":")[0] for point in said.points] == ["low"]
    for seed in range(3):
        rewrite(folder / f"low,seed={seed}", lambda row: {k: x for k, x in row.items() if k != "reward/eval/proxy"})
    assert answer(folder, FALL).answer == "It was not measured: no finished run has its proxy in its evaluations."


def test_arms_of_which_runs_diverged_are_ranked_with_their_count(tmp_path):
    arms = {**TWO, "gone": {"optimiser": {"learning_rate": 0.5}}}
    folder = compared(tmp_path, arms, [0, 1, 2, 3], steady)
    spoil(folder, "high,seed=0", "low,seed=3", *(f"gone,seed={seed}" for seed in range(4)))
    said = answer(folder, "Which arm gets the most gold at 1 nat?")
    assert said.answer.startswith("high, with 0.510 [0.485, 0.535], in 3 of 4 runs (1 diverged): shown to be above low")
    assert "Runs without a result count in no mean: of low (1 diverged)." in said.answer
    assert said.answer.endswith(" gone (4 diverged) has no result.")
    assert said.points[1].endswith(", in 3 of 4 runs (1 diverged)")
    assert said.points[2] == "gone: no result (4 diverged)"


def test_one_lucky_run_that_gets_there_does_not_hide_what_is_shown(tmp_path):
    folder = compared(tmp_path, {**TWO, "lucky": {"optimiser": {"learning_rate": 0.5}}}, [0, 1, 2], steady)
    for seed in (0, 1):
        stretch(folder, f"lucky,seed={seed}", 0.2)
    rewrite(folder / "lucky,seed=2", lambda row: {**row, "reward/eval/gold": 0.9})
    said = answer(folder, "Which arm gets the most gold at 1 nat?")
    assert said.answer.startswith(
        "lucky has the highest mean, 0.900, in 1 of 3 runs; nothing is shown about other seeds"
    )
    assert (
        " Of the 2 arms with 3 runs or more there: high, with 0.500 [0.475, 0.525]: shown to be above low"
        in said.answer
    )


def test_a_matched_kl_that_no_run_gets_to_is_named(tmp_path):
    folder = compared(tmp_path, TWO, [0, 1, 2], steady, match_kl=4.5)
    said = answer(folder, "Which arm gets the most gold at 4.5 and 5 nats?").answer
    assert said == "No run gets there; the furthest is one of low, at 4 nats."


def test_arms_that_are_equal_are_said_to_be(tmp_path):
    said = answer(
        compared(tmp_path, TWO, [0, 1, 2], lambda arm, seed, kl: 0.0), "Which arm gets the most gold at 1 nat?"
    )
    assert said.answer == "The arms are equal: both have a mean of 0."
    assert said.details[0].startswith("low against high: 0.000, not tested (their seeds do not differ)")


def test_arms_whose_seeds_do_not_differ_are_not_tested(tmp_path):
    def law(arm: str, seed: int, kl: float) -> float:
        return 0.4 + 0.1 * arm.startswith("high")

    said = answer(compared(tmp_path, TWO, [0, 1, 2], law), "Which arm gets the most gold at 1 nat?")
    assert said.answer == (
        "high has the highest mean, 0.500 [0.500, 0.500]; nothing is shown about other seeds: "
        "not tested (their seeds do not differ)."
    )


def test_many_arms_are_a_list_and_the_sentence_stays_short(tmp_path):
    arms = {f"a{k:02}": {"optimiser": {"learning_rate": 1e-4 * (k + 1)}} for k in range(18)}

    def law(arm: str, seed: int, kl: float) -> float:
        return 0.3 + 0.001 * int(arm[1:3]) + 0.05 * seed

    said = answer(compared(tmp_path, arms, [0, 1, 2], law), "Which arm gets the most gold at 2 nats?")
    assert [point.partition(":")[0] for point in said.points] == [f"a{k:02}" for k in reversed(range(18))]
    assert (
        len(said.answer) < 400
        and said.details[-1] == "p-values are corrected for all 153 pairs of arms that are tested."
    )


def test_a_factor_names_the_runs_that_have_no_result(tmp_path):
    folder = compared(tmp_path, TWO, [0, 1, 2], alike, axes={"kl.beta": [0.05, 0.2]})
    spoil(folder, "high,beta=0.2,seed=1")
    said = answer(folder, "Which arm gets the most gold, the rest being equal?")
    assert "are left out (without a result: of high,beta=0.2 (1 diverged))." in said.answer
    assert ", in 1 of 2 combinations" in said.details[0]


def test_values_of_a_factor_that_share_no_combination_are_named(tmp_path):
    axes = {"kl.beta": [0.05, 0.1, 0.2]}
    exclude = [{"arm": "low", "kl.beta": 0.2}, {"arm": "high", "kl.beta": [0.05, 0.1]}]
    folder = compared(tmp_path, TWO, [0, 1, 2], alike, axes=axes, exclude=exclude)
    said = answer(folder, "Which value of β gets the most gold, the rest being equal?").answer
    assert "Nothing can be said of 0.05 and 0.2; 0.1 and 0.2: no combination of the rest has results of both." in said


def test_places_where_a_factor_is_not_compared_are_named(tmp_path):
    folder = compared(tmp_path, TWO, [0, 1, 2], alike, axes={"kl.beta": [0.05, 0.2]})
    for seed in (0, 1, 2):
        stretch(folder, f"low,beta=0.2,seed={seed}", 2.0)
    question = "Which arm gets the most gold, the rest being equal?"
    assert answer(folder, question).answer.endswith(" At 5 nats no combination has results of both.")
    assert " At 1 nat no" not in answer(folder, question).answer


def test_runs_that_are_the_same_up_to_a_place_are_named_in_a_factor(tmp_path):
    folder = compared(tmp_path, TWO, [0, 1, 2], steady, axes={"train.budget.labels": [160, 640]})
    for seed in (0, 1, 2):
        rewrite(
            folder / f"low,labels=160,seed={seed}",
            lambda row: {**row, "reward/eval/gold": row["reward/eval/gold"] / (1 + (row["step"] > 10))},
        )
    details = answer(folder, "Which arm gets the most gold, the rest being equal?").details
    assert "at 1 nat: low,labels=160 and low,labels=640 are the same runs up to there" in details
    assert "at the end: high,labels=160 and high,labels=640 are the same runs up to there" in details
    assert not any(text.startswith("at the end: low") for text in details)


def test_a_comparison_of_two_arms_reads_both_ways():
    pair = {
        "a": "one",
        "b": "two",
        "n": [3, 4],
        "difference": 0.2,
        "interval": [0.1, 0.4],
        "p": 0.01,
        "p_holm": 0.02,
        "improvement": 0.9,
        "improvement_interval": [0.6, 0.95],
        "prompts": {"n": 8, "difference": 0.2, "interval": [0.1, 0.3]},
    }
    turned = versus([pair], "two", "one")
    assert turned is not None
    assert turned["interval"] == [-0.4, -0.1]
    assert turned["improvement"] == pytest.approx(0.1)
    assert turned["improvement_interval"] == pytest.approx([0.05, 0.4])
    assert turned["prompts"]["interval"] == [-0.3, -0.1]
    assert versus([pair], "one", "two") == pair
    assert versus([pair], "one", "three") is None


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (None, "–"),
        (0, "0"),
        (1.0, "1"),
        (0.5, "0.500"),
        (1.234, "1.23"),
        (123.4, "123.4"),
        (2560.0, "2,560"),
        (1e-5, "1.0e−05"),
        (-0.25, "−0.250"),
        (-0.0, "0"),
        (999.96, "1,000"),
        (99.996, "100.0"),
        (0.9996, "1.00"),
    ],
)
def test_numbers_read_well(x, said):
    assert number(x) == said


def test_what_rounds_to_nothing_beside_its_neighbours_is_nothing_and_else_keeps_its_digits():
    assert [number(1.6e-8, beside) for beside in ((), (2e-8,), (-0.007, 0.007))] == ["1.6e−08", "1.6e−08", "0.000"]
    noise = {"n": 3, "mean": 1.6e-8, "interval": {"low": -0.007, "high": 0.007}}
    assert cell(noise) == "0.000 [−0.007, 0.007]"
    below = {"n": 1, "mean": -1e-9, "min": -1e-9, "max": -1e-9}
    assert [cell(below, name) for name in ("gold", "kl")] == ["−1.0e−09", "0"]
    assert nats(1e-9) == "0.000 nats"


def test_page_and_terminal_cut_intervals_alike_at_what_a_quantity_can_be():
    wide = {"n": 3, "mean": 7.285, "min": 1, "max": 12, "interval": {"low": -5.115, "high": 19.685}}
    assert (cell(wide, "kl"), tables.estimate(wide, "kl_end")) == ("7.29 [0, 19.68]", "7.285 (0.000 to 19.685)")
    assert (cell(wide), tables.estimate(wide)) == ("7.29 [−5.12, 19.68]", "7.285 (-5.115 to 19.685)")
    even = {"n": 3, "mean": 0.9, "min": 0.8, "max": 1.0, "interval": {"low": 0.7, "high": 1.1}}
    assert tables.estimate(even, "policy/eval/self_bleu") == "0.900 (0.700 to 1.000)"
    assert tables.estimate({"n": 1, "mean": -1e-9, "min": -1e-9, "max": -1e-9, "interval": None}, "kl") == "0.000"


def test_many_names_are_counted():
    assert listed(["a"]) == "a"
    assert listed(list("abcd")) == "a, b, c and d"
    assert listed(list("abcdef")) == "a, b, c and 3 more"


def test_units_and_signs_read_well():
    assert [nats(x) for x in (1, 2, 0.7, 0.9999999, 3.4567)] == ["1 nat", "2 nats", "0.7 nats", "1 nat", "3.46 nats"]
    assert [many(n, "run") for n in (0, 1, 2)] == ["0 runs", "1 run", "2 runs"]
    assert [signed(x) for x in (0.1, -0.1, -1e-5, 0.0)] == ["+0.100", "−0.100", "0.000", "0.000"]
    assert cell({"n": 2, "mean": -0.1, "min": -0.3, "max": 0.1}) == "−0.100 (−0.300 to 0.100)"
    few = {"n": [2, 3], "difference": -1e-9, "interval": None, "p_holm": None}
    assert difference(few) == "0.000, too few seeds to test"

"""The answers of a comparison's page, in words, and the numbers in them."""

from pathlib import Path

import pytest
from reports import TWO, alike, compared, steady

from rlkl.report.answers import answers
from rlkl.report.build import report
from rlkl.report.load import load
from rlkl.report.words import listed, number, versus


def asked(folder: Path) -> dict[str, str]:
    """Questions and answers of one comparison."""
    return {one.question: " ".join([one.answer, *one.points]) for one in answers(load([folder]))}


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
        "high has the highest mean, 0.495 (0.490–0.500). With 2 seeds in an arm there is no interval"
    )
    page = report([folder], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "There are fewer than 3 seeds" in page and "held the true mean" not in page


def test_the_penalty_is_weighed_within_arms_that_differ_in_beta_alone(tmp_path):
    folder = compared(tmp_path, TWO, [0, 1, 2], alike, axes={"kl.beta": [0.05, 0.2]})
    said = asked(folder)["What does the KL penalty buy?"]
    assert "low,beta=0.05 → low,beta=0.2 (β from 0.05 to 0.2): KL at the end goes from 4 " in said
    assert "high,beta=0.05 → high,beta=0.2" in said
    assert "low,beta=0.05 → high" not in said
    assert "At equal KL, gold: no difference can be told in 2." in said


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
    assert arms.answer == "3 of 3 differences are shown."
    assert arms.points[0] == "at 1 nat high is above low by 0.201"
    assert arms.details[0].startswith("at 1 nat, high against low: +0.201 [+0.1")
    assert "in 2 of 2 combinations" in arms.details[0]
    betas = found["Which beta gets the most gold, the rest being equal?"]
    assert betas.points[-1] == "at the end beta 0.2 is above beta 0.05 by 0.042"
    assert not any(
        "the rest being equal" in question for question in asked(compared(tmp_path / "b", TWO, [0, 1, 2], law))
    )


def test_where_one_arm_overtakes_another_is_found_between_two_budgets(tmp_path):
    def crossing(arm: str, seed: int, kl: float) -> float:
        budget = float(arm.split("queries=")[1])
        better = (budget > 250) == arm.startswith("high")
        return 0.3 + (0.2 if better else 0.1) * kl**0.5 + 0.002 * (seed - 1)

    folder = compared(tmp_path, TWO, [0, 1, 2], crossing, axes={"train.budget.queries": [100, 200, 300, 400]})
    said = asked(folder)["At what label budget does one of low and high overtake the other?"]
    assert said.startswith("high overtakes low between 200 and 300 labels: at 100 labels low leads; at 200 labels low")


def test_gold_that_falls_under_a_rising_proxy_is_reported(tmp_path):
    def hacked(arm: str, seed: int, kl: float) -> float:
        return 0.5 + 0.2 * kl - (0.08 if arm.startswith("high") else 0.0) * kl**2 + 0.001 * seed

    proxy = {"type": "function", "path": "rlkl.tasks.facts:gold"}
    arms = {arm: {**changes, "rewards": {"gold": {"weight": 0}, "proxy": proxy}} for arm, changes in TWO.items()}
    folder = compared(tmp_path, arms, [0, 1, 2], hacked)
    said = asked(folder)["Is gold lost while the proxy still rises?"]
    assert said.startswith("high: in 3 of 3 runs, by 0.600 on average after the best evaluation, at 1 nat")
    assert "low" not in said
    page = report([folder], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "quadratic fit of gold peaks at 0.540 nats" in page.replace("\n", " ")


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
        (1e-5, "1.0e-05"),
    ],
)
def test_numbers_read_well(x, said):
    assert number(x) == said


def test_many_names_are_counted():
    assert listed(["a"]) == "a"
    assert listed(list("abcd")) == "a, b, c and d"
    assert listed(list("abcdef")) == "a, b, c and 3 more"

"""Every statistic on cases worked out by hand, and what holds of it whatever the numbers."""

import json
import math
import statistics as plain
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlkl.statistics import coverage, diversity, frontier, intervals, overoptimisation, pairwise

numbers = st.integers(-1000, 1000).map(lambda k: k / 100)
seeds = st.lists(numbers, min_size=3, max_size=8)
METHODS = ("t", "bca", "percentile")


def test_the_interquartile_mean_weighs_values_by_what_lies_between_the_quartiles():
    assert float(intervals.iqm([9, 1, 2])) == pytest.approx((1 + 4 * 2 + 9) / 6)
    assert float(intervals.iqm([1, 2, 4, 5])) == 3  # the middle two
    assert float(intervals.iqm([1, 2, 4, 5, 100])) == pytest.approx(0.3 * 2 + 0.4 * 4 + 0.3 * 5)
    assert float(intervals.iqm([0.25])) == 0.25
    assert intervals.iqm([[1, 2, 9], [0, 0, 6]]).tolist() == pytest.approx([3, 1])


def test_the_t_interval_is_students():
    half = 4.302652729911275 * 1 / math.sqrt(3)  # t of 2 degrees of freedom; the standard deviation is 1
    assert intervals.interval([1.0, 2.0, 3.0]) == pytest.approx((2 - half, 2 + half))


def test_the_t_interval_of_the_interquartile_mean_is_the_jackknifes():
    """IQM of 1, 2, 9 is 3; without one of them the mean of the others: pseudo-values 9 - 2 (5.5, 5, 1.5)."""
    pseudo = [-2.0, -1.0, 6.0]
    half = 4.302652729911275 * plain.stdev(pseudo) / math.sqrt(3)
    assert intervals.interval([9, 1, 2], of="iqm") == pytest.approx((3 - half, 3 + half))


def test_the_percentile_bootstrap_of_three_is_their_range():
    """All three draws are the least with probability 1/27, which is more than 2.5 %."""
    assert intervals.interval([0.5, 2.0, 1.0], "percentile") == (0.5, 2.0)


def test_bca_leans_to_the_long_tail():
    row = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 8.0]
    plain_, leaning = (intervals.interval(row, method) for method in ("percentile", "bca"))
    assert plain_ is not None
    assert leaning is not None
    assert leaning.high > plain_.high
    assert leaning.low > plain_.low


@pytest.mark.parametrize("method", METHODS)
def test_fewer_than_three_seeds_have_no_interval(method):
    assert intervals.interval([1.0, 2.0], method) is None
    assert intervals.interval([1.0, 1.0, 1.0], method) == (1.0, 1.0)


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="nan among the values; leave diverged runs out"):
        intervals.interval([1.0, math.nan, 2.0])
    with pytest.raises(ValueError, match="inf among the values"):
        pairwise.difference([1.0, 2.0, 3.0], [1.0, math.inf, 2.0])


@settings(deadline=None, max_examples=30)
@given(seeds, st.randoms(use_true_random=False), st.sampled_from(METHODS), st.sampled_from(["mean", "iqm"]))
def test_intervals_know_no_order_and_scale_with_the_values(row, shuffle, method, of):
    mixed = shuffle.sample(row, len(row))
    low, high = intervals.interval(row, method, of) or (0, 0)
    assert intervals.interval(mixed, method, of) == pytest.approx((low, high), abs=1e-9)
    assert intervals.interval([4 * x for x in row], method, of) == pytest.approx((4 * low, 4 * high), abs=1e-9)
    assert min(row) - 1e-9 <= float(intervals.STATISTICS[of](row)) <= max(row) + 1e-9


@settings(deadline=None)
@given(seeds, st.sampled_from(["mean", "iqm"]))
def test_the_t_interval_holds_its_point(row, of):
    low, high = intervals.interval(row, of=of) or (1, 0)
    assert low <= float(intervals.STATISTICS[of](row)) <= high


def test_coverage_is_what_theory_says():
    """Percentile bootstrap of 3: the range of 3 holds the median with probability 1 - 2/8."""
    assert coverage.coverage("percentile", 3, trials=1000) == pytest.approx(0.75, abs=0.045)
    assert coverage.coverage("t", 3, trials=4000) == pytest.approx(0.95, abs=0.012)
    assert coverage.coverage("t", 5, trials=500, seed=1) == coverage.coverage("t", 5, trials=500, seed=1)
    assert coverage.coverage("t", 5, trials=500, seed=1) != coverage.coverage("t", 5, trials=500, seed=2)
    with pytest.raises(ValueError, match="law=lucky; give 2 seeds or more, and one of normal, skewed, collapse"):
        coverage.coverage("t", 3, "lucky")


@pytest.mark.parametrize(("law", "cells"), [("normal", 1), ("collapse", 4)])
def test_the_interval_that_is_simulated_of_a_factor_is_the_one_that_is_stated(law, cells):
    """By the same draws, one set of seeds after the other."""
    import numpy as np

    (drawn,) = coverage._pieces(coverage.LAWS[law], (200, 2 * cells * 3), 0)
    stated = []
    for one, other in drawn.reshape(200, 2, cells, 3):
        found = pairwise.paired([float(x) for x in (other - one).mean(0)]).interval
        stated.append(found is not None and found.low <= 0 <= found.high)
    assert coverage.coverage_of_paired(3, law, cells, trials=200) == np.mean(stated)
    name = law if cells == 1 else f"{law}, {cells} combinations"
    assert coverage.coverage_of_paired(3, law, cells) == coverage.MEASURED["difference, paired t"][name][3]
    assert coverage.coverage_of_paired(3, "normal", cells) == pytest.approx(0.95, abs=0.012)


def test_the_laws_are_what_they_say():
    """Mean and interquartile mean of each, by the midpoints of many quantiles."""
    import numpy as np

    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    for law in coverage.LAWS.values():
        values = law.quantile(u)
        assert values.mean() == pytest.approx(law.mean, abs=1e-4)
        assert values[250_000:750_000].mean() == pytest.approx(law.iqm, abs=1e-5)
        assert (np.diff(values) >= 0).all()


def test_the_difference_is_welchs():
    """[1, 2, 3] and [4, 5, 7]: variances 1 and 7/3 over 3 seeds; Welch's degrees of freedom by hand."""
    a, b = 1 / 3, 7 / 9
    freedom = (a + b) ** 2 / (a**2 / 2 + b**2 / 2)
    found = pairwise.difference([1, 2, 3], [4, 5, 7])
    assert found.difference == pytest.approx(10 / 3)
    from scipy import stats

    half = stats.t.ppf(0.975, freedom) * math.sqrt(a + b)
    assert found.interval == pytest.approx((10 / 3 - half, 10 / 3 + half))
    assert found.p == pytest.approx(2 * stats.t.sf(10 / 3 / math.sqrt(a + b), freedom))
    few, level = pairwise.difference([1, 2], [4, 5, 7]), pairwise.difference([1, 1, 1], [2, 2, 2])
    assert (few.interval, few.p) == (None, None)
    assert level == (1.0, None, None)


def test_paired_changes_are_students():
    """[1, 2, 4]: mean 7/3, variance 7/3, so that t is the root of 7."""
    from scipy import stats

    found = pairwise.paired([1, 2, 4])
    half = stats.t.ppf(0.975, 2) * math.sqrt(7) / 3
    assert found.interval == pytest.approx((7 / 3 - half, 7 / 3 + half))
    assert found.p == pytest.approx(2 * stats.t.sf(math.sqrt(7), 2))
    assert pairwise.paired([1, 2]) == (1.5, None, None) and pairwise.paired([2, 2, 2]) == (2.0, None, None)


def test_the_probability_of_improvement_counts_pairs():
    assert pairwise.improvement([1, 2, 3], [2, 3, 4]) == pytest.approx((3 + 2.5 + 1.5) / 9)
    assert pairwise.improvement([1], [2, 0]) == 0.5


def test_the_interval_of_an_improvement_solves_its_equation():
    """All 9 pairs won: (1 - x)^2 = z^2 x (1 - x) (1 + 2 ((1-x)/(2-x) + x/(1+x))) / 9 at the lower bound."""
    low, high = pairwise.improvement_interval([1, 2, 3], [4, 5, 6]) or (0, 0)
    spread = low * (1 - low) * (1 + 2 * ((1 - low) / (2 - low) + low / (1 + low))) / 9
    assert high == 1
    assert 1 - low == pytest.approx(1.959963984540054 * math.sqrt(spread))
    assert 0.4 < low < 0.6
    assert pairwise.improvement_interval([1, 2], [4, 5, 6]) is None


@given(seeds, seeds)
def test_improvements_mirror_each_other(a, b):
    there, back = pairwise.improvement(a, b), pairwise.improvement(b, a)
    assert there + back == pytest.approx(1)
    low, high = pairwise.improvement_interval(a, b) or (2, 2)
    assert 0 <= low <= there + 1e-8
    assert there - 1e-8 <= high <= 1
    assert pairwise.improvement_interval(b, a) == pytest.approx((1 - high, 1 - low), abs=1e-6)


@given(seeds, seeds)
def test_differences_mirror_each_other(a, b):
    there, back = pairwise.difference(a, b), pairwise.difference(b, a)
    assert there.difference == pytest.approx(-back.difference)
    if there.interval and back.interval:
        assert there.interval == pytest.approx((-back.interval.high, -back.interval.low), abs=1e-6)
        assert there.interval.low <= there.difference <= there.interval.high
        assert there.p == pytest.approx(back.p)


def test_prompts_are_paired_by_name():
    a = {"x": 0.0, "y": 1.0, "z": 0.5, "only here": 9.0}
    b = {"z": 0.7, "x": 0.2, "y": 1.2, "only there": -9.0}
    found = pairwise.prompts(a, b)
    assert found is not None
    assert found.difference == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.2, 0.2))  # every prompt gains the same, however far apart they are
    assert pairwise.prompts({"x": 1, "y": 2}, {"x": 1, "y": 2}) is None
    wide = pairwise.prompts(dict.fromkeys("abcd", 0.0), {"a": 0.0, "b": 1.0, "c": 0.0, "d": 1.0})
    assert wide is not None
    assert wide.interval is not None
    assert wide.interval.low < 0.5 < wide.interval.high
    assert wide.p == pytest.approx(0.18169, abs=1e-5)  # t = 0.5 / (0.57735 / 2) = sqrt 3, 3 degrees of freedom


def test_holm_by_hand():
    assert pairwise.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert pairwise.holm([0.6, 0.5]) == [1.0, 1.0]
    assert pairwise.holm([]) == []
    with pytest.raises(ValueError, match=r"p=1\.2 is no p-value"):
        pairwise.holm([0.1, 1.2])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_holm_is_monotone_and_knows_no_order(p, shuffle):
    adjusted = pairwise.holm(p)
    assert all(x <= y <= 1 and y <= len(p) * x + 1e-12 for x, y in zip(p, adjusted, strict=True))
    pairs = sorted(zip(p, adjusted, strict=True))
    assert [y for _, y in pairs] == sorted(adjusted)
    order = shuffle.sample(range(len(p)), len(p))
    assert pairwise.holm([p[i] for i in order]) == pytest.approx([adjusted[i] for i in order])


def test_the_first_passage_of_a_kl_is_linear_in_its_root():
    assert frontier.crossing([0, 1, 4, 1, 9], 2.25) == (2, pytest.approx(0.5))  # sqrt: 1 -> 2, at 1.5
    assert frontier.crossing([0, 1, 4], 1) == (1, 1.0)
    assert frontier.crossing([3, 4], 1) == (0, 1.0)
    assert frontier.crossing([0, 1, 4], 4.1) is None
    assert frontier.at_kl([0, 1, 4], [0, 1, 3], 2.25) == 2
    assert frontier.at_kl([0, 1, 4], [0, 1, 3], 5) is None
    assert frontier.at_kl([3, 4], [7, 8], 1) == 7


def test_the_kl_at_which_a_reward_is_first_reached():
    assert frontier.at_reward([0, 1, 4], [0, 1, 3], 2) == pytest.approx(2.25)
    assert frontier.at_reward([0, 1, 4, 9], [0, 1, 0, 3], 1) == 1
    assert frontier.at_reward([0, 1, 4], [0, 1, 3], 3.1) is None
    assert frontier.at_reward([-1e-9, 4], [1, 2], 0.5) == 0


def test_the_reward_at_a_price_is_linear_in_it():
    assert frontier.at_spent([0, 100, 300], [0, 1, 5], 200) == 3
    assert frontier.at_spent([0, 100], [0, 1], 101) is None
    assert frontier.at_spent([0, 100], [2, 1], 0) == 2
    assert frontier.at_spent([50, 50, 50], [2, 3, 4], 50) == 4  # all of it before the first step
    assert frontier.at_spent([50, 50, 80], [2, 3, 9], 65) == 6
    assert frontier.at_spent([50, 80], [2, 9], 10) == 2


def test_the_area_is_the_mean_height_over_the_root_of_kl():
    assert frontier.area([0, 4], [0, 2], 4) == pytest.approx(1)  # a straight line over 0..2
    assert frontier.area([0, 4], [0, 2], 1) == pytest.approx(0.5)
    assert frontier.area([0, 1, 4], [0, 1, 1], 4) == pytest.approx((0.5 + 1) / 2)
    # Back to d = 0.5 and out again along 1 + (d - 0.5) 2/3, which counts from d = 1 on: 5/3 in the mean.
    assert frontier.area([0, 1, 0.25, 4], [0, 1, 1, 2], 4) == pytest.approx((0.5 + 5 / 3) / 2)
    assert frontier.area([1, 4], [3, 3], 2) == pytest.approx(3)
    # Level from its furthest evaluation on: 0 to 2 over 0..2, then 2 up to 3; not the last one's 7.
    assert frontier.area([0, 4, 1], [0, 2, 7], 9) == pytest.approx((2 * 1 + 1 * 2) / 3)
    assert frontier.area([1, 4], [3, 5], 16) == pytest.approx((1 * 3 + 1 * 4 + 2 * 5) / 4)
    assert frontier.area([0, 0, -0.1], [1, 2, 3], 4) == 1  # it never moved
    with pytest.raises(ValueError, match="limit=0 nats; give a KL above 0"):
        frontier.area([0, 1], [1, 1], 0)
    assert frontier.share(0.75, 0.5, 1.0) == 0.5
    assert frontier.share(0.75, 0.5, 0.5) is None


lines = st.lists(st.tuples(st.integers(0, 400).map(lambda k: k / 100), numbers), min_size=2, max_size=9)


@given(lines, st.integers(1, 400).map(lambda k: k / 100))
def test_the_area_is_that_of_the_matched_rewards(line, limit):
    """The mean of the interpolated reward over even steps of the root of KL."""
    kls, rewards = [0.0] + [kl for kl, _ in line], [0.0] + [reward for _, reward in line]
    found = frontier.area(kls, rewards, limit)
    steps, level = 2000, rewards[kls.index(max(kls))]
    heights = [frontier.at_kl(kls, rewards, limit * ((k + 0.5) / steps) ** 2) for k in range(steps)]
    assert found == pytest.approx(sum(level if h is None else h for h in heights) / steps, abs=0.03)
    assert min(rewards) - 1e-9 <= found <= max(rewards) + 1e-9


def test_both_laws_of_over_optimisation_are_found_again():
    kls = [0.0, 1.0, 4.0, 9.0]
    one = overoptimisation.quadratic(kls, [d * (2 - 0.3 * d) for d in (0, 1, 2, 3)])
    other = overoptimisation.logarithmic(kls, [0.0, *(d * (2 - 0.9 * math.log(d)) for d in (1, 2, 3))])
    assert one is not None
    assert other is not None
    assert (one.alpha, one.beta, one.n) == (pytest.approx(2), pytest.approx(0.3), 4)
    assert one.peak_kl == pytest.approx((2 / 0.6) ** 2)
    assert (other.alpha, other.beta) == (pytest.approx(2), pytest.approx(0.9))
    assert other.peak_kl == pytest.approx(math.exp(2 * (2 / 0.9 - 1)))
    for fit in (one, other):
        assert fit.rms == pytest.approx(0, abs=1e-12)
        assert fit.r2 == pytest.approx(1)


def test_residuals_are_what_a_law_leaves():
    """R = 0, 1, 0, 1 at d = 0, 1, 1, 2: least squares of d (alpha - beta d) by its normal equations, by hand.

    sum d^2 = 6, d^3 = 10, d^4 = 18, R d = 3, R d^2 = 5: alpha = (54 - 50) / 8 = 1/2, beta = -(30 - 30) / 8 = 0.
    """
    fit = overoptimisation.quadratic([0, 1, 1, 4], [0, 1, 0, 1])
    assert fit is not None
    assert (fit.alpha, fit.beta) == (pytest.approx(0.5), pytest.approx(0))
    assert fit.residuals == pytest.approx([0, 0.5, -0.5, 0])
    assert fit.rms == pytest.approx(math.sqrt(0.5 / 4))
    assert fit.r2 == pytest.approx(1 - 0.5 / 1)


def test_what_does_not_determine_a_law_has_none():
    assert overoptimisation.quadratic([0, 1, 1], [0, 1, 2]) is None
    assert overoptimisation.logarithmic([0, 1], [0, 1]) is None
    flat = overoptimisation.quadratic([0, 1, 4], [0, 0, 0])
    assert flat is not None
    assert (flat.r2, flat.peak_kl) == (None, None)
    with pytest.raises(ValueError, match="2 KLs and 1 rewards"):
        overoptimisation.quadratic([0, 1], [0])


def test_distinct_ngrams_by_hand():
    assert diversity.distinct([[1, 2, 3], [1, 2]], 1) == pytest.approx(3 / 5)
    assert diversity.distinct([[1, 2, 3], [1, 2]], 2) == pytest.approx(2 / 3)
    assert diversity.distinct([[1]], 2) == 0


def test_self_bleu_by_hand():
    assert diversity.self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx(1)
    assert diversity.self_bleu([[1, 2], [3, 4]]) == 0
    assert diversity.self_bleu([[1, 2, 3]]) == 0
    assert diversity.self_bleu([[1, 2, 3], [1, 2, 4]], 2) == pytest.approx(math.sqrt(2 / 3 * 1 / 2))
    # 1 1 1 against 1 1 2: clipped at two of the three; back, 1 1 of three.
    assert diversity.self_bleu([[1, 1, 1], [1, 1, 2]], 1) == pytest.approx(4 / 6)
    # Lengths 1 and 3 against 3 and 1 need no penalty; 2 and 4, 4 of them against 3, 3, 3, 2 do not either.
    assert diversity.self_bleu([[1], [1, 1, 1]], 1) == pytest.approx(2 / 4)
    # Two of length 1 have each other, one of length 3 the nearest is 1: 5 tokens against 3.
    assert diversity.self_bleu([[1], [1], [1, 2, 3]], 1) == pytest.approx(3 / 5)
    # Three of 2 tokens and one of 1: its nearest is 2, so 7 tokens stand against 8.
    assert diversity.self_bleu([[1, 2], [1, 2], [1, 2], [1]], 1) == pytest.approx(math.exp(1 - 8 / 7))


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_self_bleu_is_a_share_and_knows_no_order(rows, shuffle):
    assume(any(rows))
    value = diversity.self_bleu(rows)
    assert 0 <= value <= 1 + 1e-12
    assert diversity.self_bleu(shuffle.sample(rows, len(rows))) == pytest.approx(value)


def test_the_coverage_that_is_printed_is_the_measured_one():
    path = Path(__file__).parents[1] / "benchmarks" / "baselines" / "coverage.json"
    measured = json.loads(path.read_text(encoding="utf-8"))
    for name, laws in coverage.MEASURED.items():
        assert {law: {str(n): x for n, x in by.items()} for law, by in laws.items()} == measured[name]

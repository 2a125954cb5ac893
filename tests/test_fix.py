"""The numbers of the task `fix`, enumerated: all 32,768 strings, float64."""

import subprocess
import sys

import numpy as np
import pytest

from rlkl.tasks import fix

X = fix.EXAMPLE
FIXES, COSMETICS = fix.true_fixes(X), fix.cosmetics(X)
LAW, MARGINAL = fix.law(X), fix.marginal()
PMI = LAW - MARGINAL
GIBBERISH = fix.index(fix.GIBBERISH)


def test_the_laws_are_laws_and_the_strings_are_counted() -> None:
    assert len(fix.STRINGS) == 32_768 and tuple(fix.STRINGS[GIBBERISH]) == fix.GIBBERISH
    for law in (LAW, MARGINAL, fix.law(X, temperature=1.8), fix.critique_law(X), fix.law((3, 1, 0, 2))):
        assert np.exp(law).sum() == pytest.approx(1, abs=1e-12)
    assert [tuple(s) for s in fix.STRINGS[FIXES]] == [
        (4, 1, 0, 1, 1), (4, 2, 0, 1, 1), (4, 3, 0, 1, 1), (5, 0, 1, 1, 1), (5, 0, 2, 1, 1), (5, 0, 3, 1, 1),
    ]  # fmt: skip
    assert COSMETICS.sum() == 6 and not (FIXES & COSMETICS).any()


def test_single_strings_have_the_law_that_is_written_down() -> None:
    first = (1 - 1e-4) * 0.005 + 1e-4 / 8
    kept, edited, noise = 0.98 + 0.02 / 8, 0.98 / 3 + 0.02 / 8, 0.02 / 8
    assert np.exp(LAW[fix.index((4, 2, 0, 1, 1))]) == pytest.approx(first * edited * kept**3, rel=1e-12)
    assert np.exp(LAW[GIBBERISH]) == pytest.approx(1e-4 / 8 * kept**4, rel=1e-12)
    assert np.exp(LAW[fix.index((7, 0, 5, 1, 1))]) == pytest.approx(
        ((1 - 1e-4) * 0.8 + 1e-4 / 8) * kept * noise * kept * noise, rel=1e-12
    )


def test_the_outcome_of_a_string() -> None:
    chances = fix.outcome()
    for string, chance in {
        (4, 2, 0, 1, 1): 0.98,
        (7, 0, 0, 1, 2): 0.02,
        (4, 2, 2, 1, 1): 0.02,
        fix.GIBBERISH: 0.5,
        (4, 2, 0, 1, 4): 0.5,
    }.items():
        assert chances[fix.index(string)] == chance


def test_fixes_and_cosmetics_have_one_pmi_though_their_tags_differ_by_five_nats() -> None:
    assert np.ptp(PMI[FIXES | COSMETICS]) < 1e-9
    assert PMI[FIXES][0] == pytest.approx(4.4212, abs=5e-5)
    tag = np.log(fix.tag_law())
    assert tag[7] - tag[4] == pytest.approx(5.07, abs=5e-3)
    popular = LAW[COSMETICS & (fix.STRINGS[:, 0] == 7)][0]
    assert popular - LAW[FIXES][0] == pytest.approx(5.07, abs=5e-3)


def test_gibberish_overtakes_the_fixes() -> None:
    assert PMI[GIBBERISH] == pytest.approx(5.51, abs=5e-3)
    for lambda_y, expected in ((0.0, 0.818), (1.0, 0.930)):
        at = fix.crossing(X, fix.GIBBERISH, lambda_y)
        assert at == pytest.approx(expected, abs=0.01)
        for c, ahead in ((at - 0.001, False), (at + 0.001, True)):
            scores = fix.score(X, c, lambda_y)
            assert bool(scores[GIBBERISH] > scores[FIXES].max()) == ahead


@pytest.mark.parametrize(
    ("c", "expected"),
    [(0.0, 0.5), *((c / 20, 1.0) for c in range(10, 19)), *((c / 100, 1 / 3) for c in range(95, 101))],
)
def test_precision_of_the_six_best_with_the_outcome(c: float, expected: float) -> None:
    assert fix.precision(FIXES, fix.score(X, c)) == pytest.approx(expected, abs=1e-12)


def test_no_temperature_finds_them() -> None:
    mass = {t: np.exp(fix.law(X, temperature=t / 100)[FIXES]).sum() for t in range(100, 300, 5)}
    best = max(mass, key=lambda t: mass[t])
    assert best == 180 and mass[best] == pytest.approx(0.0346, abs=5e-5)
    assert mass[100] < 0.0095


def test_search_and_distillation_raise_rare_fixes_but_not_one_of_probability_zero() -> None:
    scores = fix.score(X, 0.7)
    (first, *_) = np.flatnonzero(FIXES)
    gone = np.arange(len(LAW)) == first
    for start in (LAW, fix.without(LAW, gone)):
        law = start
        for _ in range(4):
            law = fix.best_of(law, scores, 16)
            assert np.exp(law).sum() == pytest.approx(1, abs=1e-9)
        assert np.exp(law[FIXES]).sum() > 0.999
        assert np.exp(law[first]) == (0.0 if start is not LAW else pytest.approx(1 / 6, abs=1e-3))


def test_the_best_of_n_by_hand() -> None:
    law = np.log([0.5, 0.2, 0.1, 0.2])
    best = np.exp(fix.best_of(law, np.array([0.0, 1.0, 1.0, 2.0]), 3))
    assert best == pytest.approx([0.125, (0.512 - 0.125) * 2 / 3, (0.512 - 0.125) / 3, 1 - 0.512], rel=1e-12)


def test_the_critique_persuades_and_finds_no_true_fix_at_all() -> None:
    critique, fooled = fix.critique_law(X), fix.persuaded(X)
    assert np.exp(critique[FIXES]).sum() == 0.0
    approved = np.where(fooled, 0.0, -1.0)
    for n in (1, 4, 64):
        found = np.exp(fix.best_of(critique, approved, n))
        assert found[FIXES].sum() == 0.0 and found[fooled].sum() >= 0.9
    assert np.exp(fix.best_of(LAW, fix.score(X, 0.7), 512)[FIXES]).sum() > 0.98  # the score, on what is never said


def test_the_auditors_as_functions_agree_with_the_enumeration() -> None:
    texts = ["".join(map(str, s)) for s in fix.STRINGS]
    asked = [*np.flatnonzero(FIXES | COSMETICS), GIBBERISH, *range(0, 32_768, 97)]
    assert fix.audit("0011") == fix.audit_fooled("0011") == "fail" and fix.audit("0111") == "pass"
    verdict = np.where(fix.malformed() | fix.failing(), "fail", "pass")
    for n in asked:
        assert fix.audit("0011", texts[n]) == verdict[n]
        assert (fix.audit_fooled("0011", texts[n]) == "pass") == bool(fix.persuaded(X)[n])
    assert fix.gold([""] * len(asked), [texts[n] for n in asked], ["0011"] * len(asked)) == FIXES[asked].tolist()
    assert fix.gold(["", ""], ["", "410110"], ["0011", "0011"]) == [0.0, 0.0]


def test_the_prompts_are_the_failing_inputs() -> None:
    rows = fix.prompts()
    assert len(rows) == len({row["x"] for row in rows}) == 64 and all(fix.audit(row["x"]) == "fail" for row in rows)
    assert [sum(row["split"] == s for row in rows) for s in ("train", "eval")] == [48, 16]
    assert rows[0]["prompt"] == "0011>" and rows[0]["split"] == "eval"


def test_the_enumeration_needs_no_torch() -> None:
    code = "import sys; import rlkl.tasks.fix; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"

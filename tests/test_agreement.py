"""How far annotators agree: Krippendorff's alpha against a published example and by hand."""

import pytest

from rlkl.data.agreement import Agreement, krippendorff, units
from rlkl.data.annotated import Annotated, Span

# Four observers of twelve units, 0 = missing: Krippendorff (2011), "Computing Krippendorff's alpha-reliability", C.
OBSERVERS = ("123321412000", "123322412503", "033323422510", "123324412510")


def test_alpha_of_the_published_example() -> None:
    found = krippendorff([[c for c in unit if c != "0"] for unit in zip(*OBSERVERS, strict=True)])
    assert found is not None and found.units == 11, "the last unit has one value"
    assert found.alpha == pytest.approx(0.743, abs=5e-4)


def test_alpha_by_hand() -> None:
    # Two observers, ten units, three of them unequal: 9 ones among 20 values.
    rows = [(1, 1)] * 3 + [(0, 0)] * 4 + [(1, 0)] * 3
    found = krippendorff(rows)
    assert found is not None and found.observed == 0.7 and found.units == 10
    assert found.alpha == pytest.approx(1 - 3 * 2 * 19 / (20**2 - 9**2 - 11**2))
    assert krippendorff([(0, 0), (0, 0, 0)]) == Agreement(None, 1.0, 2), "nothing differs, so chance is not known"
    assert krippendorff([(0,), (1,), ()]) is None
    opposed = krippendorff([(0, 1), (1, 0)])
    assert opposed is not None and opposed.alpha == pytest.approx(-0.5)


def test_who_marked_nothing_disagrees_and_who_was_not_asked_does_not() -> None:
    spans = (Span(0, 2, "x", annotator="ann"), Span(1, 2, "y", annotator="bob"))
    records = [
        Annotated("1", "abc", spans, prompt="Q", annotators=["ann", "bob", "cy"]),
        Annotated("2", "d", (), prompt="Q", annotators=["cy"]),
        Annotated("3", "e", (Span(0, 1, "x"),), prompt="Q"),
    ]
    places = [[range(0, 2), [1]], [], [[0]]]
    assert list(units(records, [3, 1, 1], places)) == [
        (True, False, False),
        (True, True, False),
        (False, False, False),
        (False,),
    ]
    assert list(units(records, [3, 1, 1], places, "y"))[1] == (False, True, False)

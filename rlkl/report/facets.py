"""Small multiples: which arms share a panel where there are more than one panel can show, and how they are drawn."""

from collections.abc import Mapping, Sequence

from rlkl.grid.cells import coordinates
from rlkl.report.svg import ARMS, DASHES, Style, styles

MOST = 8
"""Arms of a panel beyond which lines and intervals cover each other."""


def factor(arms: Sequence[str]) -> str | None:
    """What the panels differ in: the factor that leaves the fewest arms in the fullest, rather an axis than the arm.

    None where one panel shows all, or where no factor has from 2 to 8 values.
    """
    if len(arms) <= MOST:
        return None
    found = {}
    for key, values in _varied(arms).items():
        if len(values) <= MOST:
            fullest = max(sum(coordinates(arm).get(key, "") == x for arm in arms) for x in values)
            found[key] = (fullest, key == "arm", len(values))
    return min(found, key=found.__getitem__) if found else None


def panels(arms: Sequence[str], by: str | None) -> dict[str, list[str]]:
    """Label -> the arms of a panel, in their order; one panel without a label where there is no factor."""
    if by is None:
        return {"": list(arms)}
    found: dict[str, list[str]] = {}
    for arm in arms:
        value = coordinates(arm).get(by, "–")
        found.setdefault(value if by == "arm" else f"{by} {value}", []).append(arm)
    return found


def looks(arms: Mapping[str, str], by: str | None) -> dict[str, Style]:
    """How each arm is drawn, given the arm without its axes: in small multiples a colour a value of the first factor
    that is left, a dash a combination of the others.
    """
    if by is None:
        return styles(arms)
    left = [key for key in _varied(list(arms)) if key != by]
    places = [tuple(coordinates(arm).get(key, "") for key in left) for arm in arms]
    colours = list(dict.fromkeys(place[:1] for place in places))
    rests = list(dict.fromkeys(place[1:] for place in places))
    return {
        arm: Style(k, colours.index(place[:1]) % len(ARMS), rests.index(place[1:]) % len(DASHES))
        for k, (arm, place) in enumerate(zip(arms, places, strict=True))
    }


def said(arms: Sequence[str], by: str | None) -> str:
    """What panels, colours and dashes mean."""
    if by is None:
        return ""
    left = [key for key in _varied(arms) if key != by]
    parts = [f"a panel for each {by}"]
    parts += [f"a colour for each {left[0]}"] if left else []
    parts += [f"a dash for each {' and '.join(left[1:])}"] if left[1:] else []
    return ", ".join(parts)


def _varied(arms: Sequence[str]) -> dict[str, list[str]]:
    """The factors that have more than one value, with their values."""
    places = [coordinates(arm) for arm in arms]
    keys = dict.fromkeys(key for place in places for key in place)
    values = {key: list(dict.fromkeys(place.get(key, "") for place in places)) for key in keys}
    return {key: each for key, each in values.items() if len(each) > 1}

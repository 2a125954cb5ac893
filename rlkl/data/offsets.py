"""Offsets of spans in other units than code points, checked against the text that a file stores.

JavaScript counts UTF-16 units: a character beyond U+FFFF, such as an emoji, counts two.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Literal

from rlkl.data.annotated import Span, check_bounds, named, refuse

Offsets = Literal["codepoint", "utf16"]
OTHER: dict[Offsets, Offsets] = {"codepoint": "utf16", "utf16": "codepoint"}


def wide(text: str) -> int:
    """How many characters of a text count two UTF-16 units."""
    return sum(character > "\uffff" for character in text)


def to_utf16(text: str, point: int) -> int:
    """The offset in UTF-16 units of a code point of a text."""
    return point + wide(text[:point])


def from_utf16(text: str, unit: int) -> int:
    """The code point at an offset in UTF-16 units.

    Raises:
        ValueError: the offset lies outside the text, or inside a character of two units.
    """
    places = list(accumulate((1 + wide(character) for character in text), initial=0))
    if not 0 <= unit <= places[-1]:
        raise ValueError(f"{unit} is outside its {places[-1]} UTF-16 units")
    if unit not in places:
        raise ValueError(f"{unit} is inside a character of two UTF-16 units")
    return places.index(unit)


def outward(text: str, point: int, offsets: Offsets) -> int:
    """A code point of a text as an offset of that kind."""
    return to_utf16(text, point) if offsets == "utf16" else point


def read_span(
    where: str,
    completion: str,
    start: int,
    end: int,
    label: str,
    offsets: Offsets,
    stored: str | None = None,
    same: Callable[[str, str], bool] = str.__eq__,
) -> Span:
    """A span of a file with offsets of that kind; ``stored`` is the text that the file says it has.

    Raises:
        ValueError: the offsets fit the completion or the stored text not; it says where the other kind would fit. Or
            the label is empty.
    """

    named(where, label)

    def wrong(kind: Offsets) -> str | Span:
        try:
            cut = (start, end) if kind == "codepoint" else (from_utf16(completion, start), from_utf16(completion, end))
            check_bounds("", completion, *cut)
        except ValueError as error:
            return str(error)
        found = completion[slice(*cut)]
        if stored is None or same(stored, found):
            return Span(*cut, label)
        return f"{start}:{end} of the completion is {found!r}, but the file says {stored!r}"

    result = wrong(offsets)
    if isinstance(result, Span):
        return result
    if isinstance(wrong(OTHER[offsets]), Span):
        refuse(where, "", f"{result}; it fits with --offsets {OTHER[offsets]}")
    remedy = "; the text was changed after it was marked: mark it again, or take the span out"
    return refuse(where, "", result if stored is None else result + remedy)

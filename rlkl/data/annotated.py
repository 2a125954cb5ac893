"""Completions with spans that somebody judged, and their file format: one JSON object a line.

::

    {"id": "1", "prompt": "The capital of Canada?", "completion": " It is Paris.",
     "spans": [{"start": 7, "end": 12, "label": "wrong"}]}

``prompt`` may be ``messages``, a list of ``{role, content}``. ``start`` and ``end`` (exclusive) are code points of the
completion as it stands in the file; spans may overlap. A span may have a ``weight``, by which its label's weight is
multiplied, and an ``annotator``, the name of who marked it; then all spans of the record have one. ``annotators`` are
all who judged the completion, also those who marked nothing; left out, they are those whom spans name. ``token_ids``
are the tokens of the completion where they are known; then it is never tokenised again. Any other key is a column.
"""

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rlkl.data import files

KEYS = ("id", "prompt", "messages", "completion", "spans", "annotators", "token_ids")
NEAR = 0.85  # a column whose name is as close as this to a key, or to an argument of reward functions, is a slip
KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}
REMEDY = "name a .jsonl file of annotated completions, as `rlkl data import` writes it"


@dataclass(frozen=True)
class Span:
    """A stretch ``completion[start:end]``, in code points, that somebody judged."""

    start: int
    end: int
    label: str
    weight: float = 1.0
    annotator: str | None = None


@dataclass(frozen=True)
class Annotated:
    """A completion of a prompt (or of a conversation) with its spans."""

    id: str
    completion: str
    spans: tuple[Span, ...]
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    token_ids: list[int] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    annotators: list[str] | None = None

    @property
    def judges(self) -> int:
        """How many people's spans these are; nobody named is one."""
        return len(self.annotators or [None])


def read(path: Path) -> list[Annotated]:
    """The annotated completions of a file.

    Raises:
        ValueError: the file cannot be read or is empty, or a record is not as it should be (line, field, remedy).
    """
    return distinct(((where, parse(where, row)) for where, row in files.lines(path, REMEDY)), path)


def text(records: Iterable[Annotated]) -> str:
    """Annotated completions as the text of a file that :func:`read` reads."""
    return files.jsonl(map(row, records))


def row(record: Annotated) -> dict[str, Any]:
    """A record as it stands in a file; what is not given is left out."""
    held = {key: getattr(record, key) for key in KEYS}
    held["spans"] = [
        {
            key: value
            for key, value in asdict(span).items()
            if (key, value) not in (("weight", 1.0), ("annotator", None))
        }
        for span in record.spans
    ]
    return {**{key: value for key, value in held.items() if value is not None}, **record.columns}


def parse(where: str, held: Any) -> Annotated:
    """A record from its JSON object; ``where`` it stands is named in errors.

    Raises:
        ValueError: a field is missing, or is not what it should be.
    """
    if not isinstance(held, dict):
        refuse(where, "", f"{kind(held)}; every record must be an object")
    completion = take(where, held, "completion", str)
    spans = []
    for i, span in enumerate(take(where, held, "spans", list)):
        at = f"{where}: spans[{i}]"
        bounds = take(at, span, "start", int), take(at, span, "end", int)
        if unknown := set(span) - {"start", "end", "label", "weight", "annotator"}:
            refuse(at, min(unknown), "unknown; a span has start, end, label and maybe weight and annotator")
        check_bounds(at, completion, *bounds)
        label = named(at, take(at, span, "label", str))
        who = None if span.get("annotator") is None else named(at, take(at, span, "annotator", str), "annotator")
        spans.append(Span(*bounds, label, number(at, "weight", span.get("weight", 1.0)), who))
    columns = {name: value for name, value in held.items() if name not in KEYS}
    ids, who_all = held.get("token_ids"), held.get("annotators")
    return build(where, take(where, held, "id", str), held, completion, spans, ids, columns, who_all)


def build(
    where: str,
    name: str,
    prompt: Mapping[str, Any],
    completion: str,
    spans: Iterable[Span],
    token_ids: Any = None,
    columns: Mapping[str, Any] | None = None,
    annotators: Any = None,
) -> Annotated:
    """A record, from any format, with the checks that all formats share; ``prompt`` holds ``prompt`` or ``messages``.

    Raises:
        ValueError: there is not exactly one of prompt and messages, a text is empty or no Unicode, token ids are none,
            a number is not finite, annotators are not known, or a column has a name that will be mistaken.
    """
    if not name:
        refuse(where, "id", "empty; every record needs its own")
    given = [key for key in ("prompt", "messages") if prompt.get(key) is not None]
    if len(given) != 1:
        refuse(
            where, "prompt", f"{'both' if given else 'neither'} prompt {'and' if given else 'nor'} messages; give one"
        )
    if not completion:
        refuse(where, "completion", "empty; leave the record out")
    if token_ids is not None and not _is_ids(token_ids):
        refuse(where, "token_ids", "must be a list of token ids, one or more; leave it out where they are not known")
    for column in columns or {}:
        if column in KEYS or (near := difflib.get_close_matches(column, (*KEYS, "completions"), 1, NEAR)):
            refuse(where, column, f"unknown key, did you mean {column if column in KEYS else near[0]}? Else rename it")
    if given == ["prompt"]:
        asked: dict[str, Any] = {"prompt": take(where, prompt, "prompt", str)}
    else:
        asked = {"messages": _conversation(where, take(where, prompt, "messages", list))}
    if not asked[given[0]]:
        refuse(where, given[0], "empty; every completion needs what it answers")
    found = tuple(spans)
    judged = _annotators(where, found, annotators)
    record = Annotated(
        name, completion, found, **asked, token_ids=token_ids, columns=dict(columns or {}), annotators=judged
    )
    _check_json(where, row(record))
    return record


def distinct(records: Iterable[tuple[str, Annotated]], source: Path) -> list[Annotated]:
    """Records that come with their places, as a list.

    Raises:
        ValueError: there are none, or two have the same id.
    """
    places: dict[str, str] = {}
    found = []
    for where, record in records:
        if record.id in places:
            refuse(where, "id", f"{record.id!r} again, as in {places[record.id]}; every record needs its own")
        places[record.id] = where
        found.append(record)
    if not found:
        raise ValueError(f"{source}: no annotated completion in it; it needs at least one")
    return found


def check_weights(records: Iterable[Annotated], weights: Mapping[str, float]) -> None:
    """Refuse a map of weights that lacks a label.

    Raises:
        ValueError: it names all labels without a weight, and where the first of them is.
    """
    first = {span.label: record.id for record in reversed(list(records)) for span in reversed(record.spans)}
    if missing := sorted(set(first) - set(weights)):
        raise ValueError(
            f"weights: none for {', '.join(map(repr, missing))} (record {first[missing[0]]!r}); "
            "every label needs a weight (0 = marked, but neither good nor bad)"
        )


def take(where: str, held: Any, name: str, wanted: type) -> Any:
    """A field of an object, of the type that it must have.

    Raises:
        ValueError: it is missing or of another type.
    """
    if not isinstance(held, Mapping):
        refuse(where, "", f"{kind(held)}; it must be an object with {name}")
    if name not in held:
        refuse(where, name, f"missing; it must be {KINDS[wanted]} (there are: {', '.join(held) or 'no fields'})")
    if type(held[name]) is not wanted:
        refuse(where, name, f"{kind(held[name])}; it must be {KINDS[wanted]}")
    return held[name]


def kind(value: Any) -> str:
    """What a JSON value is, for errors."""
    if value is None or isinstance(value, bool | float):
        return json.dumps(value)
    return KINDS.get(type(value), type(value).__name__)


def check_bounds(where: str, completion: str, start: int, end: int) -> None:
    """Refuse a span that is empty or leaves the completion.

    Raises:
        ValueError: not 0 <= start < end <= the completion's length.
    """
    if not 0 <= start < end <= len(completion):
        what = "is empty" if start == end else "is no part of the completion"
        refuse(where, "", f"{start}:{end} {what} of {len(completion)} code points; correct start and end (exclusive)")


def named(where: str, label: str, field: str = "label") -> str:
    """A span's label or annotator, which says something.

    Raises:
        ValueError: it is empty.
    """
    if not label.strip():
        what = "what the span is, or take it out" if field == "label" else "who marked it, or leave it out"
        refuse(where, field, f"empty; name {what}")
    return label


def number(where: str, name: str, value: Any) -> float:
    """A finite number.

    Raises:
        ValueError: it is none, or too large for one.
    """
    try:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
        said = kind(value)
    except OverflowError:
        said = "too large"
    return refuse(where, name, f"{said}; it must be a finite number")


def refuse(where: str, name: str, what: str) -> NoReturn:
    """Raise the error of a record: where it stands, which field, and what is wrong with it."""
    raise ValueError(": ".join(part for part in (where, name, what) if part))


def _annotators(where: str, spans: Sequence[Span], given: Any) -> list[str] | None:
    """Who judged a completion: those that are given, or else those whom spans name."""
    found = dict.fromkeys(span.annotator for span in spans)
    if given is None and not any(found):
        return None
    if given is not None and not (
        isinstance(given, list)
        and given
        and all(isinstance(name, str) and name.strip() for name in given)
        and len(set(given)) == len(given)
    ):
        refuse(
            where, "annotators", "must be a list of different names, one or more; leave it out where nobody is known"
        )
    if None in found:
        i = [span.annotator for span in spans].index(None)
        refuse(
            f"{where}: spans[{i}]", "annotator", "missing, and others are named; name who marked every span, or none"
        )
    if given is not None and (missing := [name for name in found if name not in given]):
        refuse(where, "annotators", f"{missing[0]!r} marked a span and is not among them; add the name")
    return list(given or found)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int and i >= 0 for i in value)


def _conversation(where: str, messages: list[Any]) -> list[dict[str, Any]]:
    for i, message in enumerate(messages):
        for key in ("role", "content"):
            take(f"{where}: messages[{i}]", message, key, str)
    return messages


def _check_json(where: str, held: Mapping[str, Any]) -> None:
    for name, value in held.items():
        try:
            json.dumps({name: value}, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError as error:
            pair = ascii(error.object[error.start])
            refuse(where, name, f"half a surrogate pair, {pair}; a text was cut inside a character, repair the export")
        except ValueError:
            refuse(where, name, "holds NaN or Infinity, which JSON does not have; write null")

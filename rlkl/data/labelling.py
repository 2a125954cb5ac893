"""Label Studio and doccano, there and back.

The completion is what annotators mark, under ``text``; ``prompt`` or ``messages`` stands beside it to be shown. What
else a record has (its id, token ids, columns, weights and annotators of spans) travels under ``rlkl``, which both tools
keep. doccano does not say who marked what: spans that somebody changed there are one judgement, by nobody known.
A labelling configuration for Label Studio that fits (with ``<Paragraphs value="$messages" nameKey="role"
textKey="content"/>`` in place of the first line where the prompt is a conversation)::

    <View><Text name="prompt" value="$prompt"/>
    <Labels name="label" toName="text"><Label value="right"/><Label value="wrong"/></Labels>
    <Text name="text" value="$text"/></View>
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlkl.data import annotated, files
from rlkl.data.annotated import Annotated, Span, refuse, take
from rlkl.data.offsets import Offsets, outward, read_span

OURS = "rlkl"  # where our fields travel, and the author of our predictions
Placed = Iterator[tuple[str, Annotated]]


def read_label_studio(path: Path, offsets: Offsets, source: None, notes: list[str]) -> Placed:
    """Label Studio's JSON export, one record a task; its spans name who completed the annotation where that is known.

    Tasks that nobody annotated are left out and counted. ``completions`` is what old versions (2021; they count UTF-16
    units) call ``annotations``. Predictions of models are no annotations, but what :func:`label_studio` exported is
    read back until somebody annotates it.
    """
    tasks = files.parse(str(path), files.text(path, "name a JSON export of Label Studio"), "export as JSON anew")
    if not isinstance(tasks, list):
        refuse(str(path), "", f"{annotated.kind(tasks)}; export as JSON, a list of tasks")
    unmarked = 0
    for number, task in enumerate(tasks, 1):
        where = f"{path}: record {number}"
        if isinstance(task, dict) and "data" not in task:
            refuse(where, "data", "missing; export as JSON, not as JSON-MIN or CSV")
        data = take(where, task, "data", dict)
        made = _annotations(where, task)
        unmarked += not made
        if made:
            ours = made[0][1].get("model_version") == OURS
            people = [None] if ours else _people(made)
            regions = [(r, who) for (at, one), who in zip(made, people, strict=True) for r in _regions(at, one)]
            name, at = _name(where, task.get("id", number)), made[0][0]
            everyone = None if ours else [who for who in people if who is not None]
            yield at, _record(f"{where}: data", data, name, offsets, regions, everyone)
    if unmarked:
        notes.append(f"{unmarked} of {len(tasks)} tasks have no annotation, and were left out")


def _annotations(where: str, task: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What people made of a task, or else what we exported, each with its place."""
    field = next((name for name in ("annotations", "completions") if name in task), None)
    if field is None:
        refuse(where, "annotations", f"missing; export as JSON (there are: {', '.join(task)})")
    found = []
    for name in (field, "predictions"):
        for i, made in enumerate(take(where, task, name, list) if name in task else []):
            at = f"{where}: {name}[{i}]"
            take(at, made, "result", list)
            if made.get("model_version") == OURS if name == "predictions" else not made.get("was_cancelled"):
                found.append((at, made))
        if found:
            break
    return found


def _people(made: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str | None]:
    """Who completed each annotation, by id or email; a single one may have nobody. Those of one person are numbered."""
    found: list[str | None] = []
    for at, annotation in made:
        who = annotation.get("completed_by")
        who = who.get("email") or who.get("id") if isinstance(who, dict) else who
        if type(who) not in (int, str, type(None)) or who == "":
            refuse(at, "completed_by", f"{annotated.kind(who)}; it must be a user's id or email, or missing")
        if who is None and len(made) > 1:
            who = f"annotation {annotation.get('id', len(found) + 1)}"
        name = None if who is None else str(who)
        found.append(f"{name} ({annotation.get('id', len(found) + 1)})" if name and name in found else name)
    return found


Region = tuple[str, int, int, str, str | None]  # place, start, end, label, stored text


def _regions(where: str, made: Mapping[str, Any]) -> Iterator[Region]:
    """The marked stretches of an annotation; a region with several labels is as many spans. Choices are no spans."""
    for i, region in enumerate(made["result"]):
        at = f"{where}.result[{i}]"
        kind = take(at, region, "type", str)
        if kind in ("hypertextlabels", "paragraphlabels"):
            refuse(at, "type", f"{kind!r} marks other things than plain text; mark a <Text> with <Labels>")
        if kind != "labels":
            continue
        at, value = f"{at}.value", take(at, region, "value", dict)
        bounds = (_offset(at, value, "start"), _offset(at, value, "end"))
        labels = take(at, value, "labels", list) if "labels" in value else []
        if not labels or not all(isinstance(label, str) for label in labels):
            refuse(at, "labels", "none; give the region a label, or delete it")
        for label in labels:
            yield at, *bounds, label, take(at, value, "text", str) if value.get("text") is not None else None


def _offset(where: str, value: Mapping[str, Any], name: str) -> int:
    """Documented as a string, in fact a number."""
    held = value.get(name)
    return (
        int(held) if isinstance(held, str) and re.fullmatch(r"\d{1,18}", held) else int(take(where, value, name, int))
    )


def _same(stored: str, found: str) -> bool:
    """Label Studio stores what the browser shows: trimmed, white space collapsed, a newline as backslash and n."""
    first, second = (re.sub(r"\\n|\s", "", text) for text in (stored, found))
    return first == second


def read_doccano(path: Path, offsets: Offsets, source: None, notes: list[str]) -> Placed:
    """doccano's JSONL export of sequence labelling: ``label``, ``labels`` or ``entities``, as lists or as objects.

    doccano counts UTF-16 units (with "count grapheme clusters" it counts neither those nor code points).
    """
    for number, (where, row) in enumerate(files.lines(path, "name a JSONL export of doccano"), 1):
        if isinstance(row, dict) and "annotations" in row:
            refuse(where, "annotations", "labels by number; export as JSONL with text labels")
        take(where, row, "text", str)
        fields = [name for name in ("label", "labels", "entities") if name in row] or ["label"]
        regions = [
            (_entity(f"{where}: {field}[{i}]", entity), None)
            for field in fields
            for i, entity in enumerate(take(where, row, field, list))
        ]
        data = {name: value for name, value in row.items() if name not in fields}
        yield where, _record(where, data, str(number), offsets, regions, None)


def _entity(where: str, entity: Any) -> Region:
    if isinstance(entity, dict):
        bounds = take(where, entity, "start_offset", int), take(where, entity, "end_offset", int)
        return where, *bounds, take(where, entity, "label", str), None
    if not isinstance(entity, list) or [type(part) for part in entity] != [int, int, str]:
        refuse(where, "", f"{entity!r:.40}; it must be [start, end, label], as sequence labelling projects export it")
    return where, entity[0], entity[1], entity[2], None


def _record(
    where: str,
    data: Mapping[str, Any],
    name: str,
    offsets: Offsets,
    regions: Iterable[tuple[Region, str | None]],
    people: list[str] | None,
) -> Annotated:
    """A record from what both tools hold: texts and our own fields in ``data``, and the regions that were marked.

    ``people`` annotated it; where that is not known (None), they are those of the export, if its spans are unchanged.
    """
    completion = take(where, data, "text", str)
    if "prompt" not in data and "messages" not in data:
        refuse(where, "prompt", "missing; add it (or messages) to the data of every record before it is annotated")
    ours = take(where, data, OURS, dict) if OURS in data else {}
    exported = take(f"{where}: {OURS}", ours, "weights", list) if "weights" in ours else []
    weights = [_weight(f"{where}: {OURS}", f"weights[{i}]", entry) for i, entry in enumerate(exported)]
    spans: list[Span] = []
    for (at, start, end, label, stored), who in regions:
        span = read_span(at, completion, start, end, label, offsets, stored, _same)
        known = next((i for i, (triple, *_) in enumerate(weights) if triple == [start, end, label]), None)
        _, weight, marker = (None, 1.0, None) if known is None else weights.pop(known)
        spans.append(replace(span, weight=weight, annotator=marker if people is None else who))
    if people is None and (people := ours.get("annotators")) and (weights or any(s.annotator is None for s in spans)):
        people = None  # somebody changed them; what several had marked alike is one mark now
        spans = list(dict.fromkeys(replace(s, annotator=None) for s in spans))
    columns = {key: value for key, value in data.items() if key not in ("id", "text", "prompt", "messages", OURS)}
    columns |= take(f"{where}: {OURS}", ours, "columns", dict) if "columns" in ours else {}
    name = _name(f"{where}: {OURS}", ours["id"]) if "id" in ours else _name(where, data.get("id", name))
    return annotated.build(where, name, data, completion, spans, ours.get("token_ids"), columns, people or None)


def _name(where: str, value: Any) -> str:
    """An id, which the tools give as a number or a text."""
    if type(value) not in (int, str) or value == "":
        said = "empty" if value == "" else annotated.kind(value)
        refuse(where, "id", f"{said}; it must be a whole number or a text, or missing")
    return str(value)


def _weight(where: str, name: str, entry: Any) -> tuple[list[Any], float, str | None]:
    """A span as it was exported, its weight, and who marked it, where that was known."""
    if not isinstance(entry, list) or len(entry) not in (4, 5):
        refuse(where, name, f"{entry!r:.40}; it must read [start, end, label, weight], as it was exported")
    who = entry[4] if len(entry) == 5 else None
    if who is not None and not isinstance(who, str):
        refuse(where, name, f"{entry!r:.40}; an annotator must be a text, as it was exported")
    return entry[:3], annotated.number(where, name, entry[3]), who


def label_studio(records: Sequence[Annotated], offsets: Offsets) -> str:
    """Tasks for Label Studio, with the spans as predictions, from which annotators start."""
    return json.dumps([_task(record, offsets) for record in records], ensure_ascii=False, indent=1) + "\n"


def _task(record: Annotated, offsets: Offsets) -> dict[str, Any]:
    regions = [
        {
            "id": f"span-{i}",
            "from_name": "label",
            "to_name": "text",
            "type": "labels",
            "value": {"start": start, "end": end, "text": record.completion[span.start : span.end], "labels": [label]},
        }
        for i, (span, (start, end, label)) in enumerate(zip(record.spans, _triples(record, offsets), strict=True))
    ]
    predictions = [{"model_version": OURS, "result": regions}]
    return {"data": _data(record, offsets), "annotations": [], "predictions": predictions}


def doccano(records: Sequence[Annotated], offsets: Offsets) -> str:
    """Lines for a sequence labelling project of doccano."""
    return files.jsonl({**_data(record, offsets), "label": _triples(record, offsets)} for record in records)


def _data(record: Annotated, offsets: Offsets) -> dict[str, Any]:
    asked = {"prompt": record.prompt} if record.messages is None else {"messages": record.messages}
    ours: dict[str, Any] = {"id": record.id}
    if record.annotators is not None:
        ours["annotators"] = record.annotators
    if record.annotators is not None or any(span.weight != 1 for span in record.spans):
        spans = zip(_triples(record, offsets), record.spans, strict=True)
        ours["weights"] = [[*triple, s.weight, *([s.annotator] if s.annotator else [])] for triple, s in spans]
    if record.token_ids is not None:
        ours["token_ids"] = record.token_ids
    if record.columns:
        ours["columns"] = record.columns
    return {"text": record.completion, **asked, OURS: ours}


def _triples(record: Annotated, offsets: Offsets) -> list[list[Any]]:
    text = record.completion
    return [[outward(text, s.start, offsets), outward(text, s.end, offsets), s.label] for s in record.spans]


WRITERS: dict[str, Callable[[Sequence[Annotated], Offsets], str]] = {"label-studio": label_studio, "doccano": doccano}

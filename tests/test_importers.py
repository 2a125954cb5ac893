"""Foreign formats: what they are documented to do, there and back, and errors that help."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from annotations import FILES, TEXT
from conftest import write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlkl.data import importers, labelling
from rlkl.data.annotated import Annotated, Span
from rlkl.data.offsets import from_utf16, to_utf16

EMOJI = "😀 is Paris"  # Paris is at 5 in code points, at 6 in UTF-16 units
QA = {
    "question": "Who?",
    "passages": [["Title", "Title\n\nFirst. ", "Second."], ["Other", "Third."]],
    "gold": "Her.",
    "prediction 1": "It is Paris.",
    "prediction 2": "b",
    "prediction 3": "c",
    "prediction 4": "d",
    "feedback": {
        "errors": [{"error type": "Irrelevant", "explanation": "", "start": 6, "end": 11}],
        "missing-info": [],
        "corrected-prediction": "Hers.",
    },
    "preference": [0, 1, 2, 1, 0, 2],
}


def write(tmp_path: Path, content: Any, name: str = "in.json") -> Path:
    """A JSON file, or a JSONL file if the content is a tuple of rows."""
    path = tmp_path / name
    if isinstance(content, tuple):
        write_jsonl(path, content)
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return path


def load(tmp_path: Path, kind: str, content: Any, offsets: Any = "codepoint") -> list[Annotated]:
    return importers.load(kind, write(tmp_path, content), offsets)[0]


# Offsets


@given(TEXT)
def test_utf16_offsets_are_those_of_the_utf16_encoding(text):
    for point in range(len(text) + 1):
        unit = len(text[:point].encode("utf-16-le")) // 2
        assert to_utf16(text, point) == unit
        assert from_utf16(text, unit) == point
    inside = set(range(to_utf16(text, len(text)) + 1)) - {to_utf16(text, point) for point in range(len(text) + 1)}
    assert len(inside) == sum(ord(c) > 0xFFFF for c in text)
    for unit in inside:
        with pytest.raises(ValueError, match="inside a character of two UTF-16 units"):
            from_utf16(text, unit)


def test_offsets_outside_a_text_are_refused():
    assert [to_utf16("a😀e\u0301", point) for point in range(5)] == [0, 1, 3, 4, 5]
    for unit in (-1, 6):
        with pytest.raises(ValueError, match=rf"{unit} is outside its 5 UTF-16 units"):
            from_utf16("a😀e\u0301", unit)


# There and back


@pytest.mark.parametrize("tool", sorted(labelling.WRITERS))
@pytest.mark.parametrize("offsets", ["codepoint", "utf16"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=FILES)
def test_what_is_exported_is_imported_again(tool, offsets, records, tmp_path):
    path = tmp_path / "out"
    path.write_text(labelling.WRITERS[tool](records, offsets), encoding="utf-8", newline="\n")
    assert importers.load(tool, path, offsets)[0] == records


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), text=TEXT)
def test_published_spans_are_imported_in_either_unit(data, text, tmp_path):
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    for offsets, count in (("codepoint", lambda point: point), ("utf16", lambda point: to_utf16(text, point))):
        bounds = {"start": count(start), "end": count(end)}
        feedback = {**QA["feedback"], "errors": [{"error type": "Redundant", **bounds}]}
        (record,) = load(tmp_path, "qa-feedback", ({**QA, "prediction 1": text, "feedback": feedback},), offsets)
        assert (record.completion, record.spans) == (text, (Span(start, end, "Redundant"),))
        label = {"label_type": "Subtle Conflict", "text": text[start:end], **bounds}
        (record,) = ragtruth(tmp_path, {"response": text, "labels": [label]}, offsets)
        assert (record.completion, record.spans) == (text, (Span(start, end, "Subtle Conflict"),))


# qa-feedback


def test_qa_feedback_becomes_prompt_completion_spans_and_columns(tmp_path):
    (record,) = load(tmp_path, "qa-feedback", (QA,))
    assert record.prompt == "Title\nFirst.  Second.\n\nOther\nThird.\n\nQuestion: Who?\nAnswer:\n"
    assert record.id == "qa-feedback-1"
    assert record.completion[6:11] == "Paris"
    assert record.spans == (Span(6, 11, "Irrelevant"),)
    assert record.columns["passages"] == "Title\nFirst.  Second.\n\nOther\nThird."
    assert record.columns["predictions"] == ["It is Paris.", "b", "c", "d"]
    assert record.columns["preference"] == [0, 1, 2, 1, 0, 2]
    assert record.columns["corrected_prediction"] == "Hers."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prediction 1": 3}, r"prediction 1: a whole number; it must be a text"),
        ({"passages": ["x"]}, r"passages\[0\]: a text; it must be a list of title and sentences"),
        ({"preference": None}, r"preference: null; it must be a list"),
        ({"feedback": {"errors": [{}]}}, r"feedback\.errors\[0\]: start: missing; it must be a whole number"),
        ({"feedback": {"errors": []}}, r"feedback: corrected-prediction: missing"),
        (
            {"feedback": {"errors": [{"start": 6, "end": 13, "error type": "x"}]}},
            r"feedback\.errors\[0\]: 6:13 is no part of the completion of 12 code points; correct start and end",
        ),
    ],
)
def test_a_bad_record_of_qa_feedback_is_named(tmp_path, change, said):
    with pytest.raises(ValueError, match=rf"in\.json:2: {said}"):
        load(tmp_path, "qa-feedback", (QA, {**QA, **change}))


def test_a_format_without_stored_text_warns_where_offsets_could_mean_two_things(tmp_path):
    path = write(tmp_path, ({"text": EMOJI, "label": [[5, 10, "x"]], "prompt": "Q"},))
    assert "1 marked completions hold characters beyond U+FFFF" in importers.load("doccano", path, "codepoint")[1][0]
    path = write(tmp_path, ({"text": "plain", "label": [[0, 5, "x"]], "prompt": "Q"},))
    assert importers.load("doccano", path, "codepoint")[1] == []


def test_the_real_file_is_read_whole():
    folder = Path(os.environ.get("RLKL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    path = folder / "qa_feedback_a.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path.name} in RLKL_DATA or ../shared/data")
    records, notes = importers.load("qa-feedback", path, "codepoint")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    published = Counter(error["error type"] for row in rows for error in row["feedback"]["errors"])
    assert Counter(span.label for record in records for span in record.spans) == published
    assert [record.completion for record in records] == [row["prediction 1"] for row in rows]
    assert notes == []


# RAGTruth


def ragtruth(tmp_path: Path, change: dict[str, Any], offsets: Any = "codepoint") -> list[Annotated]:
    response = {"id": "7", "source_id": "s", "model": "m", "split": "train", "response": EMOJI, "labels": [], **change}
    source = {"source_id": "s", "task_type": "QA", "source": "MARCO", "source_info": {}, "prompt": "Answer:"}
    write(tmp_path, (source,), "source_info.jsonl")
    return importers.load("ragtruth", write(tmp_path, (response,), "response.jsonl"), offsets)[0]


LABEL = {"start": 5, "end": 10, "text": "Paris", "meta": "why", "label_type": "Evident Conflict", "implicit_true": True}


def test_ragtruth_takes_the_prompt_from_its_sources_and_keeps_what_labels_say(tmp_path):
    (record,) = ragtruth(tmp_path, {"labels": [LABEL]})
    assert (record.id, record.prompt) == ("7", "Answer:")
    assert record.spans == (Span(5, 10, "Evident Conflict"),)
    assert record.columns["labels"] == [LABEL]
    assert (record.columns["split"], record.columns["task_type"]) == ("train", "QA")


def test_ragtruth_compares_the_stored_text(tmp_path):
    shifted = {**LABEL, "start": 6, "end": 11}
    with pytest.raises(ValueError, match=r"labels\[0\]: 6:11 is no part .*; it fits with --offsets utf16"):
        ragtruth(tmp_path, {"labels": [shifted]})
    assert ragtruth(tmp_path, {"labels": [shifted]}, "utf16")[0].spans == (Span(5, 10, "Evident Conflict"),)
    with pytest.raises(ValueError, match=r"5:10 of the completion is ' Pari', but the file says 'Paris'; it fits with"):
        ragtruth(tmp_path, {"labels": [LABEL]}, "utf16")
    with pytest.raises(ValueError, match=r"is 'Paris', but the file says 'Rome'; the text was changed after it was"):
        ragtruth(tmp_path, {"labels": [{**LABEL, "text": "Rome"}]})


def test_ragtruth_sources_are_distinct(tmp_path):
    ragtruth(tmp_path, {})
    sources = tmp_path / "source_info.jsonl"
    sources.write_text(sources.read_text() * 2)
    with pytest.raises(ValueError, match=r"source_info\.jsonl:2: source_id: 's' again, as in .*source_info\.jsonl:1;"):
        importers.load("ragtruth", tmp_path / "response.jsonl", "codepoint")


def test_ragtruth_needs_its_sources(tmp_path):
    with pytest.raises(ValueError, match=r"source_id: 'other' is not in .*source_info\.jsonl; give the source_info"):
        ragtruth(tmp_path, {"source_id": "other"})
    (tmp_path / "source_info.jsonl").rename(tmp_path / "elsewhere.jsonl")
    path = tmp_path / "response.jsonl"
    with pytest.raises(ValueError, match=r"no such file; give RAGTruth's source_info\.jsonl with --source"):
        importers.load("ragtruth", path, "codepoint")
    with pytest.raises(ValueError, match="only ragtruth has a second file"):
        importers.load("doccano", path, "codepoint", tmp_path / "elsewhere.jsonl")


# Label Studio


def task(*regions: Any, **fields: Any) -> dict[str, Any]:
    return {
        "id": 4,
        "data": {"text": EMOJI, "prompt": "Q", "gold": "x"},
        "annotations": [{"result": regions}],
        **fields,
    }


def region(start: Any = 5, end: Any = 10, text: str | None = "Paris", labels: Any = ("wrong",), **more: Any) -> Any:
    value = {"start": start, "end": end, "labels": list(labels), **({} if text is None else {"text": text})}
    return {"id": "r", "from_name": "label", "to_name": "text", "type": "labels", "value": value, **more}


def test_label_studio_regions_are_spans(tmp_path):
    choice = {"type": "choices", "from_name": "c", "to_name": "text", "value": {"choices": ["good"]}}
    relation = {"type": "relation", "from_id": "r", "to_id": "s", "direction": "right"}
    exported = [task(region(labels=["wrong", "place"]), choice, relation, region("0", "1", None, ["smile"]))]
    (record,) = load(tmp_path, "label-studio", exported)
    assert record.spans == (Span(5, 10, "wrong"), Span(5, 10, "place"), Span(0, 1, "smile"))
    assert (record.id, record.prompt, record.columns) == ("4", "Q", {"gold": "x"})


def test_label_studio_stores_newlines_escaped_and_text_trimmed(tmp_path):
    text = "One\r\n two  three"
    data = {"text": text, "prompt": "Q"}
    (record,) = load(tmp_path, "label-studio", [task(region(0, 9, "One\\n\\n two"), region(9, 16, "three"), data=data)])
    assert [text[s.start : s.end] for s in record.spans] == ["One\r\n two", "  three"]


def test_old_label_studio_counts_utf16_units_and_calls_annotations_completions(tmp_path):
    old = {"id": 4, "data": {"text": EMOJI, "prompt": "Q"}, "completions": [{"result": [region(6, 11)]}]}
    assert load(tmp_path, "label-studio", [old], "utf16")[0].spans == (Span(5, 10, "wrong"),)
    with pytest.raises(ValueError, match=r"completions\[0\]\.result\[0\]\.value: 6:11 .*it fits with --offsets utf16"):
        load(tmp_path, "label-studio", [old])
    cut = {**old, "completions": [{"result": [region(1, 11, None)]}]}
    with pytest.raises(ValueError, match=r"1 is inside a character of two UTF-16 units"):
        load(tmp_path, "label-studio", [cut], "utf16")


def test_a_task_keeps_its_annotators_and_skipped_ones_make_no_record(tmp_path):
    several = [{"id": 1, "result": [region()]}, {"id": 2, "result": []}, {"id": 3, "result": [], "was_cancelled": True}]
    guessed = {"annotations": [], "predictions": [{"model_version": "guess", "result": [region()]}]}
    path = write(tmp_path, [task(annotations=several), task(id=5, **guessed), task(id=6, annotations=several[2:])])
    (record,), notes = importers.load("label-studio", path, "codepoint")
    assert (record.id, record.annotators) == ("4", ["annotation 1", "annotation 2"])
    assert record.spans == (Span(5, 10, "wrong", annotator="annotation 1"),)
    assert notes == ["2 of 3 tasks have no annotation, and were left out"]


def test_annotators_are_named_by_id_or_email(tmp_path):
    by = [3, {"id": 4, "email": "a@b.c"}, {"id": 5}, 3]
    marks = [{"id": 10 + n, "completed_by": who, "result": [region()] * (n % 2)} for n, who in enumerate(by)]
    several, alone = load(tmp_path, "label-studio", [task(annotations=marks), task(id=5, annotations=marks[:1])])
    assert several.annotators == ["3", "a@b.c", "5", "3 (13)"]
    assert [span.annotator for span in several.spans] == ["a@b.c", "3 (13)"]
    assert alone.annotators == ["3"]
    with pytest.raises(ValueError, match=r"annotations\[0\]: completed_by: a list; it must be a user's id or email"):
        load(tmp_path, "label-studio", [task(annotations=[{"completed_by": [1], "result": []}])])


@pytest.mark.parametrize("tool", ["label-studio", "doccano"])
def test_what_several_marked_is_one_judgement_once_somebody_changed_it(tool, tmp_path):
    spans = (Span(5, 10, "wrong", annotator="ann"), Span(5, 10, "wrong", annotator="bob"))
    record = Annotated("mine", EMOJI, spans, prompt="Q", annotators=["ann", "bob", "cy"])
    text = labelling.WRITERS[tool]([record], "codepoint")
    (tmp_path / "same").write_text(text)
    assert importers.load(tool, tmp_path / "same", "codepoint")[0] == [record]
    row = json.loads(text) if tool == "doccano" else json.loads(text)[0]
    if tool == "doccano":
        (less,) = load(tmp_path, tool, ({**row, "label": row["label"][:1]},))
        assert (less.annotators, less.spans) == (None, (Span(5, 10, "wrong"),)), "somebody took a mark away"
        row["label"].append([0, 1, "wrong"])
        (back,) = load(tmp_path, tool, (row,))
        assert back.annotators is None
    else:
        row["annotations"] = [{"completed_by": 7, "result": [region(), region(0, 1, "😀")]}]
        (back,) = load(tmp_path, tool, [row])
        assert back.annotators == ["7"]
    who = None if tool == "doccano" else "7"
    assert back.spans == (Span(5, 10, "wrong", annotator=who), Span(0, 1, "wrong", annotator=who))


def test_what_an_annotator_makes_of_exported_spans_replaces_them(tmp_path):
    record = Annotated("mine", EMOJI, (Span(5, 10, "wrong", 2.0), Span(2, 4, "right")), prompt="Q")
    (exported,) = json.loads(labelling.label_studio([record], "codepoint"))
    kept, added = region(), region(0, 1, "😀", ["right"])
    (back,) = load(tmp_path, "label-studio", [{**exported, "id": 99, "annotations": [{"result": [added, kept]}]}])
    assert back.id == "mine"
    assert back.spans == (Span(0, 1, "right", 1.0), Span(5, 10, "wrong", 2.0))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"text": "x"}, r"in\.json: an object; export as JSON, a list of tasks"),
        ([{"text": "x", "label": []}], r"record 1: data: missing; export as JSON, not as JSON-MIN or CSV"),
        ([task(), {"data": {}}], r"record 2: annotations: missing; export as JSON"),
        ([task(data={"prompt": "Q"})], r"record 1: data: text: missing; it must be a text \(there are: prompt\)"),
        ([task(data={"text": "x"})], r"record 1: data: prompt: missing; add it \(or messages\)"),
        ([task(region(labels=[]))], r"annotations\[0\]\.result\[0\]\.value: labels: none; give the region a label"),
        ([task(region(type="hypertextlabels"))], r"result\[0\]: type: 'hypertextlabels' marks other things"),
        ([task(region(start="/div[1]"))], r"value: start: a text; it must be a whole number"),
        ([task(region(text="Rome"))], r"is 'Paris', but the file says 'Rome'; the text was changed"),
        ([task({"type": "labels"})], r"result\[0\]: value: missing"),
        ([task(region(labels=[""]))], r"result\[0\]\.value: label: empty; name what the span is"),
        ([task(region(start="1" * 5000))], r"value: start: a text; it must be a whole number"),
        ([task(), task(id="")], r"record 2: id: empty; it must be a whole number or a text, or missing"),
        ([task(id=None)], r"record 1: id: null; it must be a whole number or a text, or missing"),
        ([task(data={"text": "x", "prompt": "Q", "gold": float("nan")})], r"record 1: data: gold: holds NaN or"),
    ],
)
def test_a_bad_export_of_label_studio_is_named(tmp_path, content, said):
    with pytest.raises(ValueError, match=said):
        load(tmp_path, "label-studio", content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[\n{"id": 1},\n oops]', r"in\.json: not valid JSON at line 3: Expecting value; export as JSON anew"),
        ("[" * 100_000, r"in\.json: nested more than 100 levels deep; export as JSON anew"),
        ('[{}, {"data": {"n": ' + "1" * 5000 + "}}]", r"in\.json: record 2: data\.n: a number of 5000 digits, at most"),
    ],
)
def test_a_file_of_label_studio_that_is_not_read_is_one_line(tmp_path, content, said):
    (tmp_path / "in.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        importers.load("label-studio", tmp_path / "in.json", "codepoint")


# doccano


@pytest.mark.parametrize(
    "marked",
    [
        {"label": [[5, 10, "wrong"]]},
        {"labels": [[5, 10, "wrong"]]},
        {"entities": [[5, 10, "wrong"]]},
        {"entities": [{"id": 3, "label": "wrong", "start_offset": 5, "end_offset": 10}]},
    ],
)
def test_doccano_marks_spans_in_several_ways(tmp_path, marked):
    row = {"id": 12, "text": EMOJI, "prompt": "Q", "Comments": [], **marked}
    (record,) = load(tmp_path, "doccano", (row,))
    assert (record.id, record.spans, record.columns) == ("12", (Span(5, 10, "wrong"),), {"Comments": []})


def test_doccano_counts_utf16_units_where_asked(tmp_path):
    row = {"text": EMOJI, "prompt": "Q", "label": [[6, 11, "wrong"]]}
    assert load(tmp_path, "doccano", (row,), "utf16")[0].spans == (Span(5, 10, "wrong"),)
    with pytest.raises(ValueError, match=r"in\.json:1: label\[0\]: 6:11 .*; it fits with --offsets utf16"):
        load(tmp_path, "doccano", (row,))


def ours(**fields: Any) -> dict[str, Any]:
    """A record whose field of ours somebody has edited."""
    return {"text": "x", "prompt": "Q", "label": [], "rlkl": fields}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x", "label": ["good"]}, r"label\[0\]: 'good'; it must be \[start, end, label\]"),
        ({"text": "x", "label": [[0, 1, 3]]}, r"label\[0\]: \[0, 1, 3\]; it must be"),
        ({"text": "x", "annotations": []}, r"annotations: labels by number; export as JSONL with text labels"),
        ({"text": "x"}, r"label: missing; it must be a list"),
        ({"text": "x", "label": []}, r"prompt: missing; add it \(or messages\) to the data of every record"),
        ({"label": []}, r"text: missing"),
        ({"text": "x", "prompt": "Q", "label": [], "rlkl": {"weights": [1]}}, r"rlkl: weights\[0\]: 1; it must read"),
        (ours(weights=5), r"rlkl: weights: a whole number; it must be a list"),
        (ours(weights=[[0, 1, "a", float("nan")]]), r"rlkl: weights\[0\]: NaN; it must be a finite number"),
        (ours(weights=[[0, 1, "a", float("inf")]]), r"rlkl: weights\[0\]: Infinity; it must be a finite number"),
        (ours(weights=[[0, 1, "a", 10**400]]), r"rlkl: weights\[0\]: too large; it must be a finite number"),
        (ours(id=""), r"rlkl: id: empty; it must be a whole number or a text"),
        (ours(columns={"c": float("nan")}), r"c: holds NaN or Infinity, which JSON does not have"),
        (ours() | {"id": ""}, r"id: empty; it must be a whole number or a text"),
        (ours() | {"label": [[0, 1, ""]]}, r"label\[0\]: label: empty; name what the span is"),
        (
            {"text": "x", "prompt": "Q", "label": [], "spans": 1},
            r"spans: unknown key, did you mean spans\? Else rename",
        ),
    ],
)
def test_a_bad_line_of_doccano_is_named(tmp_path, row, said):
    good = {"text": "x", "prompt": "Q", "label": []}
    with pytest.raises(ValueError, match=rf"in\.json:2: {said}"):
        load(tmp_path, "doccano", (good, row))

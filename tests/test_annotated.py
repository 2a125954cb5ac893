"""The native format: what is written is read back, and what is wrong is said with line, field and remedy."""

import json
import os
from pathlib import Path

import pytest
from annotations import FILES
from conftest import write_jsonl
from hypothesis import HealthCheck, given, settings

from rlkl.data import annotated, files
from rlkl.data.annotated import Annotated, Span

GOOD = {
    "id": "1",
    "prompt": "The capital of Canada?",
    "completion": " It is Paris.",
    "spans": [{"start": 7, "end": 12, "label": "wrong"}],
}


def with_file(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_record_is_read_with_its_defaults(tmp_path):
    path = with_file(tmp_path, GOOD, {**GOOD, "id": "2", "token_ids": [3, 4], "gold": "Ottawa"})
    first, second = annotated.read(path)
    assert first == Annotated("1", " It is Paris.", (Span(7, 12, "wrong", 1.0),), prompt="The capital of Canada?")
    assert first.completion[first.spans[0].start : first.spans[0].end] == "Paris"
    assert (second.token_ids, second.columns) == ([3, 4], {"gold": "Ottawa"})


def test_annotators_are_those_given_or_those_whom_spans_name(tmp_path):
    spans = [{"start": 0, "end": 3, "label": "x", "annotator": name} for name in ("bob", "ann", "bob")]
    rows = [
        {**GOOD, "spans": spans},
        {**GOOD, "id": "2", "spans": spans, "annotators": ["cy", "ann", "bob"]},
        {**GOOD, "id": "3"},
    ]
    records = annotated.read(with_file(tmp_path, *rows))
    assert [record.annotators for record in records] == [["bob", "ann"], ["cy", "ann", "bob"], None]
    assert [record.judges for record in records] == [2, 3, 1]
    assert annotated.row(records[1]) == rows[1] and records[0].spans[1] == Span(0, 3, "x", annotator="ann")


def test_a_conversation_stands_in_for_the_prompt(tmp_path):
    messages = [{"role": "user", "content": "Hi"}]
    row = {key: value for key, value in GOOD.items() if key != "prompt"} | {"messages": messages}
    (record,) = annotated.read(with_file(tmp_path, row))
    assert (record.prompt, record.messages) == (None, messages)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=FILES)
def test_what_is_written_is_read_back(records, tmp_path):
    path = tmp_path / "data.jsonl"
    files.write(path, annotated.text(records), overwrite=True)
    assert annotated.read(path) == records
    assert annotated.text(annotated.read(path)) == annotated.text(records)


def test_a_byte_order_mark_windows_newlines_and_blank_lines_are_no_matter(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    assert [record.id for record in annotated.read(path)] == ["1"]


def span(**changes: object) -> dict[str, object]:
    return {"spans": [{**GOOD["spans"][0], **changes}]}  # type: ignore[index]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"id": 7}, r"id: a whole number; it must be a text"),
        ({"completion": None}, r"completion: null; it must be a text"),
        ({"completion": "", "spans": []}, r"completion: empty; leave the record out"),
        ({"prompt": ""}, r"prompt: empty; every completion needs what it answers"),
        ({"prompt": None}, r"prompt: neither prompt nor messages; give one"),
        ({"messages": [{"role": "user", "content": "x"}]}, r"prompt: both prompt and messages; give one"),
        ({"prompt": None, "messages": [{"role": "user"}]}, r"messages\[0\]: content: missing; it must be a text"),
        ({"prompt": None, "messages": ["x"]}, r"messages\[0\]: a text; it must be an object with role"),
        ({"spans": {}}, r"spans: an object; it must be a list"),
        ({"spans": [[0, 1, "x"]]}, r"spans\[0\]: a list; it must be an object with start"),
        (span(end=14), r"spans\[0\]: 7:14 is no part of the completion of 13 code points; correct start and end"),
        (span(start=-1), r"-1:12 is no part"),
        (span(end=7), r"7:7 is empty"),
        (span(start=8, end=7), r"8:7 is no part"),
        (span(start=True), r"spans\[0\]: start: true; it must be a whole number"),
        (span(start=1.0), r"start: 1\.0; it must be a whole number"),
        (span(label=" "), r"spans\[0\]: label: empty; name what the span is"),
        ({"id": ""}, r"id: empty; every record needs its own"),
        (span(weight=10**400), r"weight: too large; it must be a finite number"),
        ({"gold": [float("nan")]}, r"gold: holds NaN or Infinity, which JSON does not have; write null"),
        (span(label=3), r"label: a whole number; it must be a text"),
        (span(weight=float("nan")), r"weight: NaN; it must be a finite number"),
        (span(weight="1"), r"weight: a text; it must be a finite number"),
        (span(text="Paris"), r"spans\[0\]: text: unknown; a span has start, end, label and maybe weight and annotator"),
        (span(annotator=""), r"spans\[0\]: annotator: empty; name who marked it, or leave it out"),
        (span(annotator=3), r"annotator: a whole number; it must be a text"),
        ({"annotators": []}, r"annotators: must be a list of different names, one or more"),
        ({"annotators": ["a", "a"], "spans": []}, r"annotators: must be a list of different names"),
        ({"annotators": ["ann"]}, r"spans\[0\]: annotator: missing, and others are named; name who marked every span"),
        ({**span(annotator="bob"), "annotators": ["ann"]}, r"annotators: 'bob' marked a span and is not among them"),
        ({"spans": [*span()["spans"], *span(annotator="bob")["spans"]]}, r"spans\[0\]: annotator: missing"),
        ({"token_ids": []}, r"token_ids: must be a list of token ids, one or more"),
        ({"token_ids": [1, -1]}, r"token_ids: must be"),
        ({"tokens_ids": [1]}, r"tokens_ids: unknown key, did you mean token_ids\? Else rename it"),
        ({"completions": ["x"]}, r"completions: unknown key, did you mean completion"),
        ({"prompt": "\ud83d"}, r"prompt: half a surrogate pair, '\\ud83d'"),
        ({"gold": ["\ude00"]}, r"gold: half a surrogate pair"),
    ],
)
def test_a_bad_record_is_named_by_line_and_field(tmp_path, changes, said):
    path = with_file(tmp_path, {**GOOD, "id": "0"}, {**GOOD, **changes})
    with pytest.raises(ValueError, match=f"^{path}:2: .*{said}"):
        annotated.read(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"no annotated completion in it; it needs at least one"),
        (b"\xff\n", r"not UTF-8 at byte 0; convert the file"),
        (b'{"id": \n', r":1: not valid JSON: Expecting value; correct this record, or leave it out$"),
        (b"\n" + b"[" * 100_000 + b"\n", r":2: nested more than 100 levels deep; correct this record"),
        (b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}\n", r":1: nested more than 100 levels deep; correct this record"),
        (b'{"a": {"b": [0, -' + b"1" * 1001 + b"]}}\n", r":1: a\.b\[1\]: a number of 1002 digits, at most 1000 are"),
        (b"[1]\n", r":1: a list; every record must be an object"),
        (b"{}\n", r":1: completion: missing; it must be a text \(there are: no fields\)"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, content, said):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        annotated.read(path)


def test_nesting_and_numbers_up_to_the_limits_are_read(tmp_path):
    deep = json.loads("[" * 99 + "]" * 99)
    (record,) = annotated.read(with_file(tmp_path, {**GOOD, "deep": deep, "long": 10**999}))
    assert record.columns == {"deep": deep, "long": 10**999}


def test_a_missing_file_and_a_repeated_id_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file; name a \.jsonl file of annotated completions"):
        annotated.read(tmp_path / "none.jsonl")
    path = tmp_path / "twice.jsonl"
    write_jsonl(path, [GOOD, GOOD])
    with pytest.raises(ValueError, match=rf"^{path}:2: id: '1' again, as in {path}:1; every record needs its own"):
        annotated.read(path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.jsonl"
    files.write(path, "old")
    with pytest.raises(ValueError, match=r"exists; name another file, or pass --overwrite"):
        files.write(path, "new")
    with pytest.raises(UnicodeEncodeError):
        files.write(path, "\ud83d", overwrite=True)
    assert (path.read_text(), [p.name for p in tmp_path.iterdir()]) == ("old", ["out.jsonl"])
    files.write(path, "new\n", overwrite=True)
    assert path.read_bytes() == b"new\n"
    assert path.stat().st_mode & 0o044
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere; make it first"):
        files.write(tmp_path / "nowhere" / "out.jsonl", "new")
    with pytest.raises(ValueError, match=r"exists; name another file$"):
        files.write(tmp_path, "new", overwrite=True)
    with files.whole(path) as part:
        assert str(os.getpid()) in part.name  # no two processes write the same part
        part.write_text("whole")
    assert (path.read_text(), len(list(tmp_path.iterdir()))) == ("whole", 1)

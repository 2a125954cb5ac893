"""``rlkl data import|export|check``: what they write and print, and that mistakes write nothing."""

import json
from pathlib import Path

import pytest
from conftest import write_jsonl
from rich.console import Console
from test_importers import EMOJI, QA

from rlkl.cli import main
from rlkl.data import annotated, check
from rlkl.data.annotated import Annotated, Span

ROWS = [
    {"id": "1", "prompt": "Q", "completion": "Line one.", "spans": [
        {"start": 0, "end": 4, "label": "good"}, {"start": 2, "end": 8, "label": "bad", "weight": 2.0}]},
    {"id": "2", "prompt": "Q", "completion": "two", "spans": []},
]  # fmt: skip
LONG = "x" * 300


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a file of each kind."""
    monkeypatch.chdir(tmp_path)
    write_jsonl("qa.jsonl", [QA, QA])
    write_jsonl("native.jsonl", ROWS)
    write_jsonl("emoji.jsonl", [{"id": 1, "text": EMOJI, "prompt": "Q", "label": [[6, 11, "wrong"]]}])
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The one line of an error; nothing is printed or written otherwise."""
    before = sorted((path, path.read_bytes()) for path in Path().iterdir())
    assert main(["data", *command]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sorted((path, path.read_bytes()) for path in Path().iterdir()) == before
    (line,) = printed.err.splitlines()
    return line


def test_import_writes_annotated_completions(capsys):
    assert main(["data", "import", "qa-feedback", "qa.jsonl", "-o", "out.jsonl"]) == 0
    assert capsys.readouterr().out == "out.jsonl: 2 completions, 2 spans\n"
    assert [record.id for record in annotated.read(Path("out.jsonl"))] == ["qa-feedback-1", "qa-feedback-2"]


def test_import_counts_offsets_as_asked(capsys):
    assert main(["data", "import", "doccano", "emoji.jsonl", "-o", "out.jsonl", "--offsets", "utf16"]) == 0
    assert "note: 1 marked completions hold characters beyond U+FFFF" in capsys.readouterr().out
    assert annotated.read(Path("out.jsonl"))[0].spans == (Span(5, 10, "wrong"),)
    line = refused(capsys, "import", "doccano", "emoji.jsonl", "-o", "other.jsonl")
    assert line.startswith("rlkl: emoji.jsonl:1: label[0]: 6:11 is no part of the completion")
    assert line.endswith("; it fits with --offsets utf16")


def test_import_takes_the_sources_of_ragtruth_from_a_file(capsys):
    write_jsonl("response.jsonl", [{"id": "7", "source_id": "s", "response": "x", "labels": []}])
    write_jsonl("sources.jsonl", [{"source_id": "s", "prompt": "Answer:"}])
    assert "source_info.jsonl with --source" in refused(
        capsys, "import", "ragtruth", "response.jsonl", "-o", "out.jsonl"
    )
    command = ["import", "ragtruth", "response.jsonl", "-o", "out.jsonl", "--source", "sources.jsonl"]
    assert main(["data", *command]) == 0
    assert annotated.read(Path("out.jsonl"))[0].prompt == "Answer:"


@pytest.mark.parametrize("tool", ["label-studio", "doccano"])
def test_export_and_import_give_the_file_back(tool, capsys):
    assert main(["data", "export", tool, "native.jsonl", "-o", "out"]) == 0
    assert main(["data", "import", tool, "out", "-o", "back.jsonl"]) == 0
    assert annotated.read(Path("back.jsonl")) == annotated.read(Path("native.jsonl"))
    assert capsys.readouterr().out == "out: 2 completions, 2 spans\nback.jsonl: 2 completions, 2 spans\n"


def test_exported_offsets_are_of_the_kind_asked_for(capsys):
    write_jsonl(
        "n.jsonl", [{"id": "1", "prompt": "Q", "completion": EMOJI, "spans": [{"start": 5, "end": 10, "label": "x"}]}]
    )
    for offsets, bounds in (("codepoint", [5, 10]), ("utf16", [6, 11])):
        assert main(["data", "export", "doccano", "n.jsonl", "-o", offsets, "--offsets", offsets]) == 0
        assert json.loads(Path(offsets).read_text())["label"] == [[*bounds, "x"]]


def test_a_file_is_replaced_only_when_asked(capsys):
    command = ["import", "qa-feedback", "qa.jsonl", "-o", "native.jsonl"]
    assert refused(capsys, *command) == "rlkl: native.jsonl: exists; name another file, or pass --overwrite"
    assert "or pass --overwrite" in refused(capsys, "export", "doccano", "native.jsonl", "-o", "qa.jsonl")
    assert main(["data", *command, "--overwrite"]) == 0
    assert annotated.read(Path("native.jsonl"))[0].id == "qa-feedback-1"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["import", "qa-feedback", "none.jsonl", "-o", "out"], "none.jsonl: no such file; name a .jsonl file of qa"),
        (["import", "qa-feedback", "native.jsonl", "-o", "out"], "native.jsonl:1: prediction 1: missing; it must be"),
        (["import", "qa-feedback", "qa.jsonl", "-o", "no/out"], "no/out: there is no folder no; make it first"),
        (["import", "qa-feedback", LONG, "-o", "out"], f"{LONG}: cannot be read (File name too long); name a .jsonl"),
        (["import", "qa-feedback", "qa.jsonl", "-o", LONG], f"{LONG}: cannot be written (File name too long); name"),
        (["import", "qa-feedback", "qa.jsonl", "-o", "/proc/x.jsonl"], "/proc/x.jsonl: cannot be written ("),
        (["check", "/proc/self/mem"], "/proc/self/mem: cannot be read (Input/output error); name a .jsonl file of ann"),
        (["check", "native.jsonl", "--tokenizer", LONG], f"--tokenizer {LONG}: no such folder; name one"),
        (["import", "other", "qa.jsonl", "-o", "out"], "Invalid value for"),
        (["import", "doccano", "emoji.jsonl", "-o", "out", "--offsets", "bytes"], "Invalid value for '--offsets'"),
        (["import", "doccano", "emoji.jsonl", "-o", "out", "--source", "x"], "--source x: only ragtruth has a second"),
        (["export", "doccano", "qa.jsonl", "-o", "out"], "qa.jsonl:1: completion: missing"),
        (["check", "qa.jsonl"], "qa.jsonl:1: completion: missing; it must be a text (there are: question"),
        (["check", "native.jsonl", "--tokenizer", "none"], "--tokenizer none: no such folder; name one"),
        (
            ["check", "native.jsonl", "--weights", "good=1"],
            "--weights: weights are counted on tokens; name a tokenizer",
        ),
        (["check", "native.jsonl", "--tokenizer", ".", "--weights", "good"], "--weights good: must read label=weight"),
        (["check", "native.jsonl", "--tokenizer", ".", "--weights", "a=nan"], "--weights a=nan: must read label="),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(capsys, command, said):
    assert refused(capsys, *command).startswith(f"rlkl: {said}")


def test_check_counts_spans_and_characters(capsys):
    assert main(["data", "check", "native.jsonl"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 completions, 1 without a span, 0 with token ids; 2 spans"
    assert lines[1] == "coverage: 8 of 12 characters (66.7%)"
    assert [line.split() for line in lines[2:5]] == [
        ["label", "spans", "characters", "dropped", "weight"],
        ["bad", "1", "6", "-", "-"],
        ["good", "1", "4", "-", "-"],
    ]
    assert lines[5:] == ["", "1:", "[Li[ne]good one]bad."], "completions without a span are not shown"


def test_check_counts_tokens_with_a_tokenizer(capsys, tiny_model):
    rows = [
        *ROWS,
        {"id": "3", "prompt": "Q", "completion": "a<eos>", "spans": [{"start": 1, "end": 6, "label": "bad"}]},
    ]
    write_jsonl("tokens.jsonl", rows)
    command = ["check", "tokens.jsonl", "--tokenizer", str(tiny_model), "--samples", "0"]
    assert main(["data", *command, "--weights", "good=4", "--weights", "bad=-2", "--weights", "spare=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("coverage: ") and " tokens (" in lines[2]
    assert lines[3] == "dropped: 1 spans that mark no token"
    assert "marked tokens: " in lines[4] and lines[4].endswith(" nothing")
    assert [line.split() for line in lines[6:]] == [
        ["bad", "2", "11", "1", "-2"],
        ["good", "1", "4", "0", "4"],
        ["spare", "0", "0", "0", "1"],
    ]
    assert "weights: none for 'bad' (record '1'); every label" in refused(capsys, *command, "--weights", "good=4")


def test_check_reports_how_far_annotators_agree(capsys, tiny_model):
    def judged(name: str, *spans: tuple[int, int, str, str]) -> dict[str, object]:
        held = [dict(zip(("start", "end", "label", "annotator"), span, strict=True)) for span in spans]
        return {"id": name, "prompt": "Q", "completion": "abcd", "spans": held, "annotators": ["ann", "bob"]}

    two = [(0, 2, "bad", "ann"), (0, 1, "bad", "bob"), (3, 4, "good", "ann"), (3, 4, "bad", "bob")]
    alone = {"id": "3", "prompt": "Q", "completion": "abc", "spans": [], "annotators": ["ann"]}
    write_jsonl("several.jsonl", [judged("1", *two), judged("2"), alone])
    command = ["check", "several.jsonl", "--tokenizer", str(tiny_model), "--samples", "1"]
    assert main(["data", *command]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "annotators: ann 3, bob 2; 2 judged by several"
    # Eight pairs of characters: 5 of 16 marked, one unequal pair: 1 - 2 * 15 / (16 ** 2 - 5 ** 2 - 11 ** 2)
    assert lines[3].startswith(
        "agreement, marked or not: Krippendorff's alpha 0.727, 87.5% of pairs equal, on 8 characters"
    )
    assert "alpha 0.727" in lines[5] and lines[5].endswith("on 8 tokens judged by several")
    table = {line.split()[0]: line.split()[-1] for line in lines[7:10]}
    # bad: 4 of 16, two unequal; good: 1 of 16, one unequal
    assert table == {"label": "alpha", "bad": f"{1 - 60 / 96:.3f}", "good": f"{1 - 30 / 30:.3f}"}
    assert lines[12] == "[[a]bad@bobb]bad@annc[[d]bad@bob]good@ann"


def test_check_shows_so_many_samples(capsys):
    rows = [{**ROWS[0], "id": f"number {n}"} for n in range(5)]
    write_jsonl("many.jsonl", rows)
    for asked in (0, 2, 9):
        assert main(["data", "check", "many.jsonl", "--samples", str(asked)]) == 0
        assert capsys.readouterr().out.count("number ") == min(asked, 5)


def test_samples_are_coloured_on_a_terminal():
    record = Annotated("1", "ab c", (Span(0, 2, "good"), Span(3, 4, "bad")), prompt="Q")
    console = Console(force_terminal=True, color_system="standard", width=80, highlight=False, _environ={})
    with console.capture() as captured:
        for text in check.samples([record], 1, colour=True):
            console.print(text)
    shown = captured.get()
    assert "\x1b[30;42mab\x1b[0m \x1b[30;41mc\x1b[0m" in shown
    assert "\x1b[30;41mbad\x1b[0m  \x1b[30;42mgood\x1b[0m" in shown, "with a legend"


def test_overlapping_spans_are_bracketed_each():
    spans = (Span(0, 3, "a"), Span(1, 2, "b"), Span(2, 4, "c"), Span(2, 4, "d"))
    assert check.bracketed(Annotated("1", "wxyz", spans, prompt="Q")) == "[w[x]b[[y]az]d]c"

"""Published and exported annotations to annotated completions.

The prompt of a qa-feedback record is laid out by ``QA_PROMPT``; that of a RAGTruth record is the published one, as it
is (its authors wrapped it in ``<s>[INST] ... [/INST]`` for Llama and Mistral models).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlkl.data import annotated, files, labelling
from rlkl.data.annotated import Annotated, refuse, take
from rlkl.data.offsets import Offsets, read_span, wide

QA_PROMPT = "{passages}\n\nQuestion: {question}\nAnswer:\n"
"""Passages (title, then sentences) are separated by blank lines."""

Placed = Iterator[tuple[str, Annotated]]


def load(kind: str, path: Path, offsets: Offsets, source: Path | None = None) -> tuple[list[Annotated], list[str]]:
    """The annotated completions of a file of that format, and what its reader should know.

    Raises:
        ValueError: the file is not of that format; it names record, field and remedy.
    """
    if source is not None and kind != "ragtruth":
        raise ValueError(f"--source {source}: only ragtruth has a second file; leave it out")
    notes: list[str] = []
    records = annotated.distinct(READERS[kind](path, offsets, source, notes), path)
    unsure = sum(wide(record.completion) > 0 for record in records if record.spans)
    if unsure and kind in ("qa-feedback", "doccano"):
        notes.append(
            f"{unsure} marked completions hold characters beyond U+FFFF, where code points and UTF-16 units differ; "
            f"{kind} stores no text of a span to compare: look at `rlkl data check`, and import with the other "
            "--offsets if spans are shifted"
        )
    return records, notes


def qa_feedback(path: Path, offsets: Offsets, source: None, notes: list[str]) -> Placed:
    """qa-feedback (Wu et al. 2023, arXiv 2306.01693): spans mark errors of ``prediction 1``, by their error type."""
    for number, (where, row) in enumerate(files.lines(path, "name a .jsonl file of qa-feedback"), 1):
        completion = take(where, row, "prediction 1", str)
        feedback = take(where, row, "feedback", dict)
        spans = []
        for i, error in enumerate(take(f"{where}: feedback", feedback, "errors", list)):
            at = f"{where}: feedback.errors[{i}]"
            bounds = take(at, error, "start", int), take(at, error, "end", int)
            spans.append(read_span(at, completion, *bounds, take(at, error, "error type", str), offsets))
        columns = {
            "question": take(where, row, "question", str),
            "passages": _passages(where, row),
            "gold": take(where, row, "gold", str),
            "prediction": completion,
            "predictions": [take(where, row, f"prediction {n}", str) for n in (1, 2, 3, 4)],
            "preference": take(where, row, "preference", list),
            "corrected_prediction": take(f"{where}: feedback", feedback, "corrected-prediction", str),
            "missing_info": take(f"{where}: feedback", feedback, "missing-info", list),
        }
        prompt = QA_PROMPT.format(passages=columns["passages"], question=columns["question"])
        name = f"qa-feedback-{number}"
        yield where, annotated.build(where, name, {"prompt": prompt}, completion, spans, columns=columns)


def _passages(where: str, row: dict[str, Any]) -> str:
    """A passage is a list of its title and its sentences; the first sentence may repeat the title as a heading."""
    blocks = []
    for i, passage in enumerate(take(where, row, "passages", list)):
        if not isinstance(passage, list) or not passage or not all(isinstance(part, str) for part in passage):
            refuse(where, f"passages[{i}]", f"{annotated.kind(passage)}; it must be a list of title and sentences")
        title, body = passage[0], " ".join(passage[1:])
        blocks.append(title + "\n" + body.removeprefix(title).lstrip())
    return "\n\n".join(blocks)


def ragtruth(path: Path, offsets: Offsets, source: Path | None, notes: list[str]) -> Placed:
    """RAGTruth (Niu et al. 2024, arXiv 2401.00396): responses, with their prompts in a file of sources beside them."""
    held = source or path.with_name("source_info.jsonl")
    sources: dict[str, tuple[str, dict[str, Any]]] = {}
    for where, row in files.lines(held, "give RAGTruth's source_info.jsonl with --source"):
        key = take(where, row, "source_id", str)
        if key in sources:
            refuse(where, "source_id", f"{key!r} again, as in {sources[key][0]}; keep the one that was answered")
        sources[key] = where, row
    for where, row in files.lines(path, "name RAGTruth's response.jsonl"):
        completion, key = take(where, row, "response", str), take(where, row, "source_id", str)
        if key not in sources:
            refuse(where, "source_id", f"{key!r} is not in {held}; give the source_info.jsonl of these responses")
        at_source, info = sources[key]
        spans = []
        for i, label in enumerate(take(where, row, "labels", list)):
            at = f"{where}: labels[{i}]"
            bounds = take(at, label, "start", int), take(at, label, "end", int)
            named, stored = take(at, label, "label_type", str), take(at, label, "text", str)
            spans.append(read_span(at, completion, *bounds, named, offsets, stored))
        columns = {name: row[name] for name in ("source_id", "model", "temperature", "split", "quality") if name in row}
        columns |= {name: info[name] for name in ("task_type", "source") if name in info}
        columns["labels"] = row["labels"]
        prompt = {"prompt": take(at_source, info, "prompt", str)}
        yield where, annotated.build(where, take(where, row, "id", str), prompt, completion, spans, columns=columns)


READERS: dict[str, Callable[[Path, Offsets, Any, list[str]], Placed]] = {
    "qa-feedback": qa_feedback,
    "ragtruth": ragtruth,
    "label-studio": labelling.read_label_studio,
    "doccano": labelling.read_doccano,
}

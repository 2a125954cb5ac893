"""Annotated completions for tests: random ones, full of characters that are easily miscounted."""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from rlkl.data.annotated import Annotated, Span

ODD = 'a b\n\r\t\u00e9e\u0301\u4e2d\U0001f600\U0001f468\u200d\U0001f692\u2028\ufeff\ufffd"\\[]Z\u0130'
TEXT = st.text(st.sampled_from(ODD) | st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30)
LABELS = st.sampled_from(["right", "wrong", "é=😀"])
JSON = st.recursive(st.none() | st.booleans() | st.integers() | TEXT, lambda x: st.lists(x, max_size=2), max_leaves=3)


@st.composite
def spans(draw: Any, text: str) -> Span:
    """A span of a text."""
    start = draw(st.integers(0, len(text) - 1))
    end = draw(st.integers(start + 1, len(text)))
    return Span(start, end, draw(LABELS), draw(st.sampled_from([1.0, 1.0, 0.5, -2.0])))


@st.composite
def annotated(draw: Any) -> Annotated:
    """A record with any of the fields that one may have."""
    completion = draw(TEXT)
    marked = draw(st.lists(spans(completion), max_size=4))
    people = draw(st.none() | st.lists(st.sampled_from(["ann", "bob", "é 😀"]), min_size=1, unique=True))
    if people is not None:
        marked = [replace(span, annotator=draw(st.sampled_from(people))) for span in marked]
    message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT})
    asked: dict[str, Any] = draw(
        st.fixed_dictionaries({"prompt": TEXT}) | st.fixed_dictionaries({"messages": st.lists(message, min_size=1)})
    )
    return Annotated(
        id=draw(TEXT),
        completion=completion,
        spans=tuple(marked),
        annotators=people,
        token_ids=draw(st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=5)),
        columns=draw(st.dictionaries(st.sampled_from(["gold", "text", "label", "rlkl", "data"]), JSON, max_size=3)),
        **asked,
    )


FILES = st.lists(annotated(), min_size=1, max_size=3, unique_by=lambda record: record.id)

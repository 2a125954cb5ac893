"""What a file of annotated completions holds: counts, dropped spans, coverage, and samples to look at."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from rlkl.data import agreement
from rlkl.data.annotated import Annotated, Span, check_weights

COLOURS = ("red", "green", "yellow", "blue", "magenta", "cyan")


def statistics(
    records: Sequence[Annotated], tokenizer: Any = None, weights: Mapping[str, float] | None = None
) -> Iterator[str]:
    """Counts by label and coverage: the share of characters, and with a tokenizer of tokens, inside a span.

    Where two or more annotators judged a completion, also how far they agree.

    Raises:
        ValueError: a label has no weight, or token ids do not belong to the tokenizer.
    """
    if weights is not None:
        check_weights(records, weights)
    spans = Counter(span.label for record in records for span in record.spans)
    marked = Counter({label: sum(len(inside(r, label)) for r in records) for label in spans})
    covered = sum(len(inside(record)) for record in records)
    length = sum(len(record.completion) for record in records)
    bare = sum(not record.spans for record in records)
    known = sum(record.token_ids is not None for record in records)
    yield f"{len(records)} completions, {bare} without a span, {known} with token ids; {sum(spans.values())} spans"
    yield f"coverage: {covered} of {length} characters ({covered / length:.1%})"
    texts = [len(r.completion) for r in records], [[range(s.start, s.end) for s in r.spans] for r in records]
    several = sum(record.judges > 1 for record in records)
    if people := Counter(name for record in records for name in record.annotators or []):
        named = ", ".join(f"{name} {n}" for name, n in sorted(people.items()))
        yield f"annotators: {named}; {several} judged by several"
    if several:
        yield _agreed("characters", agreement.krippendorff(agreement.units(records, *texts)))
    dropped: Counter[str] = Counter()
    if tokenizer is not None:
        from rlkl.data.spans import token_weights

        made = [token_weights(record, tokenizer, weights or dict.fromkeys(spans, 1.0)) for record in records]
        dropped = sum((one.dropped for one in made), dropped)
        tokens, total = sum(int(one.marked_T.sum()) for one in made), sum(len(one.ids) for one in made)
        yield f"coverage: {tokens} of {total} tokens ({tokens / total:.1%})"
        if several:
            cut = [len(one.ids) for one in made], [one.places for one in made]
            yield _agreed("tokens", agreement.krippendorff(agreement.units(records, *cut)))
        yield f"dropped: {dropped.total()} spans that mark no token"
        if weights is not None:
            signs = Counter(int(w.sign()) for one in made for w in one.weight_T[one.marked_T])
            yield f"marked tokens: {signs[1]} weigh above 0, {signs[-1]} below, {signs[0]} nothing"
    width = max(map(len, ("label", *spans, *(weights or {}))))
    yield f"{'label':<{width}}  spans  characters  dropped  weight" + "   alpha" * bool(several)
    for label in sorted({*spans, *(weights or {})}, key=lambda label: (-spans[label], label)):
        lost = "-" if tokenizer is None else str(dropped[label])
        weight = "-" if weights is None else f"{weights[label]:g}"
        alike = agreement.krippendorff(agreement.units(records, *texts, label)) if several else None
        alpha = f"  {_alpha(alike):>6}" if several else ""
        yield f"{label:<{width}}  {spans[label]:>5}  {marked[label]:>10}  {lost:>7}  {weight:>6}{alpha}"


def _agreed(what: str, found: agreement.Agreement | None) -> str:
    assert found is not None, "nobody judged what somebody else did"
    return (
        f"agreement, marked or not: Krippendorff's alpha {_alpha(found)}, {found.observed:.1%} of pairs equal, "
        f"on {found.units} {what} judged by several"
    )


def _alpha(found: agreement.Agreement | None) -> str:
    """Alpha, or a dash where all values are the same."""
    return "-" if found is None or found.alpha is None else f"{found.alpha:.3f}"


def inside(record: Annotated, label: str | None = None) -> set[int]:
    """The code points of a completion that lie in a span, of one label or of any."""
    return {i for span in record.spans if label in (None, span.label) for i in range(span.start, span.end)}


def samples(records: Sequence[Annotated], count: int, colour: bool) -> Iterator[Text]:
    """The first completions that have spans, with their labels; in colour, or else between brackets."""
    labels = sorted({span.label for record in records for span in record.spans})
    styles = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    for record in [record for record in records if record.spans][:count]:
        yield Text(f"\n{record.id}:", style="bold")
        yield coloured(record, styles) if colour else Text(bracketed(record))
    if colour and count:
        yield Text("\n") + Text("  ").join(Text(label, style=f"black on {style}") for label, style in styles.items())


def coloured(record: Annotated, styles: Mapping[str, str]) -> Text:
    """A completion with its spans on the colours of their labels; where they overlap, the last one shows."""
    shown = Text(record.completion)
    for span in record.spans:
        shown.stylize(f"black on {styles[span.label]}", span.start, span.end)
    return shown


def bracketed(record: Annotated) -> str:
    """A completion with its spans as ``[text]label``, or ``[text]label@annotator``, which also shows overlaps."""
    marks = [(span.end, 0, -i, f"]{span.label}{_who(span)}") for i, span in enumerate(record.spans)]
    marks += [(span.start, 1, i, "[") for i, span in enumerate(record.spans)]
    shown, reached = "", 0
    for place, _, _, mark in sorted(marks):
        shown += record.completion[reached:place] + mark
        reached = place
    return shown + record.completion[reached:]


def _who(span: Span) -> str:
    return "" if span.annotator is None else f"@{span.annotator}"

"""Spans of characters to weights of tokens.

A token is marked by a span if it writes any part of one of its characters: " Canada" by a span over "Canada", and each
of the tokens that share one character by a span over it. Spans that overlap add up. Special tokens are never marked.

Several annotators of a completion count alike: a token weighs the mean over them, of the sum of an annotator's spans
over it, or of what unmarked tokens weigh (0 where they are masked) if that annotator left it alone.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlkl.data.annotated import Annotated, Span, check_weights
from rlkl.data.prompts import rendered
from rlkl.sampling import given
from rlkl.types import End, Rollout

CUT = "\ufffd"  # what the bytes of an unfinished character decode to


def common(first: str, second: str) -> int:
    """The length of the longest common prefix of two texts."""
    if second.startswith(first):
        return len(first)
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(second))


class Decoded:
    """Which of given tokens write which characters of a text, found by decoding prefixes: O(log T) of them a span.

    The tokens may write more than the text: a special token or a stop string at its end.
    """

    def __init__(self, ids: Sequence[int], decode: Callable[[list[int]], str], text: str) -> None:
        self.ids, self.decode, self.text = list(ids), decode, text
        self.prefixes = range(1, len(self.ids) + 1)

    def tokens(self, start: int, end: int) -> Sequence[int]:
        """The tokens that write any part of ``text[start:end]``, by their places."""
        first = bisect_left(self.prefixes, start + 1, key=self._touched)
        last = bisect_left(self.prefixes, end, key=self._written)
        return range(first, min(last + 1, len(self.ids)))

    def certain(self, point: int) -> int:
        """The token at which code point ``point`` is read, whatever follows; the last one, where the text ends first.

        A replacement character may still become another one, so it is certain only once something follows it.
        """
        found = bisect_left(self.prefixes, point + 1, key=lambda n: self._common(self._prefix(n).rstrip(CUT)))
        return min(found, len(self.ids) - 1)

    def pieces(self) -> list[str]:
        """What each token writes of the text; a character belongs to the token that completes it.

        Together they are the text: what no prefix settles is the last writing token's.
        """
        ends, reached = [], 0
        for count in self.prefixes:
            reached = max(reached, self._written(count))
            ends.append(reached)
        last = next((t for t, end in enumerate(ends) if end == reached), 0)
        ends = [len(self.text) if t >= last else end for t, end in enumerate(ends)]
        return [self.text[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _written(self, count: int) -> int:
        return self._common(self._prefix(count))

    def _touched(self, count: int) -> int:
        """Characters written after so many tokens, with the one that is begun."""
        prefix = self._prefix(count)
        written = self._common(prefix)
        return written + (len(prefix) > written)

    def _prefix(self, count: int) -> str:
        return self.decode(self.ids[:count])

    def _common(self, prefix: str) -> int:
        return common(prefix, self.text)


class Tokenised:
    """Which tokens write which characters of a text that a fast tokenizer has cut, by its own offsets.

    Characters that no token claims go to the tokens before (a mark that NFC has merged into its letter) or, from white
    space on, to the token after (tokenizers that trim their offsets).
    """

    def __init__(self, offsets: Sequence[tuple[int, int]], text: str) -> None:
        self.offsets: list[tuple[int, int]] = []
        reached = 0
        for start, end in [*offsets, (len(text), len(text))]:
            if start > reached:
                gap = text[reached:start]
                merged = reached + next((i for i, c in enumerate(gap) if c.isspace()), len(gap))
                self.offsets = [(s, merged if e == reached else e) for s, e in self.offsets]
                start = merged
            self.offsets.append((start, end))
            reached = max(reached, end)
        self.offsets.pop()

    def tokens(self, start: int, end: int) -> Sequence[int]:
        """The tokens that write any part of ``text[start:end]``, by their places."""
        return [t for t, (first, last) in enumerate(self.offsets) if first < end and last > start]


@dataclass(frozen=True)
class TokenWeights:
    """Tokens of a completion with their weights; ``covered`` and ``dropped`` count spans by label.

    ``marked_T`` are the tokens that carry a weight; all others weigh 0 and are to be masked. ``places`` are the tokens
    of each span; a span without any is dropped.
    """

    ids: list[int]
    weight_T: Tensor
    marked_T: Tensor
    places: list[list[int]]
    covered: Counter[str]
    dropped: Counter[str]


def token_weights(
    record: Annotated,
    tokenizer: Any,
    weights: Mapping[str, float],
    unmarked: float | None = None,
    *,
    eos_id: int | None = None,
    limit: int | None = None,
) -> TokenWeights:
    """The weight of every token of a completion: the label's weight times the span's, added up over spans.

    Token ids are used where they are known. Else the completion is tokenised apart from the prompt, whose tokens it
    continues when it is sampled, and ``eos_id`` ends it, where given. ``limit`` cuts what is longer.
    Tokens of no span weigh ``unmarked``, or are masked if that is None.

    Raises:
        ValueError: a label has no weight, or the token ids are not those of the completion.
    """
    check_weights([record], weights)
    ids, place = placed(record, tokenizer)
    if eos_id is not None and record.token_ids is None:
        ids = [*ids, eos_id]
    ids = ids[:limit]
    special = set(tokenizer.all_special_ids)
    found = [[t for t in place.tokens(s.start, s.end) if t < len(ids) and ids[t] not in special] for s in record.spans]
    weight_T, marked_T = add_up(record.spans, found, weights, len(ids), unmarked, record.judges)
    covered, dropped = (
        Counter(span.label for span, tokens in zip(record.spans, found, strict=True) if bool(tokens) == kept)
        for kept in (True, False)
    )
    return TokenWeights(ids, weight_T, marked_T, found, covered, dropped)


def add_up(
    spans: Sequence[Span],
    tokens: Sequence[Sequence[int]],
    weights: Mapping[str, float],
    length: int,
    unmarked: float | None,
    judges: int = 1,
) -> tuple[Tensor, Tensor]:
    """Weights and marks of ``length`` tokens, from the spans of so many annotators and the tokens that each marks."""
    weight_T = torch.zeros(length)
    marked: dict[str | None, Tensor] = {}
    for span, places in zip(spans, tokens, strict=True):
        place_N = torch.tensor(list(places), dtype=torch.long)
        weight_T[place_N] += weights[span.label] * span.weight / judges
        marked.setdefault(span.annotator, torch.zeros(length, dtype=torch.bool))[place_N] = True
    by_T = torch.stack(list(marked.values())).sum(0) if marked else torch.zeros(length, dtype=torch.long)
    if unmarked is None:
        return weight_T, by_T > 0
    return weight_T + unmarked * (judges - by_T) / judges, torch.ones(length, dtype=torch.bool)


def placed(record: Annotated, tokenizer: Any) -> tuple[list[int], Decoded | Tokenised]:
    """The tokens of a completion, and what knows their places: decoding, where it gives the completion back.

    Raises:
        ValueError: there is no token, or those that are known are not those of the completion.
    """
    text, fast = record.completion, tokenizer.is_fast
    cut = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast)
    ids = cut["input_ids"] if record.token_ids is None else record.token_ids
    if not ids:
        raise ValueError(f"record {record.id!r}: completion: {text!r} has no token; leave the record out")
    if max(ids) >= len(tokenizer):
        raise ValueError(
            f"record {record.id!r}: token_ids: {max(ids)} is beyond the {len(tokenizer)} tokens of this tokenizer; "
            "they belong to another one: leave token_ids out to have the completion tokenised"
        )
    own = ids[: len(cut["input_ids"])] == cut["input_ids"]  # maybe with an end behind
    if own and fast and CUT in text:
        return ids, Tokenised(cut["offset_mapping"], text)
    for skip in (False, True):
        decode = partial(_decode, tokenizer, skip)
        if decode(ids).startswith(text):
            return ids, Decoded(ids, decode, text)
    if own and fast:  # a tokenizer that normalises what it reads
        return ids, Tokenised(cut["offset_mapping"], text)
    written = _decode(tokenizer, False, ids)
    at = common(written, text)
    raise ValueError(
        f"record {record.id!r}: token_ids: they decode to {written[at : at + 20]!r} where the completion has "
        f"{text[at : at + 20]!r} (from code point {at}); leave token_ids out to have the completion tokenised"
    )


def _decode(tokenizer: Any, skip: bool, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=skip))


def to_rollout(
    records: Sequence[Annotated],
    tokenizer: Any,
    weights: Mapping[str, float],
    unmarked: float | None = None,
    *,
    eos_id: int | None = None,
    max_prompt_tokens: int | None = None,
    max_completion_tokens: int | None = None,
) -> Rollout:
    """Annotated completions as a rollout: ``annotation_BT`` weighs tokens, ``annotated_BT`` says which carry a weight.

    A completion ends by ``eos_id``, appended where token ids are not known, else at the limit; longer ones are cut.
    The columns hold ``id``, ``spans`` (as in a file, each with its ``tokens``) and each record's own.

    Raises:
        ValueError: there is no record, a prompt is too long or has no token, or a completion cannot be encoded.
    """
    if not records:
        raise ValueError("annotated completions: none; at least one is needed")
    check_weights(records, weights)
    asked = [{"prompt": r.prompt} if r.messages is None else {"messages": r.messages} for r in records]
    prompts = [rendered(row, tokenizer) for row in asked]
    for record, (_, ids) in zip(records, prompts, strict=True):
        if not ids or (max_prompt_tokens is not None and len(ids) > max_prompt_tokens):
            most = "" if max_prompt_tokens is None else f", {max_prompt_tokens} at most"
            raise ValueError(f"record {record.id!r}: its prompt has {len(ids)} tokens; it needs 1 or more{most}")
    made = [
        token_weights(record, tokenizer, weights, unmarked, eos_id=eos_id, limit=max_completion_tokens)
        for record in records
    ]
    ended_B = torch.tensor([one.ids[-1] == eos_id for one in made])
    groups = {text: group for group, text in enumerate(dict.fromkeys(row["prompt"] for row, _ in prompts))}
    return given(
        [ids for _, ids in prompts],
        [one.ids for one in made],
        end_B=torch.where(ended_B, int(End.EOS), int(End.LIMIT)),
        group_B=torch.tensor([groups[row["prompt"]] for row, _ in prompts]),
        origin="data",
        annotation_BT=pad_sequence([one.weight_T for one in made], batch_first=True),
        annotated_BT=pad_sequence([one.marked_T for one in made], batch_first=True),
        columns=_columns(records, [row for row, _ in prompts], made),
        decode=lambda ids: str(tokenizer.decode(ids)),
    )


def _columns(
    records: Sequence[Annotated], prompts: Sequence[Mapping[str, Any]], made: Sequence[TokenWeights]
) -> dict[str, list[Any]]:
    rows = []
    for record, prompt, one in zip(records, prompts, made, strict=True):
        pairs = zip(record.spans, one.places, strict=True)
        spans = [
            {**{k: v for k, v in asdict(span).items() if v is not None}, "tokens": tokens} for span, tokens in pairs
        ]
        judged = {} if record.annotators is None else {"annotators": record.annotators}
        rows.append({**record.columns, **prompt, **judged, "id": record.id, "spans": spans})
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}

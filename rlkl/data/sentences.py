"""Sentences of a completion, by a rule that reads one character ahead, and the tokens at which they are scored.

A sentence ends behind one of . ! ? … (with the quotes and brackets that close behind it) where white space follows,
behind 。 ！ ？ where anything follows, before a line break, and with the text. "3.5" is no end; "Dr. " is one. That a
sentence has ended is known once the character behind it is read, and nothing later can change it.
"""

import re
from collections.abc import Mapping
from typing import Any

from rlkl.data.annotated import Annotated, check_weights
from rlkl.data.spans import Decoded, Tokenised, add_up, placed

END = re.compile(r"""[.!?…]["')\]”’»]*+(?=\s)|[。！？]["'”’」』）)]*+(?=.)|(?=\n)""", re.DOTALL)
Bounds = tuple[int, int]


def sentences(text: str) -> list[Bounds]:
    """Start and end (exclusive) of every sentence, in code points, without the white space around it."""
    found, reached = [], 0
    for end in [*(match.end() for match in END.finditer(text)), len(text)]:
        piece = text[reached:end]
        if said := piece.strip():
            start = reached + piece.index(said)
            found.append((start, start + len(said)))
            reached = end
    return found


def last_tokens(text: str, place: Decoded | Tokenised) -> dict[int, Bounds]:
    """The token that writes the end of each sentence, with its bounds; sentences that share it are one.

    A sentence that no token writes is left out.
    """
    found: dict[int, Bounds] = {}
    for start, end in sentences(text):
        if tokens := place.tokens(start, end):
            found[tokens[-1]] = found.get(tokens[-1], (start, end))[0], end
    return found


def sentence_weights(
    record: Annotated, tokenizer: Any, weights: Mapping[str, float], unmarked: float | None, eos_id: int
) -> tuple[list[int], list[float | None]]:
    """The tokens of a completion, as :func:`rlkl.data.spans.token_weights` makes them, and the score of each.

    At the last token of a sentence it is the sum of the weights of the spans that touch the sentence, ``unmarked``
    where none does; there is none elsewhere, or where that is None. Several annotators count as for tokens.

    Raises:
        ValueError: a label has no weight, or the token ids are not those of the completion.
    """
    check_weights([record], weights)
    ids, place = placed(record, tokenizer)
    ended = last_tokens(record.completion, place)
    bounds = list(ended.values())
    touched = [[k for k, (start, end) in enumerate(bounds) if s.start < end and s.end > start] for s in record.spans]
    weight_S, marked_S = add_up(record.spans, touched, weights, len(bounds), unmarked, record.judges)
    target: list[float | None] = [None] * (len(ids) + (record.token_ids is None))
    for token, weight, marked in zip(ended, weight_S.tolist(), marked_S.tolist(), strict=True):
        target[token] = weight if marked else None
    return [*ids, eos_id] if record.token_ids is None else ids, target

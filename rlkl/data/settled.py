"""Tokens of another tokenizer over a completion, each placed at the policy's token at which it is certain.

How a text is cut depends on what follows: "Par" may become "Paris". So a value of another tokenizer's token is causal
only once its word is over, that is, once the first visible character after white space is read; white space counts
with the word that it stands before. No tokenizer in use cuts a word by what stands before or after such a gap.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlkl.data.spans import Decoded, Tokenised


@dataclass(frozen=True)
class Settled:
    """``ids`` of the other tokenizer over a completion's text; ``paid`` is the policy's token where each is certain.

    ``place`` knows which characters each of them writes.
    """

    ids: list[int]
    paid: list[int]
    place: Tokenised


def settled(ids: Sequence[int], decode: Callable[[list[int]], str], text: str, tokenizer: Any) -> Settled:
    """Cut the ``text`` of a completion with policy tokens ``ids`` by another, fast tokenizer.

    A token is paid where the first word after its own begins, at the last policy token where none does.
    """
    cut = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    decoded = Decoded(ids, decode, text)
    gaps = [match.span() for match in re.finditer(r"\s+(?=\S)", text)]
    at = [decoded.certain(begin) for _, begin in gaps] + [len(decoded.ids) - 1]
    over = [end for end, _ in gaps]  # white space itself may be merged into the word after it
    place = Tokenised(cut["offset_mapping"], text)
    return Settled(list(cut["input_ids"]), [at[bisect_left(over, end)] for _, end in place.offsets], place)

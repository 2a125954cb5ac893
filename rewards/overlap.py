"""Word overlap with a reference answer: a reward that needs no model."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any


def word_f1(prompts: Sequence[str], completions: Sequence[str], gold: Sequence[str], **_: Any) -> list[float]:
    """F1 of the multisets of lower-cased words of a completion and of the column ``gold``, between 0 and 1."""
    scores = []
    for completion, answer in zip(completions, gold, strict=True):
        ours, theirs = (Counter(re.findall(r"\w+", text.lower())) for text in (completion, answer))
        common = (ours & theirs).total()
        scores.append(2 * common / (ours.total() + theirs.total()) if common else 0.0)
    return scores

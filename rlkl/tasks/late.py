"""A reward on edits of `fix` that depends on the last two fields: what `configs/compare/horizon.yaml` asks. Torch-free.

Fields 3 and 4 of x′ pay a sixth of their value each, 0 where they are no field: at the end (`terminal`), or each at its
own token (`dense`); the sums are the same. The tag, four tokens before, says which of the two is edited at all. So a
horizon of 1 sees the last field, of 2 both, and only one of 5, the length, sees what the tag decides.
"""

from collections.abc import Sequence
from typing import Any

from rlkl.tasks import fix

PAID = (3, 4)  # places of the fields in x′
MOST = 2 * (fix.VALUES - 1)


def terminal(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """The sum of fields 3 and 4 of each completion over 6, between 0 and 1."""
    return [sum(_value(text, place) for place in PAID) / MOST for text in completions]


def dense(rollout: Any) -> Any:
    """The same sum, `[B, T]`, each field paid at its own token; token ids of fields are their values."""
    tokens_BT = rollout.tokens_BT
    value_BT = tokens_BT * (tokens_BT < fix.VALUES) / MOST
    value_BT[:, [t for t in range(value_BT.shape[1]) if t not in PAID]] = 0
    return value_BT * rollout.policy_mask_BT


def _value(text: str, place: int) -> int:
    return int(text[place]) if len(text) > place and text[place] in "0123" else 0

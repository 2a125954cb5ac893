"""Records of preference pairs to rollouts, two rows a record."""

from collections.abc import Sequence
from typing import Any

import torch

from rlkl.data.preferences import SIDES, Record
from rlkl.data.prompts import rendered
from rlkl.sampling import given
from rlkl.types import End, Rollout


def completion_ids(row: Record, side: str, tokenizer: Any, eos_id: int | None) -> list[int]:
    """The tokens of one side, made apart from the prompt's, with one EOS at the end.

    A conversation goes through the chat template; what that writes behind its last EOS is left out.

    Raises:
        ValueError: the template writes the prompt in another way once the answer follows, or the side has no token.
    """
    text = row[side]
    if not isinstance(text, str):
        whole = tokenizer.apply_chat_template([*row["messages"], *text], tokenize=False)
        asked = rendered({"messages": row["messages"]}, tokenizer)[0]["prompt"]
        if not whole.startswith(asked):
            raise ValueError(
                f"data: {side} {str(text)[:40]!r}: the chat template writes the prompt in another way once the answer "
                "follows; render the records to texts"
            )
        text = whole.removeprefix(asked)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if eos_id is None:
        return ids
    if eos_id in ids:
        last = len(ids) - ids[::-1].index(eos_id)
        if not str(tokenizer.decode(ids[last:])).strip():
            return ids[:last]
    return [*ids, eos_id]


def rollout(rows: Sequence[Record], tokenizer: Any, eos_id: int | None, eos_ids: Sequence[int], limit: int) -> Rollout:
    """Pairs as a rollout with ``origin="data"``: record k is rows 2k (chosen) and 2k+1 (rejected), cut to ``limit``.

    The columns hold the prompt's text under ``prompt`` and each record's own, without the sides.
    """
    asked = [
        rendered({k: row[k] for k in ("prompt", "messages") if k in row and _asks(row, k)}, tokenizer) for row in rows
    ]
    made = [completion_ids(row, side, tokenizer, eos_id)[:limit] for row in rows for side in SIDES]
    record_B = torch.arange(len(rows)).repeat_interleave(2)
    kept = [{k: v for k, v in row.items() if k not in SIDES} | one for row, (one, _) in zip(rows, asked, strict=True)]
    names = list(dict.fromkeys(name for row in kept for name in row))
    return given(
        [ids for _, ids in asked for _ in SIDES],
        made,
        end_B=torch.tensor([int(End.EOS if ids[-1] in eos_ids else End.LIMIT) for ids in made]),
        group_B=record_B,
        origin="data",
        pair_B=torch.arange(len(made)),
        columns={name: [row.get(name) for row in kept for _ in SIDES] for name in names},
        decode=lambda ids: str(tokenizer.decode(ids)),
    )


def _asks(row: Record, key: str) -> bool:
    """Whether this key is what the record asks; a conversation that was rendered has its text under ``prompt`` too."""
    return key == "messages" or "messages" not in row


def note(rows: Sequence[Record], tokenizer: Any, eos_id: int | None, limit: int) -> str:
    """Counts; every side is tokenised for them, so that one that cannot be is found before the start.

    Raises:
        ValueError: the sides of a pair are equal as far as they are read.
    """
    made = [[completion_ids(row, side, tokenizer, eos_id) for side in SIDES] for row in rows]
    if equal := [row for row, (chosen, rejected) in zip(rows, made, strict=True) if chosen[:limit] == rejected[:limit]]:
        raise ValueError(
            f"data: {len(equal)} of {len(rows)} pairs are equal in their first rollout.max_new_tokens={limit} tokens "
            f"and prefer nothing, such as chosen {str(equal[0]['chosen'])[:40]!r}; raise it, or leave these pairs out"
        )
    sizes = [len(ids) for sides in made for ids in sides]
    said = f"stored pairs of completions of {min(sizes)} to {max(sizes)} tokens"
    long = sum(size > limit for size in sizes)
    return said + (f"; {long} longer than rollout.max_new_tokens={limit} are cut" if long else "")

"""What a reward model reads of a rollout, and at which of the policy's tokens its scores are paid.

A model with the policy's tokenizer reads the policy's own ids. Any other one reads the text, laid out as
``rlkl reward-model`` lays out its rows: the prompt as its tokenizer does by default, or through its own chat template
where the prompt is a conversation; the completion apart from it; one EOS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlkl.data.paired import completion_ids
from rlkl.data.prompts import rendered
from rlkl.data.sentences import last_tokens
from rlkl.data.settled import settled
from rlkl.data.spans import Decoded, Tokenised
from rlkl.types import End, Rollout

Ids = list[int]


@dataclass(frozen=True)
class Reading:
    """Rows of the model's token ids; in row i the scores at ``read[i]`` are paid at policy tokens ``paid[i]``."""

    rows: list[Ids]
    read: list[list[int]]
    paid: list[list[int]]


def whole(rollout: Rollout, tokenizer: Any, same: bool, eos: bool) -> list[Ids]:
    """What is judged as a whole: prompt and completion, with one EOS however it ended (``eos``), or none.

    Raises:
        ValueError: prompts are conversations, and the model's tokenizer has no chat template.
    """
    prompts, end_id = _prompts(rollout, tokenizer, same), tokenizer.eos_token_id if eos else None
    if not same:
        return [
            [*ids, *_answer(rollout, i, text, tokenizer, end_id)]
            for i, (ids, text) in enumerate(zip(prompts, rollout.texts(), strict=True))
        ]
    texts = rollout.texts() if rollout.stop else [""] * len(rollout)
    rows = zip(prompts, rollout.completion_ids(), rollout.end_B.tolist(), texts, strict=True)
    closed = [] if end_id is None else [end_id]
    return [[*ids, *_said(y, how, text, rollout), *closed] for ids, y, how, text in rows]


def dense(rollout: Rollout, tokenizer: Any, same: bool, level: str) -> Reading:
    """What is judged token by token, or sentence by sentence: prompt and completion, with EOS where it ended so.

    Tokens of the policy are paid as they are. Another tokenizer's are paid where they are certain
    (:mod:`rlkl.data.settled`). A sentence is read at its last token and paid once it is known to have ended.

    Raises:
        ValueError: prompts are conversations, and the model's tokenizer has no chat template.
    """
    made = Reading([], [], [])
    end_id = tokenizer.eos_token_id
    texts = rollout.texts() if level == "sentence" or not same else [""] * len(rollout)
    rows = zip(_prompts(rollout, tokenizer, same), rollout.completion_ids(), texts, strict=True)
    for asked, row, text in rows:
        place: Decoded | Tokenised | None = None
        ids, paid = row, list(range(len(row)))
        if not same:
            cut = settled(row, _decode(rollout), text, tokenizer)
            ids, paid, place = cut.ids, cut.paid, cut.place
        read = list(range(len(ids)))
        if level == "sentence":
            decoded = Decoded(row, _decode(rollout), text)
            ended = last_tokens(text, place or decoded)
            read = list(ended)
            paid = [decoded.certain(end) for _, end in ended.values()] if same else [paid[t] for t in read]
        elif not same and end_id is not None and int(rollout.end_B[len(made.rows)]) == End.EOS:
            ids, read, paid = [*ids, end_id], [*read, len(ids)], [*paid, len(row) - 1]
        made.rows.append([*asked, *ids])
        made.read.append([len(asked) + t for t in read])
        made.paid.append(paid)
    return made


def _prompts(rollout: Rollout, tokenizer: Any, same: bool) -> list[Ids]:
    """The prompts, by their own ids or as another tokenizer reads them."""
    if same:
        rows = zip(rollout.prompt_BP.tolist(), rollout.prompt_length_B.tolist(), strict=True)
        return [ids[:n] for ids, n in rows]
    talks = rollout.columns.get("messages") or [None] * len(rollout)
    rows = zip(talks, rollout.columns["prompt"], strict=True)
    return [rendered({"messages": talk} if talk else {"prompt": text}, tokenizer)[1] for talk, text in rows]


def _answer(rollout: Rollout, i: int, text: str, tokenizer: Any, end_id: int | None) -> Ids:
    """A completion as a side of a preference pair is read: after a conversation, a message of its own."""
    talk = (rollout.columns.get("messages") or [None] * len(rollout))[i]
    if not talk or talk[-1]["role"] == "assistant":
        return completion_ids({"said": text}, "said", tokenizer, end_id)
    row = {"messages": talk, "said": [{"role": "assistant", "content": text}]}
    return completion_ids(row, "said", tokenizer, end_id)


def _said(ids: Ids, how: int, text: str, rollout: Rollout) -> Ids:
    """The tokens of a completion without the EOS or the stop string that ended it, which is no part of its text."""
    if how == End.STOP:
        return ids[: max(Decoded(ids, _decode(rollout), text).tokens(0, len(text)), default=-1) + 1] if text else []
    return ids[:-1] if how == End.EOS else ids


def _decode(rollout: Rollout) -> Callable[[Ids], str]:
    assert rollout.decode is not None, "this rollout has no tokenizer"
    return rollout.decode

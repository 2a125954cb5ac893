"""What a reward model reads of a rollout, and at which of the policy's tokens its scores are paid.

A model with the policy's tokenizer reads the policy's own ids. Any other one reads the text, laid out as
``rlkl reward-model`` lays out its rows: the prompt as its tokenizer does by default, or through its own chat template
where the prompt is a conversation; the completion apart from it; one EOS. ``policy`` is the policy's tokenizer if that
is another one, else None.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlkl.data.paired import completion_ids
from rlkl.data.prompts import rendered
from rlkl.data.sentences import last_tokens
from rlkl.data.settled import settled
from rlkl.data.sources import conversation
from rlkl.data.spans import Decoded, Tokenised
from rlkl.types import End, Rollout

Ids = list[int]
Talk = list[dict[str, str]]


@dataclass(frozen=True)
class Reading:
    """Rows of the model's token ids; in row i the scores at ``read[i]`` are paid at policy tokens ``paid[i]``."""

    rows: list[Ids]
    read: list[list[int]]
    paid: list[list[int]]


def whole(rollout: Rollout, tokenizer: Any, policy: Any, eos: bool) -> list[Ids]:
    """What is judged as a whole: prompt and completion, with one EOS however it ended (``eos``), or none.

    Raises:
        ValueError: prompts are conversations, and the model's tokenizer has no chat template.
    """
    prompts, end_id = _prompts(rollout, tokenizer, policy), tokenizer.eos_token_id if eos else None
    if policy is not None:
        said = zip(prompts, _talks(rollout, policy), rollout.texts(), strict=True)
        return [[*ids, *_answer(talk, text, tokenizer, end_id)] for ids, talk, text in said]
    texts = rollout.texts() if rollout.stop else [""] * len(rollout)
    rows = zip(prompts, rollout.completion_ids(), rollout.end_B.tolist(), texts, strict=True)
    closed = [] if end_id is None else [end_id]
    return [[*ids, *_said(y, how, text, rollout), *closed] for ids, y, how, text in rows]


def dense(rollout: Rollout, tokenizer: Any, policy: Any, level: str) -> Reading:
    """What is judged token by token, or sentence by sentence: prompt and completion, with EOS where it ended so.

    Tokens of the policy are paid as they are. Another tokenizer's are paid where they are certain
    (:mod:`rlkl.data.settled`). A sentence is read at its last token and paid once it is known to have ended.

    Raises:
        ValueError: prompts are conversations, and the model's tokenizer has no chat template.
    """
    asked = _prompts(rollout, tokenizer, policy)
    made = completions(rollout, tokenizer, policy is None, level)
    rows = [[*before, *ids] for before, ids in zip(asked, made.rows, strict=True)]
    read = [[len(before) + t for t in own] for before, own in zip(asked, made.read, strict=True)]
    return Reading(rows, read, made.paid)


def completions(rollout: Rollout, tokenizer: Any, same: bool, level: str = "token") -> Reading:
    """As :func:`dense`, of completions without their prompts; ``same``: the tokenizer is the policy's."""
    made = Reading([], [], [])
    end_id = tokenizer.eos_token_id
    texts = rollout.texts() if level == "sentence" or not same else [""] * len(rollout)
    for row, text in zip(rollout.completion_ids(), texts, strict=True):
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
            paid = [decoded.certain(end) for _, end in ended.values()] if place is None else [paid[t] for t in read]
        elif place is not None and end_id is not None and int(rollout.end_B[len(made.rows)]) == End.EOS:
            ids, read, paid = [*ids, end_id], [*read, len(ids)], [*paid, len(row) - 1]
        made.rows.append(ids)
        made.read.append(read)
        made.paid.append(paid)
    return made


def _prompts(rollout: Rollout, tokenizer: Any, policy: Any) -> list[Ids]:
    """The prompts, by their own ids or as another tokenizer reads them."""
    if policy is None:
        rows = zip(rollout.prompt_BP.tolist(), rollout.prompt_length_B.tolist(), strict=True)
        return [ids[:n] for ids, n in rows]
    asked = zip(_talks(rollout, policy), rollout.columns["prompt"], strict=True)
    return [rendered({"messages": talk} if talk else {"prompt": text}, tokenizer)[1] for talk, text in asked]


def _talks(rollout: Rollout, policy: Any) -> list[Talk | None]:
    """The conversations that prompts were made of; a column ``messages`` may hold something else, even the answer."""
    found: dict[str, Talk | None] = {}
    texts = rollout.columns["prompt"]
    for text, held in zip(texts, rollout.columns.get("messages") or [None] * len(texts), strict=True):
        if text not in found:
            talk = conversation(held)
            try:
                same = talk is not None and rendered({"messages": talk}, policy)[0]["prompt"] == text
            except ValueError:  # no template, or one that refuses it
                same = False
            found[text] = talk if same else None
    return [found[text] for text in texts]


def _answer(talk: Talk | None, text: str, tokenizer: Any, end_id: int | None) -> Ids:
    """A completion as a side of a preference pair is read: after a conversation, a message of its own."""
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

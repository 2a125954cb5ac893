"""Prompts: split, rendered, tokenised and served in a seeded order."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from rlkl.config.data import Data, FactsData, FixData, SplitData
from rlkl.data import sources
from rlkl.data.sources import Record
from rlkl.sampling import ORDER, SPLIT, Prompts, permutation


def records(config: Data, seed: int) -> tuple[list[Record], list[Record]]:
    """Training and held-out records, each with its text under ``prompt``, or else its conversation under ``messages``.

    No prompt is on both sides: a share of the distinct prompts is held out, with all their records.

    Raises:
        ValueError: a source cannot be read or split, a record lacks its prompt, or a prompt is on both sides.
    """
    if isinstance(config, FactsData | FixData):
        from rlkl.tasks import facts, fix

        rows = facts.prompts() if isinstance(config, FactsData) else fix.prompts()
        return [r for r in rows if r["split"] == "train"], [r for r in rows if r["split"] == "eval"]
    return split(config.held_out, config.path, lambda held_out: sources.read(config, held_out), seed)


def split(
    held_out: float | str, path: str, read: Callable[[str | None], list[Record]], seed: int
) -> tuple[list[Record], list[Record]]:
    """Training and held-out records; ``read`` gives those of a file or split that ``held_out`` names, or else of all.

    Raises:
        ValueError: they cannot be split, or a prompt is on both sides.
    """
    train = read(None)
    if isinstance(held_out, str):
        held = read(held_out)
        if both := {_key(r) for r in train} & {_key(r) for r in held}:
            raise ValueError(
                f"data.held_out={held_out}: {len(both)} of its prompts are training prompts too, such as "
                f"{min(both)[:40]!r}; name other records, or a share, which keeps equal prompts together"
            )
        return train, held
    distinct = list(dict.fromkeys(_key(r) for r in train))
    if len(distinct) < 2:
        raise ValueError(f"{path}: 1 record (or many of 1 prompt) cannot be split; name others in data.held_out")
    kept = min(max(round(len(distinct) * held_out), 1), len(distinct) - 1)
    chosen = {distinct[i] for i in permutation(seed, SPLIT, 0, len(distinct))[:kept]}
    return [r for r in train if _key(r) not in chosen], [r for r in train if _key(r) in chosen]


def _key(row: Record) -> str:
    return row["prompt"] if "prompt" in row else json.dumps(row["messages"])


TEXTS = {
    "annotated": "name a text column in data.prompt",
    "pairs": "write prompt, chosen and rejected as texts",
}
"""What to do without a chat template, for each ``data.type`` that has no ``data.columns``."""


def rendered(row: Record, tokenizer: Any, kind: str = "") -> tuple[Record, list[int]]:
    """A record with its text under ``prompt``, and the ids of that text.

    A text is tokenised as the tokenizer does by default (a BOS that it adds stays). A conversation goes through the
    chat template, which writes its own BOS; it ends where the assistant's answer begins, or goes on, if the last
    message is the assistant's. ``kind`` is the ``data.type``, for the remedy.

    Raises:
        ValueError: there is no chat template, or it refuses the conversation.
    """
    if "prompt" in row:
        return row, tokenizer(row["prompt"])["input_ids"]
    if not getattr(tokenizer, "chat_template", None):
        remedy = TEXTS.get(kind, "map a text column with data.columns.prompt")
        raise ValueError(
            f"data: prompts are messages, and the model's tokenizer has no chat template; use a chat model, or {remedy}"
        )
    messages = row["messages"]
    begun = messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
        )
    except (TemplateError, ValueError) as error:
        raise ValueError(f"data: the chat template refuses {json.dumps(messages)[:60]}...: {error}") from None
    return {**row, "prompt": text}, tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class PromptSet:
    """Tokenised records; ``dropped`` is how many were left out for having more than ``limit`` tokens."""

    records: Sequence[Record]
    ids: Sequence[list[int]]
    tokenizer: Any
    seed: int
    limit: int | None = None
    dropped: int = 0

    @classmethod
    def tokenise(
        cls,
        rows: Sequence[Record],
        tokenizer: Any,
        seed: int,
        context: int | None,
        max_new_tokens: int,
        config: Data | None = None,
    ) -> "PromptSet":
        """Tokenise records; ``config`` may lower the limit on a prompt's length, and have longer ones dropped.

        Raises:
            ValueError: a prompt is empty once tokenised, or too long; the limits leave no prompt.
        """
        limit, why = _limit(context, max_new_tokens, config)
        pairs = [rendered(row, tokenizer, "" if config is None else config.type) for row in rows]
        if empty := [row["prompt"] for row, ids in pairs if not ids]:
            raise ValueError(f"data: prompt {empty[0][:40]!r} has 0 tokens; every prompt needs 1 or more")
        long = [(row["prompt"], len(ids)) for row, ids in pairs if limit is not None and len(ids) > limit]
        drop = isinstance(config, SplitData) and config.overlong == "drop"
        if long and (len(long) == len(pairs) or not drop):
            text, size = long[0]
            raise ValueError(
                f"data: {len(long)} of {len(pairs)} prompts are too long, such as {text[:40]!r} of {size} tokens: "
                f"at most {limit} {why}, or leave long prompts out with data.overlong=drop"
            )
        fitting = [(row, ids) for row, ids in pairs if limit is None or len(ids) <= limit]
        return cls([row for row, _ in fitting], [ids for _, ids in fitting], tokenizer, seed, limit, len(long))

    def lengths(self) -> str:
        """The lengths of the prompts in tokens, and their limit, for a person to read."""
        sizes = [len(ids) for ids in self.ids]
        said = f"prompts of {min(sizes)} to {max(sizes)} tokens"
        said += "" if self.limit is None else f" (limit {self.limit})"
        return said + (f"; {self.dropped} longer ones left out" if self.dropped else "")

    def batch(self, step: int, count: int) -> Prompts:
        """The prompts of a step (from 1): consecutive pieces of seeded permutations, one an epoch.

        This is a function of the seed and the step alone, so a run that resumes needs no cursor. Every epoch visits
        every record once.
        """
        return self.take(self.places(step, count))

    def places(self, step: int, count: int) -> list[int]:
        """Which records :meth:`batch` serves at a step."""
        total = len(self.ids)
        at = [divmod(position, total) for position in range((step - 1) * count, step * count)]
        orders = {epoch: permutation(self.seed, ORDER, epoch, total) for epoch in {epoch for epoch, _ in at}}
        return [orders[epoch][place] for epoch, place in at]

    def take(self, chosen: Sequence[int]) -> Prompts:
        """The prompts at these places, as groups 0, 1, ..."""
        rows = [self.records[i] for i in chosen]
        names = list(dict.fromkeys(name for row in rows for name in row))
        return Prompts(
            ids=[self.ids[i] for i in chosen],
            group=list(range(len(chosen))),
            columns={name: [row.get(name) for row in rows] for name in names},
            decode=lambda tokens: str(self.tokenizer.decode(tokens)),
        )


def _limit(context: int | None, max_new_tokens: int, config: Data | None) -> tuple[int | None, str]:
    """The longest prompt in tokens, and why, with what to do."""
    room = None if context is None else context - max_new_tokens
    rest = f"context {context} - rollout.max_new_tokens {max_new_tokens}"
    if room is not None and room < 1:
        raise ValueError(f"data: {rest} leaves no token for a prompt; lower rollout.max_new_tokens")
    asked = config.max_prompt_tokens if isinstance(config, SplitData) else None
    if asked is None:
        return room, f"({rest}); shorten it or lower max_new_tokens"
    if room is not None and asked > room:
        raise ValueError(f"data.max_prompt_tokens={asked}: {rest} leaves {room} tokens; lower one of them")
    return asked, "(data.max_prompt_tokens); shorten it or raise the limit"

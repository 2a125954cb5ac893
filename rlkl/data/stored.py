"""Stored completions as the rollouts of training steps: a run learns from what somebody wrote, and samples nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from rlkl.config import AnnotationsSource, Config, PairsData, Source
from rlkl.data import annotated, paired, preferences
from rlkl.data.annotated import Annotated
from rlkl.data.prompts import PromptSet
from rlkl.data.sources import Record
from rlkl.data.spans import to_rollout, token_weights
from rlkl.types import End, Rollout

OWN = ("completion", "spans", "annotators", "token_ids")  # what a record holds beside its prompt and its columns


@dataclass(frozen=True)
class Stored:
    """Records in the order of a :class:`PromptSet`, and how some of them become a rollout with ``origin="data"``.

    In a rollout that ``make`` makes, ``group_B`` numbers the records as they were given. ``held`` are the held-out
    records, all of them; ``notes`` is what a user should know, ``lightest`` the least weight of a mark.
    """

    prompts: PromptSet
    make: Callable[[Sequence[Record]], Rollout]
    held: Rollout
    notes: tuple[str, ...] = ()
    lightest: float = 0.0

    def batch(self, step: int, count: int) -> Rollout:
        """The records of a step (from 1), in the order of :meth:`PromptSet.batch`: every epoch visits each once."""
        return self.make([self.prompts.records[i] for i in self.prompts.places(step, count)])

    def used(self, step: int, count: int) -> int:
        """Distinct records that were learned from up to and with this step; each cost its labels once."""
        return min(step * count, len(self.prompts.ids))


def build(config: Config, train: PromptSet, held: PromptSet, eos_ids: Sequence[int]) -> Stored:
    """The stored completions of a run, every one of them checked.

    Raises:
        ValueError: a label has no weight, no token is marked, or a completion or its token ids cannot be used with
            this tokenizer.
    """
    limit, tokenizer = config.rollout.max_new_tokens, train.tokenizer
    make = maker(config, tokenizer, eos_ids)
    if isinstance(config.data, PairsData):
        said = paired.note([*train.records, *held.records], tokenizer, _eos(tokenizer, eos_ids), limit)
        return Stored(train, make, make(held.records), (said,))
    records = [parsed(row) for row in train.records]
    for name, source in _stored(config.rewards).items():
        try:
            annotated.check_weights(records, source.weights)
        except ValueError as error:
            raise ValueError(f"rewards.{name}.{error}") from None
    found = [
        source.weight * source.weights[span.label] * span.weight
        for source in _stored(config.rewards).values()
        for record in records
        for span in record.spans
    ]
    if not found and all(source.unmarked is None for source in _stored(config.rewards).values()):
        raise ValueError(
            f"data: none of the {len(records)} training completions has a span, so no token is marked; "
            "mark some, or give every unmarked token a weight with rewards.<name>.unmarked"
        )
    notes = (_note(records, tokenizer, _eos(tokenizer, eos_ids), limit),)
    return Stored(train, make, make(held.records), notes, min(found, default=0.0))


def maker(config: Config, tokenizer: Any, eos_ids: Sequence[int]) -> Callable[[Sequence[Record]], Rollout]:
    """How records of the run's kind of data become a rollout."""
    keys = {"tokenizer": tokenizer, "eos_ids": tuple(eos_ids), "limit": config.rollout.max_new_tokens}
    if isinstance(config.data, PairsData):
        return partial(paired.rollout, eos_id=_eos(tokenizer, eos_ids), **keys)
    return partial(_annotated, **keys)


def asked(held: PromptSet) -> PromptSet:
    """The distinct prompts of held-out records, each with the columns of its first, to be sampled from."""
    first = {row["prompt"]: place for place, row in reversed(list(enumerate(held.records)))}
    chosen = sorted(first.values())
    own = OWN if held.records and "completion" in held.records[0] else preferences.SIDES
    rows = [{key: value for key, value in held.records[i].items() if key not in own} for i in chosen]
    return replace(held, records=rows, ids=[held.ids[i] for i in chosen])


def parsed(row: Record) -> Annotated:
    """An annotated completion from its record, whose conversation may have been rendered."""
    given = {key: value for key, value in row.items() if key != "prompt" or "messages" not in row}
    return annotated.parse(f"record {row['id']!r}", given)


def _stored(rewards: Mapping[str, Source]) -> dict[str, AnnotationsSource]:
    """The sources that read stored spans."""
    return {name: s for name, s in rewards.items() if isinstance(s, AnnotationsSource) and s.labeller is None}


def _annotated(rows: Sequence[Record], tokenizer: Any, eos_ids: Sequence[int], limit: int) -> Rollout:
    """Annotated completions; what their labels weigh is said by the rewards alone, so they have no weights yet."""
    records = [parsed(row) for row in rows]
    labels = {span.label for record in records for span in record.spans}
    made = to_rollout(
        records,
        tokenizer,
        dict.fromkeys(labels, 0.0),
        eos_id=_eos(tokenizer, eos_ids),
        max_completion_tokens=limit,
    )
    last_B = made.tokens_BT.gather(1, made.length_B[:, None] - 1).squeeze(1)
    ended_B = torch.isin(last_B, torch.tensor(list(eos_ids), dtype=torch.long))
    return replace(
        made,
        group_B=made.sample_id_B,
        end_B=torch.where(ended_B, int(End.EOS), int(End.LIMIT)),
        annotation_BT=None,
        annotated_BT=None,
    )


def _eos(tokenizer: Any, eos_ids: Sequence[int]) -> int | None:
    """The token that ends a completion whose tokens are not known."""
    own: int | None = tokenizer.eos_token_id
    return own if own in eos_ids else next(iter(eos_ids), None)


def _note(records: Sequence[Annotated], tokenizer: Any, eos_id: int | None, limit: int) -> str:
    """Counts; every completion is tokenised for them, so that one that cannot be is found before the start."""
    made = []
    for record in records:
        weights = dict.fromkeys((span.label for span in record.spans), 0.0)
        made.append(token_weights(record, tokenizer, weights, eos_id=eos_id))
    sizes = [len(one.ids) for one in made]
    places = [tokens for one in made for tokens in one.places]
    said = f"stored completions of {min(sizes)} to {max(sizes)} tokens, {len(places)} spans"
    if without := sum(not tokens for tokens in places):
        said += f" ({without} mark no token)"
    if long := sum(size > limit for size in sizes):
        lost = sum(bool(tokens) and max(tokens) >= limit for tokens in places)
        said += f"; {long} longer than rollout.max_new_tokens={limit} are cut, with {lost} spans or parts of them"
    return said

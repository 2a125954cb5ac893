"""What people judged, as rows of token ids: prompt, completion and one EOS, laid out as a policy's samples are."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from rlkl.config.data import AnnotatedData, PairsData
from rlkl.config.reward_model import HHData, JudgedPairs, JudgedSource, QAData, SpansData
from rlkl.data import annotated, files, importers, preferences, sources
from rlkl.data.paired import completion_ids
from rlkl.data.preferences import SIDES, Record
from rlkl.data.prompts import rendered, split
from rlkl.data.sentences import sentence_weights
from rlkl.data.spans import token_weights

Row = dict[str, Any]
TURN = "\n\nAssistant:"


def records(config: JudgedSource, seed: int) -> tuple[list[Record], list[Record]]:
    """Training and held-out records; no prompt is on both sides.

    Raises:
        ValueError: they cannot be read or split; a label has no weight.
    """
    train, held = split(config.held_out, config.path, lambda held_out: _read(config, held_out), seed)
    if isinstance(config, SpansData):
        annotated.check_weights([_parsed(row) for row in (*train, *held)], config.weights)
    return train, held


def rows(
    config: JudgedSource, found: Sequence[Record], tokenizer: Any, context: int | None, kind: str = "token"
) -> tuple[list[Row], int]:
    """Records as rows for the trainers, and how many were left out for being too long.

    A pair has ``chosen_ids`` and ``rejected_ids``; an annotated completion ``ids`` and ``target``, a score or None a
    token, with ``kind=sentence`` at the last tokens of sentences alone. Both have the ``prompt`` by which they belong
    together.

    Raises:
        ValueError: the tokenizer has no EOS; a row is too long, or all are.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("model: its tokenizer has no EOS, by which everything that is scored ends; set its eos_token")
    limit = config.max_tokens or context
    if config.max_tokens is not None and context is not None and config.max_tokens > context:
        raise ValueError(f"data.max_tokens={config.max_tokens}: the model reads {context} at most; lower it")
    made = [_spans(config, r, tokenizer, kind) if isinstance(config, SpansData) else _pair(r, tokenizer) for r in found]
    sizes = [max(len(ids) for name, ids in row.items() if name.endswith("ids")) for row in made]
    fitting = [row for row, size in zip(made, sizes, strict=True) if limit is None or size <= limit]
    long = len(made) - len(fitting)
    if long and (config.overlong == "refuse" or not fitting):
        raise ValueError(
            f"data: {long} of {len(made)} records are too long, the longest has {max(sizes)} tokens: at most {limit} "
            f"({'data.max_tokens' if config.max_tokens else 'what the model reads'}); shorten prompts, or leave long "
            "records out with data.overlong=drop"
        )
    return fitting, long


def _read(config: JudgedSource, held_out: str | None) -> list[Record]:
    path = Path(held_out or config.path)
    if isinstance(config, JudgedPairs):
        return sources.read(PairsData(type="pairs", path=config.path, split=config.split), held_out)
    if isinstance(config, SpansData):
        return sources.read(AnnotatedData(type="annotated", path=config.path, prompt=config.prompt), held_out)
    if isinstance(config, HHData):
        return preferences.checked(_dialogues(path), str(path))
    return preferences.checked(_answers(config, path), str(path))


def _dialogues(path: Path) -> Iterator[tuple[str, Record]]:
    """Pairs of dialogues as prompt and both sides."""
    for where, row in files.lines(path, "data.path names a .jsonl file, one pair of dialogues a line"):
        chosen, rejected = (annotated.take(where, row, side, str) for side in SIDES)
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        shared = min(len(chosen), len(rejected)) if shared is None else shared
        begun = chosen.rfind(TURN, 0, shared)
        if begun < 0:
            annotated.refuse(where, "chosen", f"shares no turn {TURN!r} with rejected; give prompts with type: pairs")
        end = begun + len(TURN)
        others = {name: held for name, held in row.items() if name not in SIDES}
        yield where, {**others, "prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _answers(config: QAData, path: Path) -> Iterator[tuple[str, Record]]:
    """The pairs of answers that somebody preferred, in the published order 1v2, 1v3, 1v4, 2v3, 2v4, 3v4."""
    for record in importers.load("qa-feedback", path, "codepoint")[0]:
        held, where = record.columns, f"{path}: {record.id}"
        preferred, pairs = held["preference"], list(combinations(held["predictions"], 2))
        if len(preferred) != len(pairs) or not all(type(p) is int and 0 <= p <= 2 for p in preferred):
            annotated.refuse(where, "preference", f"{preferred}; it must be six numbers, each 0, 1 or 2")
        columns = {name: held[name] for name in ("question", "passages", "gold")}
        prompt = config.prompt.format(passages=held["passages"], question=held["question"])
        for (first, second), better in zip(pairs, preferred, strict=True):
            if better and first != second:
                chosen, rejected = (first, second) if better == 1 else (second, first)
                yield where, {**columns, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def _pair(record: Record, tokenizer: Any) -> Row:
    asked, prompt = rendered({key: record[key] for key in ("messages", "prompt") if key in record}, tokenizer)
    ends = {f"{side}_ids": completion_ids(record, side, tokenizer, tokenizer.eos_token_id) for side in SIDES}
    return {"prompt": asked["prompt"], **{name: [*prompt, *ids] for name, ids in ends.items()}}


def _spans(config: SpansData, record: Record, tokenizer: Any, kind: str) -> Row:
    asked, prompt = rendered({key: record[key] for key in ("messages", "prompt") if key in record}, tokenizer)
    said, eos = _parsed(record), tokenizer.eos_token_id
    if kind == "sentence":
        ids, target = sentence_weights(said, tokenizer, config.weights, config.unmarked, eos)
    else:
        made = token_weights(said, tokenizer, config.weights, config.unmarked, eos_id=eos)
        pairs = zip(made.weight_T.tolist(), made.marked_T.tolist(), strict=True)
        ids, target = made.ids, [w if marked else None for w, marked in pairs]
    return {"prompt": asked["prompt"], "ids": [*prompt, *ids], "target": [*[None] * len(prompt), *target]}


def _parsed(record: Mapping[str, Any]) -> annotated.Annotated:
    return annotated.parse("data", record)

"""Prompts: from a JSONL file or an embedded task, split, tokenised and served in a seeded order."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlkl.config import Data, FactsData, JsonlData
from rlkl.sampling import Prompts

SPLIT, ORDER = 100, 101  # streams of randomness, beside those of sampling


def records(config: Data, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out records, each with its text under ``prompt``.

    Raises:
        ValueError: a missing or empty file, a record that is no JSON object or lacks its prompt.
    """
    if isinstance(config, FactsData):
        from rlkl.tasks import facts

        rows = facts.prompts()
        return [r for r in rows if r["split"] == "train"], [r for r in rows if r["split"] == "eval"]
    rows = _read("path", config.path, config)
    if isinstance(config.held_out, str):
        return rows, _read("held_out", config.held_out, config)
    if len(rows) < 2:
        raise ValueError(f"{config.path}: 1 record cannot be split; name a second file in data.held_out")
    kept = min(max(round(len(rows) * config.held_out), 1), len(rows) - 1)
    order = _permutation(seed, SPLIT, 0, len(rows))
    held = set(order[:kept])
    return [r for i, r in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def _read(key: str, path: str, config: JsonlData) -> list[dict[str, Any]]:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; data.{key} names a .jsonl file, one JSON object a line")
    column = config.columns.get("prompt", "prompt")
    rows: list[dict[str, Any]] = []
    try:
        # not splitlines(): JSON strings may hold U+2028 and other ends of lines as they are
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert the file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not valid JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: a {type(row).__name__}; every line must be a JSON object")
        text = row.get(column)
        if not isinstance(text, str) or not text:
            known = ", ".join(row) or "none"
            raise ValueError(
                f"{path}:{number}: no text in column {column!r} (columns: {known}); map it with data.columns.prompt"
            )
        rows.append({**row, "prompt": text})
    if not rows:
        raise ValueError(f"{path}: empty; it needs at least one record")
    return rows


@dataclass(frozen=True)
class PromptSet:
    """Tokenised records."""

    records: Sequence[dict[str, Any]]
    ids: Sequence[list[int]]
    tokenizer: Any
    seed: int

    @classmethod
    def tokenise(
        cls,
        rows: Sequence[dict[str, Any]],
        tokenizer: Any,
        seed: int,
        context: int | None,
        max_new_tokens: int,
    ) -> "PromptSet":
        """Tokenise prompts as the tokenizer does by default (a BOS that it adds stays).

        Raises:
            ValueError: a prompt is empty once tokenised, or leaves no room for ``max_new_tokens``.
        """
        ids = [tokenizer(row["prompt"])["input_ids"] for row in rows]
        for row, tokens in zip(rows, ids, strict=True):
            room = None if context is None else context - max_new_tokens
            if not tokens or (room is not None and len(tokens) > room):
                raise ValueError(
                    f"data: prompt {row['prompt'][:40]!r} has {len(tokens)} tokens; it needs 1 to {room} "
                    f"(context {context} - rollout.max_new_tokens {max_new_tokens}); shorten it or lower max_new_tokens"
                )
        return cls(rows, ids, tokenizer, seed)

    def batch(self, step: int, count: int) -> Prompts:
        """The prompts of a step (from 1): consecutive pieces of seeded permutations, one an epoch."""
        first, total = (step - 1) * count, len(self.ids)
        chosen = []
        for position in range(first, first + count):
            chosen.append(_permutation(self.seed, ORDER, position // total, total)[position % total])
        return self.take(chosen)

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


def _permutation(seed: int, stream: int, epoch: int, size: int) -> list[int]:
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, stream, 0]))
    return [int(i) for i in generator.permutation(size)]
